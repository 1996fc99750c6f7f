"""The weight file: one safetensors file whose header says everything that prediction needs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from normfree.config import EvalCrop
from normfree.errors import InputError, one_line
from normfree.files import replacing
from normfree.weights.pickles import OLD_TORCH

KEY, FORMAT = "normfree", 1  # one key alone, since safetensors writes several in random order
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DETECTOR = "mask_rcnn"  # the architecture in a detector's file
# options that change neither the weights nor their shapes: they act in training, or take layers away at the end
NON_WEIGHT_OPTIONS = {"drop_rate", "stochastic_depth", "skip_init", "global_pool", "features_only", "out_indices"}


def package_version(package: str = "normfree") -> str:
    """The version of an installed package, or "unknown"."""
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


def _tuples(value: Any) -> Any:
    """Lists from JSON as tuples, recursively."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class ModelInfo:
    """The header of a weight file.

    `overrides` are keyword arguments of `create_model`; `train_px` and `eval_px` are sides of square inputs; `mean` and
    `std` apply to pixels in [0, 1]; `eval_crop` and `crop_fraction` are those of `normfree.data.EvalTransform`;
    `trained_on` holds hashes of some training images, which reveal an evaluation on the same images. Of a detector,
    `overrides` are keyword arguments of `create_detector`, the pixels are those of the short side, and `category_ids`
    are the numbers of the classes in the annotations it was trained on.
    """

    architecture: str
    num_classes: int
    in_channels: int = 3
    overrides: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    train_px: int = 224
    eval_px: int = 224
    eval_crop: EvalCrop = "resize_crop"
    crop_fraction: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    source: str = ""
    trained_on: tuple[str, ...] = ()
    licence: str = ""
    normfree_version: str = field(default_factory=package_version)
    category_ids: tuple[int, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """The header of a safetensors file."""
        return {KEY: json.dumps({"format": FORMAT} | asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> ModelInfo:
        """Raises ValueError, KeyError, TypeError or AttributeError on what `to_metadata` does not write."""
        values = _tuples(json.loads(metadata[KEY]))
        if values.pop("format") != FORMAT:
            raise ValueError("it is of a newer version of normfree")
        info = cls(**values)
        checks = {
            "architecture": isinstance(info.architecture, str),
            "num_classes": isinstance(info.num_classes, int) and info.num_classes >= 0,
            "in_channels": isinstance(info.in_channels, int) and info.in_channels > 0,
            "overrides": isinstance(info.overrides, dict),
            "class_names": all(isinstance(name, str) for name in info.class_names)
            and len(info.class_names) in (0, info.num_classes),
            "pixels": all(isinstance(px, int) and 0 < px <= 16384 for px in (info.train_px, info.eval_px)),
            "eval_crop": info.eval_crop in get_args(EvalCrop),
            "crop_fraction": isinstance(info.crop_fraction, int | float) and 0 < info.crop_fraction <= 1,
            "trained_on": all(isinstance(key, str) for key in info.trained_on),
            "category_ids": all(isinstance(number, int) for number in info.category_ids)
            and len(info.category_ids) in (0, info.num_classes),
            "mean and std": len(info.mean) == len(info.std) == info.in_channels and min(info.std) > 0,
        }
        bad = [name for name, good in checks.items() if not good]
        if bad:
            raise ValueError(f"impossible {', '.join(bad)}")
        return info


def some(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names as a list for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def spelled(options: Mapping[str, Any]) -> str:
    """Options as a list for a message."""
    return ", ".join(f"{key}={value}" for key, value in options.items())


@dataclass
class Report:
    """What became of every tensor of a foreign file, by our name, or by the file's if we have none."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def named(names: list[str]) -> str:
            return f" ({some(names)})" if names else ""

        return (
            f"{len(self.matched)} tensors matched, {len(self.missing)} missing{named(self.missing)}, "
            f"{len(self.unexpected)} unexpected{named(self.unexpected)}, "
            f"{len(self.reshaped)} of another shape{named(self.reshaped)}"
        )

    @property
    def complete(self) -> bool:
        """Whether all names and shapes agree."""
        return not (self.missing or self.unexpected or self.reshaped)


def difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Names the first tensor whose name or shape differs between two state dicts and counts the others; "" for none."""
    wrong = sorted(expected.keys() ^ state.keys()) or [
        key for key in expected if expected[key].shape != state[key].shape
    ]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"tensor {wrong[0]!r}{more} differs" if wrong else ""


class Zoo(NamedTuple):
    """What readers need to know about the networks that files may be for.

    `depths`: architecture -> blocks in each stage. `outline`: the network with the given architecture, number of
    classes, input channels and options, on the meta device, with its `info`.
    """

    depths: Mapping[str, tuple[int, ...]]
    outline: Callable[[str, int, int, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Weights:
    """The content of a weight file of any kind, under our names.

    A file that is not ours has a `report`, and the `network` on the meta device whose names and shapes `state` has.
    `notes` are lines for the user.
    """

    state: dict[str, Tensor]
    info: ModelInfo
    report: Report | None = None
    notes: tuple[str, ...] = ()
    network: Any = None


def write_weights(path: str | os.PathLike, state: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Writes a file of ours, whole or not at all. InputError for a header that could not be read back."""
    try:
        metadata = info.to_metadata()
        ModelInfo.from_metadata(metadata)
    except (ValueError, TypeError) as error:
        raise InputError(f"cannot write {path}: its header would be unreadable ({error})") from None
    if any(value.is_meta for value in state.values()):
        raise InputError(f"cannot write {path}: the network is on the device meta, where tensors hold no numbers")
    # copies, because safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    write_tensors(path, tensors, metadata)


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all. Errors are those of `replacing`."""
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(*([int(code[1]), ""] if code else [one_line(error)])) from None


def file_kind(path: str | os.PathLike) -> Literal["normfree", "safetensors", "torch", "haiku"]:
    """The format of a weight file, from its first bytes and header; "normfree", whose reader refuses it, for none."""
    with open(path, "rb") as file:
        start = file.read(len(OLD_TORCH))
    # safetensors' first eight bytes are the length of its header, and may look like anything
    if int.from_bytes(start[:8], "little") >= os.path.getsize(path):
        if start[:2] == b"PK" or start == OLD_TORCH:
            return "torch"
        if start[:1] == b"\x80":
            return "haiku"
    try:
        with safe_open(path, framework="pt") as file:
            return "normfree" if KEY in (file.metadata() or {}) else "safetensors"
    except SafetensorError:
        return "normfree"


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], ModelInfo]:
    """State dict on the CPU and header of a file of ours; InputError in one line for anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weight file {str(path)!r}" + (" (that is a folder)" if path.is_dir() else ""))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copies are aligned as torch's own memory is; sums over tensors that are not differ in the last bit
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        reason = one_line(error)
        raise InputError(f"{path} is damaged or not a safetensors file ({reason})") from None
    try:
        return state, ModelInfo.from_metadata(metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has a header that cannot be used: {error}") from None
