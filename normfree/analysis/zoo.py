"""The zoo as a table: parameters, multiply-adds, published accuracy."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from normfree.errors import InputError, nearest
from normfree.models import create_model, find_variant, list_models
from normfree.weights.timm import PUBLISHED


@dataclass(frozen=True)
class ZooRow:
    """One network with 1,000 classes; multiply-adds of one image at the training and the test side in pixels."""

    name: str
    params: int
    train_px: int
    train_macs: int
    test_px: int
    test_macs: int
    published: str
    weights: str  # where weights are published, and their licence


def zoo(pattern: str = "*") -> list[ZooRow]:
    """A row for every model whose name fits the shell pattern; InputError if none does."""
    names = list_models(pattern)
    if not names:
        raise InputError(f"no model fits {pattern!r}{nearest(pattern, list_models())}")
    return [_row(name) for name in names]


def _row(name: str) -> ZooRow:
    variant = find_variant(name)
    with torch.device("meta"):
        model = create_model(name)
    return ZooRow(
        name,
        sum(p.numel() for p in model.parameters()),
        variant.train_px,
        model.count_macs(variant.train_px),
        variant.eval_px,
        model.count_macs(variant.eval_px),
        variant.published,
        _published(name),
    )


def _published(name: str) -> str:
    """The Hub's address, the authors' file, the licence; "" if there are none."""
    if name not in PUBLISHED:
        return ""
    released = re.fullmatch(r"nfnet_f([0-6])", name)
    file = f" = F{released[1]}_haiku.npz" if released else ""
    return f"hf://{PUBLISHED[name]}{file}, Apache-2.0"
