"""The zoo as a table: parameters, multiply-adds, published accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from normfree.errors import InputError, nearest
from normfree.models import create_model, find_variant, list_models


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
    )
