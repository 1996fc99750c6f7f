"""This rank's part of sharded parameters: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from normfree._compat import first_row
from normfree.errors import InputError

T = TypeVar("T")


def is_sharded(t: Any) -> bool:
    """Whether `t` is a DTensor."""
    if type(t) in (torch.nn.Parameter, Tensor) or not (dist.is_available() and dist.is_initialized()):
        return False  # the cheap checks come first: this runs for each parameter in each step
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def local(t: Any) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return t.to_local() if is_sharded(t) else t


def shard_groups(t: Any) -> list[tuple[Any, int]]:
    """The process groups over which a tensor is sharded, each with the dimension that it splits."""
    if not is_sharded(t):
        return []
    from torch.distributed.tensor import Shard

    return [(t.device_mesh.get_group(i), at.dim) for i, at in enumerate(t.placements) if isinstance(at, Shard)]


def first_local_row(p: Any) -> int:
    """The index in a DTensor of the first row that this rank has; InputError if its gradient is sharded otherwise."""
    from torch.distributed.tensor import Partial

    if p.grad.placements != p.placements or any(isinstance(at, Partial) for at in p.placements):
        raise InputError(f"a gradient placed as {p.grad.placements} does not fit a parameter placed as {p.placements}")
    return first_row(p)


def by_groups(pairs: Iterable[tuple[tuple[Any, ...], T]]) -> dict[tuple[Any, ...], list[T]]:
    """Collects pairs of (process groups, value) into a list of values for each tuple of process groups."""
    values: dict[tuple[Any, ...], list[T]] = {}
    for groups, value in pairs:
        values.setdefault(groups, []).append(value)
    return values
