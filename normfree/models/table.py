"""The table of networks: name -> class and variant, and the builder."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from normfree.errors import InputError, nearest
from normfree.models import bn_resnet, nf_regnet, nf_resnet, nfnet
from normfree.models.network import Network
from normfree.weights import IMAGENET_MEAN, IMAGENET_STD, ModelInfo

# name -> (class, row of its table); the fields of a row are options of the class, except those of `Variant`
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


ALIASES = {"in_chans": "in_channels", "drop_path_rate": "stochastic_depth"}  # timm's names of options
# other names in timm -> ours, for error messages
TIMM_WORDS = {
    "act_layer": "activation",
    "attn_layer": "se_ratio",
    "bottle_ratio": "bottleneck_width",
    "ch_div": "channel_divisor",
    "channels": "width",
    "checkpoint_path": "weights",
    "depths": "depth",
    "drop_path": "stochastic_depth",
    "extra_conv": "second_conv",
    "gamma_in_act": "gamma_in_conv",
    "group_size": "group_width",
    "num_features": "final_width",
    "pretrained": "weights",
    "same_padding": "padding",
    "skipinit": "skip_gain",
    "std_conv_eps": "ws_eps",
    "stem_chs": "stem_channels",
}


class Variant(Protocol):
    """What rows of all tables share: image sides, and published ImageNet top-1 at `eval_px`, or ""."""

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
    """The row of `name` in its family's table; InputError for an unknown name."""
    return _find(name)[1]


def _find(name: str) -> tuple[type[Network], Any]:
    if name not in TABLE:
        raise InputError(f"no model {name!r}{nearest(name, TABLE)}; `normfree models` lists all")
    return TABLE[name]


def _options(family: type[Network]) -> list[str]:
    """The options that `create_model` passes on to a class."""
    names = inspect.signature(family.__init__).parameters
    return [name for name in names if name not in ("self", "num_classes", "in_channels")]


def our_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` under our names instead of timm's, without those that are None, the default."""
    given: dict[str, Any] = {}
    for key, value in options.items():
        ours = ALIASES.get(key, key)
        if value is not None and given.setdefault(ours, value) != value:
            raise InputError(f"{ours} is given twice, once by timm's name: {given[ours]!r} and {value!r}")
    return given


def _unknown(name: str, key: str, known: list[str]) -> InputError:
    if key == "output_stride":
        return InputError(f"{name} has no output_stride: its strides are fixed; choose feature maps with out_indices")
    every, ours = [*known, "num_classes", "in_channels", "weights"], TIMM_WORDS.get(key)
    hint = f"; it is {ours!r} here" if ours in every else nearest(key, every)
    return InputError(f"{name} has no option {key!r}{hint}; known: {', '.join(known)}")


def defaults(name: str) -> dict[str, Any]:
    """Every option of a network, with its default value."""
    family, variant = _find(name)
    signature = inspect.signature(family.__init__).parameters
    row = asdict(variant)
    return {key: row.get(key, signature[key].default) for key in _options(family)}


def build(name: str, num_classes: int, in_channels: int, overrides: Mapping[str, Any]) -> Network:
    """A fresh network; InputError for an unknown name or option and for impossible values."""
    family, variant = _find(name)
    known = _options(family)
    unknown = next((key for key in overrides if key not in known), None)
    if unknown is not None:
        raise _unknown(name, unknown, known)
    own = {key: value for key, value in asdict(variant).items() if key in known}
    model = family(num_classes=num_classes, in_channels=in_channels, **(own | dict(overrides)))
    # ImageNet's mean and standard deviation apply to RGB only
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if in_channels == 3 else ((0.5,) * in_channels, (0.25,) * in_channels)
    model.info = ModelInfo(
        name,
        num_classes,
        in_channels,
        dict(overrides),
        train_px=variant.train_px,
        eval_px=variant.eval_px,
        mean=mean,
        std=std,
    )
    return model
