"""Sharpness-aware minimization (Foret, Kleiner, Mobahi, Neyshabur 2020, arXiv 2010.01412; NFNets: appendix A.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normfree.config import InputError
from normfree.optim.agc import is_sharded, local, wide


def ascent_size(batch_size: int, fraction: float = 0.2) -> int:
    """How many images of a batch the ascent takes; the paper's 20 % cost 20 to 40 % of a step instead of 100 %."""
    if not 0 < fraction <= 1:
        raise InputError(f"SAM's fraction {fraction}: more than 0, at most 1; the paper's is 0.2")
    return max(1, math.ceil(fraction * batch_size))


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, of sharded ones over all their shards; scalar, float32 at least."""
    kinds: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault(_shard_groups(t) if is_sharded(t) else (), []).append(local(t))
    total = torch.zeros((), device=tensors[0].device)
    for groups, parts in kinds.items():
        norms = [torch.linalg.vector_norm(part, dtype=wide(part.dtype)) for part in parts]
        square = torch.stack(norms).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    return total.sqrt()


def _shard_groups(t: Any) -> tuple:
    from torch.distributed.tensor import Shard

    return tuple(t.device_mesh.get_group(dim) for dim, place in enumerate(t.placements) if isinstance(place, Shard))


class SAM:
    """Takes the gradient not where the weights are but uphill from there, at W + ρ g / ‖g‖, g the gradient at W.

        sam = SAM(optimizer, rho=0.05)
        part = ascent_size(len(images))                    # of the same batch: another one gives nothing (A.4)
        loss(images[:part], labels[:part]).backward()
        sam.ascend()                                       # weights move up, gradients are emptied
        loss(images, labels).backward()
        sam.restore()                                      # weights as they were, bit for bit
        optimizer.step()

    Works with any optimizer and with AGC, which clips the second gradient. Micro-batches: accumulate gradients before
    `ascend`, and again before `restore`. A GradScaler needs nothing: scale both losses, `scaler.step(optimizer)`; the
    ascent does not depend on the scale, and an overflow in either gradient makes the step be skipped. DDP: compute the
    first gradient under `model.no_sync()`, so that every rank climbs by its own, which the paper found best. FSDP2
    shards gradients as it averages them, so there all ranks climb by the same.

    Args:
        optimizer: whose parameters move.
        rho: length ρ of the ascent over all parameters, at least 0; the paper's is 0.05 in fine-tuning.

    Raises:
        InputError: ρ out of range; `ascend` twice, or `restore` or a step without `ascend` before or `restore` after.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float = 0.05):
        if not (rho >= 0 and math.isfinite(rho)):
            raise InputError(f"rho {rho}: a number of at least 0; the paper's is 0.05")
        self.optimizer, self.rho = optimizer, rho
        self._kept: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._kept:
            raise InputError("call restore() before the optimizer's step: the weights are still uphill")

    @torch.no_grad()
    def ascend(self) -> Tensor:
        """Moves the parameters that have a gradient, keeps what they were, empties the gradients; returns ‖g‖."""
        if self._kept:
            raise InputError("ascend() was called twice without restore() between")
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            raise InputError("ascend() needs gradients: call backward() before")
        norm = global_norm([p.grad for p in params])
        for p in params:
            own = local(p)
            self._kept.append((own, own.clone()))
            own.add_((local(p.grad) * (self.rho / norm.clamp(min=1e-12))).to(own.dtype))
            p.grad = None
        return norm

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the parameters back to the same bits."""
        if not self._kept:
            raise InputError("restore() needs ascend() before")
        for own, kept in self._kept:
            own.copy_(kept)
        self._kept = []

    def step(self, ascent: Callable[[], Any], descent: Callable[[], Any]) -> Any:
        """All of it: the two closures compute a loss and its gradient, on a part of the batch and on the whole.

        Returns what `descent` returns.
        """
        self.optimizer.zero_grad()
        ascent()
        self.ascend()
        try:
            loss = descent()
        finally:
            self.restore()
        self.optimizer.step()
        return loss
