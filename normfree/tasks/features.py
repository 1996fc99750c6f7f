"""Pooled features of frozen networks, kept on the disk for the images of a data set."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normfree.config import MAX_PX
from normfree.data import Samples, UnreadableImage
from normfree.data.remote import data_folder, evict, short_hash
from normfree.errors import InputError, check_range
from normfree.files import replacing, sha256
from normfree.layers import reuse_weights
from normfree.models import Network, load
from normfree.tasks.accuracy import EVAL_BATCH, batches_for, prepare
from normfree.weights import ModelInfo
from normfree.weights.read import find_file

_VERSION = 1  # raised whenever the same weights and images would give other features, so that kept ones are not used
_MAX_BYTES = 5e9  # of all files of features together


def load_embedder(weights: str, px: int | None = None) -> tuple[Network, ModelInfo]:
    """The network of a weight file in float32 for `embed`, and its header with `px` for the pixels, where given.

    The file may have no classifier, and no names of its classes. Raises InputError.
    """
    check_range("px", px, 8, MAX_PX)
    model = load(weights).float()
    assert model.info is not None
    if model.out_indices is not None:
        raise InputError(f"{weights} gives feature maps (features_only), and has no pooled features")
    info = replace(model.info, eval_px=px or model.info.eval_px)
    model.head.global_pool = "avg"  # also for a file without pooling
    return model, info


def embed(model: Network, images: Tensor) -> Tensor:
    """Pooled features before the classifier, (N, num_features) float32, of prepared images (N, C, H, W)."""
    return model.forward_head(model.forward_features(images), pre_logits=True).float()


class FeatureCache:
    """A context in which features of images are computed, or taken from a file of an earlier time.

    The file is for one network, one preparation of images and one data set, and is written when the context is left,
    also by an exception. It knows an image by its path, size and times, or by its bytes where it is in no file of its
    own, so that the features of an image that was changed are computed again. All files together take at most 5 GB: the
    least recently used ones are deleted.
    """

    def __init__(self, weights: str, model: Network, info: ModelInfo, data: str, device: torch.device) -> None:
        self.model, self.info, self.device = model, info, device
        self.computed = self.reused = 0
        self._used: dict[str, np.ndarray] = {}
        preparation = info.eval_px, info.eval_crop, info.crop_fraction, info.in_channels, info.mean, info.std
        network = sha256(find_file(weights)), info.architecture, info.overrides
        place = os.path.abspath(data) if os.path.exists(data) else data
        key = short_hash(json.dumps([_VERSION, device.type, network, preparation, place]))
        try:
            self.path: Path | None = data_folder() / "features" / f"{key}.npz"
        except InputError:  # no home folder
            self.path = None
        self._kept = self._read()

    def _read(self) -> dict[str, np.ndarray]:
        """The features of the file by image; none if there is no file, or it is damaged."""
        try:
            if self.path is None:
                return {}
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                images, features = arrays["images"].tolist(), arrays["features"]
            if features.shape != (len(images), self.model.num_features) or features.dtype != np.float32:
                raise ValueError("arrays of another shape")
            os.utime(self.path)  # the time of the last use
            return dict(zip(images, features, strict=True))
        except FileNotFoundError:
            return {}
        except (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, zipfile.BadZipFile) as error:
            print(f"warning: kept features are not used, as {self.path} cannot be read ({error})", file=sys.stderr)
            return {}

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *exception: object) -> None:
        rows = self._used if exception[0] is None else self._kept | self._used  # not all images have been asked for
        self._kept, self._used = {}, {}
        if not self.computed or not rows or self.path is None:
            return
        try:
            with replacing(self.path, durable=False) as temporary, temporary.open("wb") as file:
                np.savez(file, images=np.array([*rows]), features=np.stack([*rows.values()]))
            evict(self.path, _MAX_BYTES, "*.npz")
        except (InputError, OSError) as error:
            print(f"warning: the features are not kept for the next time: {error}", file=sys.stderr)

    def features(
        self, images: Samples, workers: int, show: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[np.ndarray, list[int], list[str]]:
        """Features (n, num_features) float32 of the images that can be read, their indices, reasons for the others."""
        marks = [_mark(images, index) for index in range(len(images))]
        missing = [index for index, mark in enumerate(marks) if mark not in self._kept]
        rows = {index: self._kept[mark] for index, mark in enumerate(marks) if mark in self._kept}
        self.reused += len(rows)
        self._used |= {marks[index]: row for index, row in rows.items()}
        unreadable: list[str] = []
        pin = self.device.type == "cuda"
        with torch.inference_mode(), reuse_weights(self.model):
            batches = batches_for(self.info, images.subset(missing), EVAL_BATCH, workers, pin) if missing else ()
            for number, batch in enumerate(batches, 1):
                unreadable += batch.unreadable
                show(min(number * EVAL_BATCH, len(missing)), len(missing))
                if not len(batch.indices):
                    continue
                prepared = prepare(batch.images, self.info.mean, self.info.std, self.device)
                indices = [missing[place] for place in batch.indices.tolist()]
                for index, row in zip(indices, embed(self.model, prepared).cpu().numpy(), strict=True):
                    if not np.isfinite(row).all():
                        raise InputError(f"the network's features of {images.name(index)} are not finite")
                    rows[index] = row
                    self._used |= {marks[index]: row} if marks[index] else {}
                    self.computed += 1
        readable = sorted(rows)
        width = self.model.num_features
        values = np.stack([rows[index] for index in readable]) if readable else np.empty((0, width), np.float32)
        return values, readable, unreadable


def _mark(images: Samples, index: int) -> str:
    """What changes with the content of an image: path, size and times of its file, or a hash of its bytes.

    "" for an image that is not there.
    """
    try:
        source = images.source(index)
        if isinstance(source, bytes):
            return hashlib.blake2b(source, digest_size=16).hexdigest()
        found = os.stat(source)  # an older file of the same size and time may take its place, which changes `ctime`
        return short_hash(f"{os.path.abspath(source)}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}")
    except (UnreadableImage, OSError, ValueError):
        return ""
