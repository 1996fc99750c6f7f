"""The authors' optimizer: AGC, coupled weight decay, Nesterov momentum (released code: optim.py, SGD_AGC)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from normfree._compat import fused_sgd_
from normfree.errors import InputError
from normfree.optim.agc import AGCStats, LocalParam, clip_local_params_, local_param
from normfree.optim.ema import EMA, blend_
from normfree.optim.groups import (
    CLIPPING_KEYS,
    Default,
    as_groups,
    check_arguments,
    check_keys,
    clipping_settings,
    fill_missing,
    plain,
)
from normfree.optim.shards import local


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    hold: Tensor | None = None,
) -> None:
    """One batched step over all tensors; overwrites `params`, `momenta` and `grads`, whose dtypes may differ.

    d = g + weight_decay * p;   m <- momentum * m + d;   p <- p - lr * (d + momentum * m  if nesterov else  m)

    `hold` is a bool scalar on the device. If it is true, parameters and momenta do not change.
    """
    # Decay and momentum are added to the gradients, so gradients get at least the precision of the parameters.
    pairs = zip(params, grads, strict=True)
    grads = [g if g.dtype == p.dtype else g.to(torch.promote_types(g.dtype, p.dtype)) for p, g in pairs]
    if hold is not None:
        options: dict[str, Any] = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        same_strides = all(
            p.stride() == g.stride() == m.stride() for p, g, m in zip(params, grads, momenta, strict=True)
        )
        one_dtype = len({t.dtype for t in (*params, *grads, *momenta)}) == 1
        if fused_sgd_ and momentum and same_strides and one_dtype:  # the kernel's terms
            extra: dict[str, Any] = dict(dampening=0.0, maximize=False, is_first_step=False, found_inf=hold.float())
            fused_sgd_(params, grads, momenta, **options, **extra)
            return
        before = [t.clone() for t in (*params, *momenta)]
        sgd_step_(params, grads, momenta, **options)
        for t, old in zip((*params, *momenta), before, strict=True):
            t.copy_(torch.where(hold, old, t))
        return
    if weight_decay:
        torch._foreach_add_(grads, params, alpha=weight_decay)
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    if nesterov:
        torch._foreach_add_(grads, momenta, alpha=momentum)
    torch._foreach_add_(params, grads if nesterov else momenta, alpha=-lr)


_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay", *CLIPPING_KEYS)


class SGD_AGC(torch.optim.Optimizer):
    """SGD with adaptive gradient clipping, then weight decay (added to the gradient), then Nesterov momentum.

    `step` overwrites the gradients. Sparse gradients (of `Embedding(sparse=True)`) behave as in torch.optim.SGD: they
    allow no weight decay, and momentum keeps moving the rows of earlier steps. Parameters and momenta keep their dtype,
    so a bfloat16 weight does not change if its update is less than 1/256 of it; keep weights in float32 and use
    autocast. `load_state_dict` also loads states of torch.optim.SGD; options that a state lacks stay as they are.

    Args:
        params: parameters or groups. `param_groups(model)` returns the authors' groups; a group may set any option,
            with ε as `clip_eps`.
        lr: learning rate, a number or a scalar tensor; the paper's peak is 0.1 * batch / 256.
        momentum: in [0, 1).
        weight_decay: at least 0; the decay is scaled by the learning rate, as the gradient is.
        clipping: λ > 0 of AGC; None clips nothing.
        eps: ε > 0 of AGC.

    Attributes:
        stats: `AGCStats` of the last step.

    Raises:
        InputError: an option out of range; Nesterov without momentum; a weight decay, λ or ε given although all groups
            set others; a misspelt key in a group.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = Default(2e-5),
        clipping: float | None = Default(0.01),
        eps: float = Default(1e-3),
    ):
        groups = [_renamed(group) for group in as_groups(params)]
        check_arguments(groups, weight_decay=weight_decay, clipping=clipping, clip_eps=eps)
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=plain(weight_decay))
        super().__init__(groups, defaults | dict(clipping=plain(clipping), clip_eps=plain(eps)))
        self.stats = AGCStats()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may set any option; InputError for an option out of range."""
        param_group = _renamed(param_group)
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch calls this to load a state, to copy and to unpickle; `state["state"]` is keyed by parameter."""
        for p, buffers in state["state"].items():
            if others := ", ".join(sorted(buffers.keys() - {"momentum_buffer"})):
                raise InputError(f"this state is of another optimizer, which keeps {others}")
            momentum = buffers.get("momentum_buffer")
            if momentum is not None and momentum.shape != p.shape:
                raise InputError(f"a momentum of {tuple(momentum.shape)} does not fit a weight of {tuple(p.shape)}")
        groups = [_renamed(group) for group in state["param_groups"]]
        groups = fill_missing(groups, getattr(self, "param_groups", ()), _OPTIONS)
        for group in groups:
            _check(group)
        super().__setstate__(state | {"param_groups": groups})
        self.stats = AGCStats()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        ema: EMA | None = None,
        ema_step: int | None = None,
        hold: Tensor | None = None,
    ) -> float | None:
        """Updates the parameters, and `ema` if one is given; returns the closure's loss.

        On a CPU the average is updated in the same pass over memory. `hold` is a bool scalar on the parameters' device:
        if it is true, nothing changes. The host does not wait for it on a GPU.
        """
        if (ema is None) != (ema_step is None):
            raise InputError("ema and ema_step (the number of the step, from 0) must be given together")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hold is not None and hold.device.type == "cpu":  # reading it does not wait
            if hold:
                return loss
            hold = None
        averages = {} if ema is None else ema.averages()
        blend = 0.0 if ema is None or ema_step is None else 1 - ema.decay_at(ema_step)
        params: list[LocalParam] = []
        updates: list[dict[str, Any]] = []
        ranges: list[tuple[range, dict[str, Any]]] = []  # for each group, its indices in `params`, and its options
        for group in self.param_groups:
            start, clipping = len(params), _check(group)
            options = {name: float(group[name]) for name in ("lr", "momentum", "weight_decay")}
            options["nesterov"] = group["nesterov"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse and options["weight_decay"]:
                    why = "weight decay would move all rows of a parameter with sparse gradients"
                    raise InputError(f"{why}: give it a group with weight_decay 0, or dense gradients (sparse=False)")
                params.append(local_param(p, *clipping, dense=True))
                state = self.state[p]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
                updates.append(options | {"m": local(state["momentum_buffer"]), "e": averages.get(p), "blend": blend})
            ranges.append((range(start, len(params)), options))
        self.stats, updated = clip_local_params_(params, updates)
        for i in updated:
            averages.pop(params[i].param, None)
        for indices, options in ranges:
            if pending := [i for i in indices if i not in updated]:
                weights, grads = [params[i].weight for i in pending], [params[i].grad for i in pending]
                sgd_step_(weights, grads, [updates[i]["m"] for i in pending], **options, hold=hold)
        blend_(averages, blend, hold)
        return loss


def _renamed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group with ε under its present name; it was "eps", which is Adam's ε in groups that torch filled."""
    group = dict(group)
    if "eps" in group and "foreach" not in group and group.setdefault("clip_eps", group["eps"]) != group.pop("eps"):
        raise InputError("a parameter group has both clip_eps and eps, its former name, and they differ")
    return group


def _check(group: Mapping[str, Any]) -> tuple:
    """The `clipping_settings` of a group; InputError for an option out of range or a misspelt key."""
    check_keys(frozenset(group), _OPTIONS)
    clipping = clipping_settings(group)
    if not (0 <= group["lr"] < math.inf and 0 <= group["weight_decay"] < math.inf and 0 <= group["momentum"] < 1):
        raise InputError("lr and weight_decay must be finite and at least 0, momentum in [0, 1)")
    if group["nesterov"] and not group["momentum"]:
        raise InputError("Nesterov momentum needs a momentum above 0")
    for name in ("dampening", "maximize", "differentiable"):
        if group.get(name):
            raise InputError(f"SGD_AGC has no {name} option: use torch.optim.SGD with AGC")
    return clipping
