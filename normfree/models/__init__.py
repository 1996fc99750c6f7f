"""The zoo: names -> networks, and networks <-> weight files."""

from __future__ import annotations

import fnmatch
import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from normfree.config import InputError, nearest
from normfree.models import bn_resnet, nf_regnet, nf_resnet, nfnet
from normfree.models.network import FeatureInfo, Network
from normfree.models.nfnet import NFNet
from normfree.weights import IMAGENET_MEAN, IMAGENET_STD, ModelInfo, read_weights, write_weights
from normfree.weights.deepmind import FAMILIES, from_haiku, is_haiku_file, read_haiku

__all__ = ["FeatureInfo", "NFNet", "Network", "create_model", "find_variant", "list_models", "load", "save"]

# name -> (class, row of its table); a row's fields are options of the class, but for those of `Variant`
TABLE: dict[str, tuple[type[Network], Any]] = {
    name: (family, variant)
    for family, variants in (
        (nfnet.NFNet, nfnet.VARIANTS),
        (nfnet.NFNet, nfnet.LIGHT_VARIANTS),
        (nf_resnet.NFResNet, nf_resnet.VARIANTS),
        (nf_regnet.NFRegNet, nf_regnet.VARIANTS),
        (bn_resnet.BNResNet, bn_resnet.RESNET_VARIANTS),
        (bn_resnet.BNNFNet, bn_resnet.NFNET_VARIANTS),
    )
    for name, variant in variants.items()
}


class Variant(Protocol):
    """What every row of every table has: pixels, and ImageNet top-1 at `eval_px` as published, or nothing."""

    @property
    def train_px(self) -> int: ...
    @property
    def eval_px(self) -> int: ...
    @property
    def published(self) -> str: ...


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, filtered by a shell pattern such as `"nfnet_f*"`."""
    return fnmatch.filter(TABLE, pattern)


def find_variant(name: str) -> Variant:
    return _find(name)[1]


def _find(name: str) -> tuple[type[Network], Any]:
    if name not in TABLE:
        raise InputError(f"no model {name!r}{nearest(name, TABLE)}; `normfree models` lists all")
    return TABLE[name]


def _options(family: type[Network]) -> list[str]:
    """What `create_model` passes on to a class: its arguments but for those of its own."""
    names = inspect.signature(family.__init__).parameters
    return [name for name in names if name not in ("self", "num_classes", "in_channels")]


def create_model(
    name: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    weights: str | os.PathLike | None = None,
    **overrides: Any,
) -> Network:
    """A network of the zoo, freshly initialised or with weights.

    Args:
        name: one of `list_models()`.
        num_classes: 0 leaves the classifier out (pooled features).
        weights: a file that `save` wrote for the same architecture, or one of the authors' (`F0_haiku.npz` …). Its
            classifier is taken over where `num_classes` agrees, and stays freshly initialised where it differs.
        overrides: any option of the network's class, such as `width`, `depth`, `drop_rate`, `second_conv`,
            `features_only`; None keeps the variant's value.

    Raises:
        InputError: unknown name or option, impossible value, weights of another architecture.

    Example:
        >>> model = create_model("nfnet_nano", num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    family, variant = _find(name)
    known = _options(family)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    unknown = next((key for key in overrides if key not in known), None)
    if unknown is not None:
        raise InputError(f"{name} has no option {unknown!r}{nearest(unknown, known)}; known: {', '.join(known)}")
    own = {key: value for key, value in asdict(variant).items() if key in known}
    model = family(num_classes=num_classes, in_channels=in_channels, **(own | overrides))
    # a mean and a deviation for every input channel; ImageNet's belong to RGB
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if in_channels == 3 else ((0.5,) * in_channels, (0.25,) * in_channels)
    model.info = ModelInfo(
        name,
        num_classes,
        in_channels,
        overrides,
        train_px=variant.train_px,
        eval_px=variant.eval_px,
        mean=mean,
        std=std,
    )
    if weights is not None and is_haiku_file(weights):
        _load_haiku(model, name, weights)
    elif weights is not None:
        state, info = read_weights(weights)
        _load_state(model, state, info, weights)
        model.info = replace(info, overrides=overrides, num_classes=num_classes)
        if num_classes != info.num_classes:
            model.info = replace(model.info, class_names=())
    return model


def _load_haiku(model: Network, name: str, path: str | os.PathLike) -> None:
    """The authors' released weights; a classifier for another number of classes is left as it is."""
    family = next((family for family in FAMILIES if name.startswith(family)), None)
    if family is None:
        raise InputError(f"{path} is a haiku weight file, and there are none for {name}")
    state, report = from_haiku(read_haiku(path), model.state_dict(), family)
    wrong = [key for key in report.missing + report.reshaped if not key.startswith("head.fc.")]
    if wrong or (report.unexpected and model.out_indices is None):
        raise InputError(f"{path} does not fit {name}: {report}")
    model.load_state_dict(state, strict=False, assign=True)
    assert model.info is not None
    model.info = replace(model.info, source=f"DeepMind's {Path(path).name}")


def _load_state(model: Network, state: Mapping[str, Tensor], info: ModelInfo, path: str | os.PathLike) -> None:
    assert model.info is not None
    if info.architecture != model.info.architecture:
        raise InputError(f"{path} holds weights of {info.architecture}, not of {model.info.architecture}")
    own = model.state_dict()
    if model.num_classes != info.num_classes or model.out_indices is not None:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state |= {key: value for key, value in own.items() if key.startswith("head.")}
    if model.out_indices is not None:  # a feature extractor drops the layers it does not need
        state = {key: value for key, value in state.items() if key in own}
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{path} does not fit this {info.architecture}: tensor {wrong[0]!r}{more} differs")
    model.load_state_dict(state, assign=True)


def save(model: Network, path: str | os.PathLike, info: ModelInfo | None = None) -> None:
    """Writes `model` and `info` (default `model.info`) as one safetensors file that `load` and `predict` take."""
    info = info or model.info
    if info is None:
        raise InputError(
            "this network was not made by create_model: pass info=ModelInfo(architecture, num_classes, ...)"
        )
    write_weights(path, model.state_dict(), info)


def load(path: str | os.PathLike) -> Network:
    """The network in a file that `save` wrote, in evaluation mode on the CPU, with its header as `model.info`."""
    state, info = read_weights(path)
    try:
        with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
            model = create_model(info.architecture, info.num_classes, info.in_channels, **info.overrides)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    model.info = info
    _load_state(model, state, info, path)
    return model.eval()
