"""Images in tar shards, by WebDataset's convention: KEY.jpg (or .png, ...) beside KEY.cls or KEY.json with the label.

The headers of a shard are read once, into an index of where each image lies; images are then read by seeking.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import posixpath
import re
import tarfile
import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from normfree.data.images import LabelledImages, Samples, UnreadableImage, image_suffixes
from normfree.data.remote import data_folder, glob_remote, is_remote, open_file, short_hash
from normfree.data.splits import Splits, named_splits, split_files
from normfree.errors import InputError
from normfree.files import replacing

_LABEL_FIELDS = ("label", "cls", "class")
_SCAN_VERSION = 2  # raised whenever `scan` changes what it finds, so that older remembered indexes are not used
_WINDOW_SHARDS = 16  # images are shuffled among this many shards, all that disk caches must hold at a time


@dataclass(kw_only=True, eq=False)
class ShardImages(Samples):
    """Image i is the `sizes[i]` bytes at `offsets[i]` of `shards[places[i]]`; arrays are (N,), `keys` of bytes."""

    shards: tuple[str, ...]
    places: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def source(self, index: int) -> bytes:
        size = int(self.sizes[index])
        try:
            with open_file(self.shards[self.places[index]]) as file:
                file.seek(int(self.offsets[index]))
                content = file.read(size)
        except OSError as error:
            raise UnreadableImage(self.name(index), (error.strerror or str(error)).lower()) from None
        if len(content) < size:
            raise UnreadableImage(self.name(index), "its shard is cut off before it")
        return content

    def name(self, index: int) -> str:
        return f"{posixpath.basename(self.shards[self.places[index]])}/{os.fsdecode(self.keys[index])}"

    def subset(self, indices: Sequence[int]) -> Self:
        rows = np.asarray(indices, dtype=np.int64)
        return replace(self, **{name: getattr(self, name)[rows] for name in ("places", "offsets", "sizes", "keys")})

    def order(self, rng: np.random.Generator, lead: int = 0) -> np.ndarray:
        """Shards in random order, and images in random order among those of a few shards, to keep reads local."""
        if len(self.shards) <= _WINDOW_SHARDS:
            return super().order(rng, lead)  # the same as for these images in a folder
        window = rng.permutation(len(self.shards))[self.places] // _WINDOW_SHARDS
        return np.lexsort((rng.random(len(self)), window))


def shard_splits(shards: Sequence[str]) -> Splits:
    """The splits of a data set that consists of these shards."""
    files = split_files(shards)
    return named_splits(files, lambda split: _open(files[split]))


def find_shards(pattern: str) -> list[str]:
    """The shards that match a name, braces as in `train-{000..099}.tar`, or wildcards; local or remote."""
    if not pattern.endswith(".tar"):
        raise InputError(f"{pattern}: give the tar shards that are there, as in {pattern}/train-{{000..099}}.tar")
    names: list[str] = []
    for name in expand_braces(pattern):
        stars = any(sign in name for sign in "*?[")
        names += [name] if not stars else glob_remote(name) if is_remote(name) else glob.glob(name)
    missing = [name for name in names if not is_remote(name) and not os.path.isfile(name)]
    if missing or not names:
        raise InputError(f"no such shard: {missing[0] if missing else pattern} ({len(names) - len(missing)} are there)")
    return sorted(set(names))


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern with braces stands for in a shell, each once; braces may be nested.

    >>> expand_braces("{train-{08..10},val-0}.tar")
    ['train-08.tar', 'val-0.tar', 'train-09.tar', 'train-10.tar']
    """
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner is None:
        return [pattern]
    words = inner[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner[1]):
        words = [f"{n:0{len(numbers[1])}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    names = (pattern[: inner.start()] + word + pattern[inner.end() :] for word in words)
    return list(dict.fromkeys(name for each in names for name in expand_braces(each)))


class Index(NamedTuple):
    """Where the N images of a shard lie, arrays (N,), and their labels: names, or decimal indices into `classes`."""

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    shard_bytes: np.ndarray

    def save(self, path: str | Path) -> None:
        """Writes the file `path` at once."""
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **self._asdict())

    @classmethod
    def load(cls, path: str | Path) -> Index | None:
        """The index in a file, None if there is no such file. InputError if it is damaged."""
        try:
            with open_file(str(path)) as file, np.load(file, allow_pickle=False) as arrays:
                return cls(**arrays)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no index of a shard, or is damaged ({error}): delete it") from None


def _open(shards: Sequence[str]) -> LabelledImages:
    """The images of these shards."""
    found = [_index(shard) for shard in shards]
    keys, offsets, sizes, labels, _, _ = (np.concatenate(column) for column in zip(*found, strict=True))
    classes = found[0].classes
    if any(not np.array_equal(index.classes, classes) for index in found):
        raise InputError(f"{shards[0]} and the other shards come from packs with different classes: pack them together")
    if len(classes):
        targets = labels.astype(np.int64)
    else:
        classes, targets = np.unique(labels, return_inverse=True)
        if all(label.isdigit() for label in classes.tolist()):
            classes, targets = np.unique(labels.astype(np.int64), return_inverse=True)
    samples = ShardImages(
        shards=tuple(shards),
        places=np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.keys) for index in found]),
        offsets=offsets,
        sizes=sizes,
        keys=keys,
    )
    images = LabelledImages(
        samples=samples,
        targets=array("i", targets.astype(np.int32).tobytes()),  # a list of a million would be copied by every worker
        class_names=tuple(os.fsdecode(c) if isinstance(c, bytes) else str(c) for c in classes.tolist()),
    )
    if len(found[0].classes) and len(shards) <= _WINDOW_SHARDS:
        # Keys of our packs begin with the place of the image in the packed data set: a run on either is the same.
        return images.subset(np.argsort(keys, kind="stable").tolist())
    return images


