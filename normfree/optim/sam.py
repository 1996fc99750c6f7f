"""Sharpness-aware minimization (Foret, Kleiner, Mobahi, Neyshabur 2020, arXiv 2010.01412; NFNets: appendix A.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from normfree._compat import stored_values
from normfree.errors import InputError
from normfree.optim.agc import at_least_float32
from normfree.optim.shards import by_groups, local, shard_groups


def ascent_size(batch_size: int, fraction: float = 0.2) -> int:
    """Number of images of a batch for the ascent, rounded up. The paper's 20 % makes a step 20 to 40 % longer."""
    if not 0 < fraction <= 1:
        raise InputError(f"SAM's fraction {fraction}: more than 0, at most 1; the paper's is 0.2")
    return max(1, math.ceil(fraction * batch_size))


def norms_of(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Euclidean norm of all tensors together, over all shards, and of this rank's part of each; float64 on a CPU."""
    exact = torch.float64 if tensors[0].device.type == "cpu" else torch.float32
    norms = [torch.linalg.vector_norm(local(t), dtype=torch.promote_types(t.dtype, exact)) for t in tensors]
    norms = [norm.to(norms[0].device) for norm in norms]
    total = torch.zeros((), device=norms[0].device)
    pairs = zip((tuple(group for group, _ in shard_groups(t)) for t in tensors), norms, strict=True)
    for groups, parts in by_groups(pairs).items():
        square = torch.stack(parts).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    return total.sqrt(), norms


class SAM:
    """Takes the gradient at W + ρ g / ‖g‖ instead of at the weights W, where g is the gradient at W.

        sam = SAM(optimizer, rho=0.05)
        part = ascent_size(len(images))                    # of the same batch: another one does not help (A.4)
        loss(images[:part], labels[:part]).backward()
        sam.ascend()                                       # moves the weights, clears the gradients
        loss(images, labels).backward()
        sam.restore()                                      # restores the weights bit for bit
        optimizer.step()

    SAM works with any optimizer and with AGC, which clips the second gradient.

    - Micro-batches: accumulate gradients before `ascend`, and again before `restore`.
    - GradScaler: scale both losses and call `scaler.step(optimizer)`; the ascent does not depend on the scale.
    - Gradients that are not finite: the weights do not move, and `restore` writes a NaN into the second gradient of
      each parameter whose first one was not finite, so that a GradScaler skips the step.
    - DDP: compute the first gradient under `model.no_sync()`, so that each rank ascends along its own gradient, which
      the paper found best. FSDP2 averages gradients as it shards them, so all ranks share one ascent.

    Args:
        optimizer: the optimizer of the parameters.
        rho: length ρ of the ascent over all parameters, at least 0; the paper fine-tunes with 0.05.

    Raises:
        InputError: ρ out of range; `ascend`, `restore` and the optimizer's step called in another order.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float = 0.05):
        if not (rho >= 0 and math.isfinite(rho)):
            raise InputError(f"rho {rho}: a number of at least 0; the paper's is 0.05")
        self.optimizer, self.rho = optimizer, rho
        # each parameter, its original values, and its mark: 0, or NaN if its first gradient was not finite
        self._originals: list[tuple[Tensor, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._originals:
            raise InputError("call restore() before the optimizer's step: the weights are still those of the ascent")

    @torch.no_grad()
    def ascend(self) -> Tensor:
        """Moves the parameters that have a gradient, and clears the gradients; returns ‖g‖, a scalar tensor."""
        if self._originals:
            raise InputError("ascend() was called twice without restore() between")
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            raise InputError("ascend() needs gradients: call backward() first")
        grads = [cast(Tensor, p.grad).to_dense() if p.grad.is_sparse else p.grad for p in params]
        norm, norms = norms_of(grads)
        moves = norm.isfinite() & (norm > 0)
        factor = self.rho / norm
        for p, grad, local_norm in zip(params, grads, norms, strict=True):
            weight, g = local(p), local(grad)
            self._originals.append((p, weight.clone(), local_norm * 0))  # infinity * 0 is NaN
            ascent = g.to(at_least_float32(g.dtype)) * factor.to(g.device)
            weight.add_(torch.where(moves.to(g.device), ascent, 0.0).to(weight.dtype))
            p.grad = None
        return norm

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the parameters bit for bit, and marks gradients with NaN if the first ones were not finite."""
        if not self._originals:
            raise InputError("restore() needs ascend() first")
        for p, weight, _ in self._originals:
            local(p).copy_(weight)
        firsts = [_first(p.grad) for p, _, _ in self._originals if p.grad is not None]
        marks = [mark for p, _, mark in self._originals if p.grad is not None]
        if firsts:
            others = [mark for p, _, mark in self._originals if p.grad is None]  # without a gradient of their own
            marks[0] = torch.stack([marks[0], *others]).sum()
            torch._foreach_add_(firsts, [m.to(f.device, f.dtype) for m, f in zip(marks, firsts, strict=True)])
        self._originals = []

    def step(self, ascent: Callable[[], Any], descent: Callable[[], Any]) -> Any:
        """One step. `ascent` and `descent` compute gradients, on part of the batch and on all; returns `descent()`."""
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
    """A view of the first element of this rank's part of a gradient; an empty view if that part is empty."""
    values = stored_values(local(grad))
    return values[(slice(0, 1),) * values.ndim]
