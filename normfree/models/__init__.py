"""The zoo: names -> networks, and networks <-> weight files."""

from __future__ import annotations

import os
from typing import Any

from normfree.models.files import from_weights, load, save
from normfree.models.network import FeatureInfo, Network
from normfree.models.nfnet import NFNet
from normfree.models.table import TABLE, build, find_variant, list_models, our_words

__all__ = [
    "TABLE",
    "FeatureInfo",
    "NFNet",
    "Network",
    "create_model",
    "find_variant",
    "from_weights",
    "list_models",
    "load",
    "save",
]


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
        num_classes: 0 for pooled features without a classifier.
        weights: a file that `save` wrote for the same architecture, a run folder, a released file (`F0_haiku.npz` …),
            a timm `.safetensors` or `.pth`, a checkpoint or state dict of one of our networks, or "hf://owner/name".
            Options in the file apply. Its classifier is kept if `num_classes` agrees, and its first convolution is
            adapted if `in_channels` differs.
        overrides: options of the network's class, such as `width`, `depth`, `drop_rate`, `second_conv`,
            `features_only`; None keeps the value of the file or the variant. timm's `in_chans` and `drop_path_rate`
            are accepted for `in_channels` and `stochastic_depth`.

    Raises:
        InputError: unknown name or option, impossible value, weights of another architecture.

    Example:
        >>> model = create_model("nfnet_nano", num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    overrides = our_words({"in_channels": None if in_channels == 3 else in_channels} | overrides)
    in_channels = overrides.pop("in_channels", 3)
    if weights is None:
        return build(name, num_classes, in_channels, overrides)
    return from_weights(name, num_classes, in_channels, weights, overrides)[0]
