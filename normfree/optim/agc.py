"""Adaptive gradient clipping (paper section 4; released code: optim.py, agc_optax.py).

    for every unit i:   G_i <- G_i * min(1, λ * max(‖W_i‖, ε) / ‖G_i‖)

A unit is one output channel of a convolution or linear layer (dimension 0), and the whole of a bias, gain or scalar.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfree.config import InputError

MIN_GRADIENT_NORM = 1e-6  # in the divisor only, as in the released code


def is_vector(parameter: Tensor) -> bool:
    """Whether AGC takes the whole of `parameter` as one unit: at most one dimension is longer than 1.

    So is a gain of shape (C, 1, 1, 1) as some libraries store it; the released code squeezes too.
    """
    return sum(size > 1 for size in parameter.shape) <= 1


def num_units(parameter: Tensor) -> int:
    return 1 if is_vector(parameter) else parameter.shape[0]


def unitwise_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of each unit, broadcastable against `tensor`: (out, 1, ..., 1), or shape () for vectors."""
    if is_vector(tensor):
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


def adaptive_clip_reference_(parameter: Tensor, grad: Tensor, clipping: float, eps: float = 1e-3) -> Tensor:
    """The rule above, one tensor at a time and as it is written; returns the mask of clipped units."""
    limit = clipping * unitwise_norm(parameter).clamp(min=eps)
    norm = unitwise_norm(grad)
    clipped = norm > limit
    grad.copy_(torch.where(clipped, grad * (limit / norm.clamp(min=MIN_GRADIENT_NORM)), grad))
    return clipped


@dataclass(frozen=True)
class AGCStats:
    """What one clipping did. Everything stays on the device until it is asked for as a number.

    Attributes:
        num_units: units that were looked at.
        clipped: tensor (), how many of them were clipped.
        max_ratio: tensor (), the largest ‖G_i‖ / max(‖W_i‖, ε) before clipping; not finite if a gradient was not.
    """

    num_units: int
    clipped: Tensor
    max_ratio: Tensor

    @property
    def clipped_fraction(self) -> float:
        """Share of units that were clipped, in [0, 1]; waits for the device."""
        return self.clipped.item() / self.num_units if self.num_units else 0.0


def _batched_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of all units of all tensors in one vector: (sum of num_units,), in the order of `tensors`."""
    whole = [is_vector(t) for t in tensors]
    vectors = iter(torch._foreach_norm([t for t, w in zip(tensors, whole, strict=True) if w]) if any(whole) else ())
    parts = [
        next(vectors).view(1) if w else torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)))
        for t, w in zip(tensors, whole, strict=True)
    ]
    return torch.cat(parts)


def clip_tensors_(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float = 1e-3) -> AGCStats:
    """Clips `grads` in place against `params`: one vector of norms, one vector of factors, one batched product."""
    if not params:
        return AGCStats(0, torch.zeros(()), torch.zeros(()))
    weight_norms = _batched_norms(params).clamp_(min=eps)
    grad_norms = _batched_norms(grads)
    limits = weight_norms * clipping
    clipped = grad_norms > limits
    factors = torch.where(clipped, limits / grad_norms.clamp(min=MIN_GRADIENT_NORM), 1.0)
    views = [
        factor.view([-1] + [1] * (p.ndim - 1)) if not is_vector(p) else factor.view(())
        for factor, p in zip(factors.split([num_units(p) for p in params]), params, strict=True)
    ]
    torch._foreach_mul_(list(grads), views)
    return AGCStats(factors.numel(), clipped.sum(), (grad_norms / weight_norms).max())


def merge_stats(stats: Iterable[AGCStats]) -> AGCStats:
    """Sums counts and takes the largest ratio."""
    stats = [s for s in stats if s.num_units]
    if not stats:
        return AGCStats(0, torch.zeros(()), torch.zeros(()))
    return AGCStats(
        sum(s.num_units for s in stats),
        torch.stack([s.clipped for s in stats]).sum(),
        torch.stack([s.max_ratio for s in stats]).max(),
    )


def check_clipping(clipping: float | None, eps: float) -> None:
    if clipping is not None and not (clipping > 0 and math.isfinite(clipping)):
        raise InputError(f"clipping {clipping}: a positive number, or None to leave a group unclipped")
    if not eps > 0:
        raise InputError(f"eps {eps}: a positive number; the paper's is 1e-3")


def as_groups(params_or_groups: Any, clipping: float | None, eps: float) -> list[dict]:
    """A tensor, tensors, or optimizer groups -> groups that all have `params`, `clipping` and `eps`."""
    if isinstance(params_or_groups, Tensor):
        params_or_groups = [params_or_groups]
    items = list(params_or_groups)
    if not items or not isinstance(items[0], dict):
        items = [{"params": items}]
    groups: list[dict[str, Any]] = [{"clipping": clipping, "eps": eps} | group for group in items]
    for group in groups:
        check_clipping(group["clipping"], group["eps"])
    return groups


@torch.no_grad()
def adaptive_clip_grad_(
    params_or_groups: Tensor | Iterable[Tensor] | Iterable[dict], clipping: float = 0.01, eps: float = 1e-3
) -> AGCStats:
    """Clips the gradients of parameters in place, unit by unit, as `torch.nn.utils.clip_grad_norm_` does globally.

    Call it once per optimizer step, on gradients that are summed over micro-batches, synchronised and unscaled.

    Args:
        params_or_groups: parameters, or optimizer groups; a group's own `clipping` (None: left alone) and `eps` win.
            Parameters without a gradient are passed over. Leave the classifier weight out (paper 4.1): `param_groups`.
        clipping: λ > 0, the largest ratio of gradient norm to weight norm; 0.01 suits batches of 1024 to 4096.
        eps: ε > 0, the smallest weight norm that is believed, so that zero-initialised parameters can move.

    Raises:
        InputError: λ or ε out of range.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> adaptive_clip_grad_(layer.parameters(), clipping=0.01).clipped_fraction
        1.0
    """
    stats = []
    for group in as_groups(params_or_groups, clipping, eps):
        if group["clipping"] is not None:
            params = [p for p in group["params"] if p.grad is not None]
            stats.append(clip_tensors_(params, [p.grad for p in params], group["clipping"], group["eps"]))
    return merge_stats(stats)


class AGC:
    """Puts adaptive gradient clipping in front of any torch optimizer's step.

        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> agc = AGC(optimizer, clipping=0.01)      # from now on optimizer.step() clips first
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> agc.stats.clipped_fraction               # of the last step
        1.0
        >>> agc.detach()                             # the optimizer as it was

    A group of the optimizer may carry its own `clipping`, None to be left alone (`param_groups` writes them).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clipping: float = 0.01, eps: float = 1e-3):
        check_clipping(clipping, eps)
        self.clipping, self.eps = clipping, eps
        self.stats = merge_stats([])
        self._handle = optimizer.register_step_pre_hook(self._clip)

    def _clip(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        groups = [{k: g[k] for k in ("params", "clipping") if k in g} for g in optimizer.param_groups]
        self.stats = adaptive_clip_grad_(groups, self.clipping, self.eps)

    def detach(self) -> None:
        self._handle.remove()
