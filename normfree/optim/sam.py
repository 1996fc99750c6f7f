"""Sharpness-aware minimization (Foret, Kleiner, Mobahi, Neyshabur 2020, arXiv 2010.01412; NFNets: appendix A.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from normfree.errors import InputError
from normfree.optim.agc import is_sharded, local, wide


def ascent_size(batch_size: int, fraction: float = 0.2) -> int:
    """How many images of a batch the ascent takes; the paper's 20 % cost 20 to 40 % of a step instead of 100 %."""
    if not 0 < fraction <= 1:
        raise InputError(f"SAM's fraction {fraction}: more than 0, at most 1; the paper's is 0.2")
    return max(1, math.ceil(fraction * batch_size))


def own_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Euclidean norm of what this rank has of each; scalars on the first one's device, float64 on a CPU."""
    exact = torch.float64 if tensors[0].device.type == "cpu" else torch.float32
    norms = [torch.linalg.vector_norm(local(t), dtype=torch.promote_types(t.dtype, exact)) for t in tensors]
    return [norm.to(norms[0].device) for norm in norms]


def global_norm(tensors: list[Tensor], norms: list[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, of sharded ones over all their shards, from `own_norms`; a scalar."""
    kinds: dict[tuple, list[Tensor]] = {}
    for t, norm in zip(tensors, norms, strict=True):
        kinds.setdefault(_shard_groups(t), []).append(norm)
    total = torch.zeros((), device=norms[0].device)
    for groups, parts in kinds.items():
        square = torch.stack(parts).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    return total.sqrt()


def _shard_groups(t: Any) -> tuple:
    if not is_sharded(t):
        return ()
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
    `ascend`, and again before `restore`. GradScaler: scale both losses, `scaler.step(optimizer)`; the ascent does not
    depend on the scale. There is none along a gradient that is not finite, and `restore` puts a NaN into the second
    gradient of each parameter whose first one was not, so that the step is skipped. DDP: compute the first gradient
    under `model.no_sync()`, so that every rank climbs by its own, which the paper found best. FSDP2 shards gradients as
    it averages them, so there all ranks climb by the same.

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
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # parameters, what they were, 0 or NaN: the mark
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
        grads = [cast(Tensor, p.grad).to_dense() if p.grad.is_sparse else p.grad for p in params]
        norms = own_norms(grads)
        norm = global_norm(grads, norms)
        climbs = norm.isfinite() & (norm > 0)
        factor = self.rho / norm
        for p, grad, own_norm in zip(params, grads, norms, strict=True):
            own, g = local(p), local(grad)
            self._kept.append((p, own.clone(), own_norm * 0))  # NaN of what is not finite
            uphill = g.to(wide(g.dtype)) * factor.to(g.device)
            own.add_(torch.where(climbs.to(g.device), uphill, 0.0).to(own.dtype))
            p.grad = None
        return norm

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the parameters back to the same bits; gradients show where the first ones were not finite."""
        if not self._kept:
            raise InputError("restore() needs ascend() before")
        for p, own, _ in self._kept:
            local(p).copy_(own)
        firsts = [_first(p.grad) for p, _, _ in self._kept if p.grad is not None]
        marks = [mark for p, _, mark in self._kept if p.grad is not None]
        if firsts:
            hidden = [mark for p, _, mark in self._kept if p.grad is None]  # which another gradient shows
            marks[0] = torch.stack([marks[0], *hidden]).sum()
            torch._foreach_add_(firsts, [m.to(f.device, f.dtype) for m, f in zip(marks, firsts, strict=True)])
        self._kept = []

    def step(self, ascent: Callable[[], Any], descent: Callable[[], Any]) -> Any:
        """All of it: the closures compute loss and gradient, on a part of the batch and on all; returns `descent()`."""
        self.optimizer.zero_grad()
        ascent()
        self.ascend()
        try:
            loss = descent()
        finally:
            self.restore()
        self.optimizer.step()
        return loss


def _first(grad: Any) -> Tensor:
    """A view of the first element of what this rank has of a gradient; of nothing where there is none."""
    own = local(grad)
    own = own._values() if own.is_sparse else own
    return own[(slice(0, 1),) * own.ndim]