def index_file(shard: str) -> str:
    """The index that `normfree data pack` writes beside a shard: train-000000.npz of train-000000.tar."""
    return shard.removesuffix(".tar") + ".npz"


def _index(shard: str) -> Index:
    """The index beside the shard, else the remembered one, else a new one from the headers of the shard."""
    stamp = shard
    if not is_remote(shard):
        stat = os.stat(shard)
        if (index := Index.load(index_file(shard))) is not None:
            if index.shard_bytes[0] != stat.st_size:
                raise InputError(f"{index_file(shard)} is not the index of the shard beside it: delete it")
            return index
        stamp = f"{os.path.abspath(shard)} {stat.st_size} {stat.st_mtime_ns}"
    remembered = data_folder() / "indexes" / f"{short_hash(f'{_SCAN_VERSION} {stamp}')}.npz"
    index = None
    with contextlib.suppress(InputError):  # damaged, or none at the address
        index = Index.load(remembered) or (Index.load(index_file(shard)) if is_remote(shard) else None)
    if index is None:
        index = scan(shard)
        index.save(remembered)
    return index


def scan(shard: str, classes: Sequence[str] = ()) -> Index:
    """Reads the headers and labels of a shard.

    The image of a key is KEY.jpg, or else KEY.ANYTHING.jpg. Raises InputError if the shard is damaged, if an image has
    no label, and if a key has two images or two different labels.
    """
    images: dict[str, tarfile.TarInfo] = {}
    others: dict[str, list[tarfile.TarInfo]] = {}  # KEY.ANYTHING.jpg
    labels: dict[str, tuple[bytes, str]] = {}  # label, name of the member
    suffixes = image_suffixes()
    try:
        with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, name = posixpath.split(member.name)
                stem, _, suffix = name.lower().partition(".")
                key = posixpath.join(folder, name[: len(stem)])
                if member.isdir() or not stem:  # no stem: ._KEY.jpg of macOS
                    continue
                if f".{suffix}" in suffixes:
                    if key in images:
                        raise _two_images(shard, key, images[key], member)
                    images[key] = member
                elif posixpath.splitext(suffix)[1] in suffixes:
                    others.setdefault(key, []).append(member)
                elif suffix in ("cls", "json"):
                    content = tar.extractfile(member)
                    label = _label(content.read() if content else b"", suffix)
                    known, source = labels.get(key, (b"", ""))
                    # one may be a number and the other its name
                    if known and label and known != label and known.isdigit() == label.isdigit():
                        one, other = f"{source} says {os.fsdecode(known)}", f"{member.name} says {os.fsdecode(label)}"
                        raise InputError(f"{shard}: {one}, {other}: only one of them can be the label")
                    if label and (suffix == "cls" or not known):
                        labels[key] = label, member.name
            file.seek(tar.offset)
            whole = file.read(512) == bytes(512)  # zeros follow the last member; tarfile also stops at a damaged header
            size = file.seek(0, os.SEEK_END)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{shard} is damaged, or no uncompressed tar ({error}): copy or pack it again") from None
    for key, members in others.items():
        if len(members) > 1 and key not in images:
            raise _two_images(shard, key, *members[:2])
        images.setdefault(key, members[0])
    if not whole or not images:
        wrong = "has no images KEY.jpg" if whole else f"is cut off or damaged after {len(images)} images"
        raise InputError(f"{shard} {wrong}: copy or pack it again")
    if unlabelled := next((key for key in images if key not in labels), None):
        fields = f"{unlabelled}.cls, or {unlabelled}.json with one of the fields {', '.join(_LABEL_FIELDS)}"
        raise InputError(f"image {unlabelled} of {shard} has no label: it needs {fields}")
    offsets, sizes = np.array([(image.offset_data, image.size) for image in images.values()], dtype=np.int64).T
    names = np.array([os.fsencode(name) for name in classes], dtype="S")
    keys = np.array([os.fsencode(key) for key in images])
    return Index(keys, offsets, sizes, np.array([labels[key][0] for key in images]), names, np.array([size]))


def _two_images(shard: str, key: str, one: tarfile.TarInfo, other: tarfile.TarInfo) -> InputError:
    both = f"{one.name} and {other.name} are both the image {key}"
    return InputError(f"{shard}: {both} (a key ends at the first dot of a name): give each a key of its own")


def _label(content: bytes, suffix: str) -> bytes:
    """The label in KEY.cls or KEY.json; empty if there is none."""
    if suffix == "cls":
        return content.strip()
    with contextlib.suppress(ValueError):
        fields = json.loads(content)
        if isinstance(fields, dict):
            return next((str(fields[name]).encode() for name in _LABEL_FIELDS if name in fields), b"")
    return b""
