"""The update of all parameters in one pass through memory, on CPUs (native/sweep.cpp).

Without the kernels, the batched operations of agc.py, sgd.py and ema.py compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from normfree.native import library

CHUNK = 16384  # elements in a unit of a parameter that is not clipped
ITEM = np.dtype(
    [(name, np.uint64) for name in ("p", "g", "m", "e")]
    + [(name, np.int64) for name in ("numel", "unit")]
    + [(name, np.float32) for name in ("clipping", "eps", "lr", "momentum", "decay", "blend")]
    + [("nesterov", np.int32), ("pad", np.int32), ("clipped", np.float64), ("ratio", np.float64)]
)


@dataclass
class Item:
    """The clipping and the update of one parameter; without a momentum buffer `m`, the clipping alone."""

    p: Tensor
    g: Tensor
    whole: bool  # one unit; otherwise each index of dimension 0 is one
    clipping: float | None
    eps: float
    m: Tensor | None = None
    e: Tensor | None = None
    lr: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    blend: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the sweep supports it: dense float32 on the CPU, contiguous units, equal strides in all tensors."""
        p = self.p
        shape, stride = p.shape, () if p.is_sparse else p.stride()
        for t in (p, self.g, self.m, self.e):  # a plain loop is fastest: it runs for each parameter in each step
            if t is not None and (
                t.device.type != "cpu"
                or t.dtype != torch.float32
                or t.is_sparse
                or t.shape != shape
                or (t.stride() != stride and t.numel())
            ):
                return False
        return p.is_contiguous() or p.permute(0, *sorted(range(1, p.ndim), key=p.stride)[::-1]).is_contiguous()


def sweep(items: Sequence[Item]) -> Tensor:
    """Clips and updates N items, which must all fit; returns counts of clipped units and largest ratios, (2, N)."""
    rows = []
    for item in items:
        numel = item.p.numel()
        unit = CHUNK if item.clipping is None else numel if item.whole else numel // max(1, item.p.shape[0])
        pointers = (0 if t is None else t.data_ptr() for t in (item.p, item.g, item.m, item.e))
        rates = (item.clipping or 0.0, item.eps, item.lr, item.momentum, item.weight_decay, item.blend)
        rows.append((*pointers, numel, max(1, unit), *rates, item.nesterov, 0, 0, 0))
    table = np.array(rows, ITEM)
    native = library()
    assert native is not None
    native.normfree_sweep(table.ctypes.data, len(items), torch.get_num_threads())
    return torch.from_numpy(np.stack([table["clipped"], table["ratio"]]).astype(np.float32))
