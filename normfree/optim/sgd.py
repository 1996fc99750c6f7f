"""The authors' optimizer: AGC, coupled weight decay, Nesterov momentum (released code: optim.py, SGD_AGC)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from normfree.errors import InputError
from normfree.optim.agc import AGCStats, Piece, clip_pieces_, local, piece_of
from normfree.optim.ema import EMA, blend_
from normfree.optim.groups import CLIPPING_KEYS, Default, as_groups, check_given, clipping_of, keep_missing, plain


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
    """One batched step over all tensors; overwrites `params`, `momenta`, and `grads`, which may be of another dtype.

    d = g + weight_decay * p;   m <- momentum * m + d;   p <- p - lr * (d + momentum * m  if nesterov else  m)

    `hold`: bool scalar on the device; where it is true, parameters and momenta stay as they are, whatever the
    gradients are.
    """
    # Decay and momentum are added to the gradients, so these are made at least as precise as the parameters.
    pairs = zip(params, grads, strict=True)
    grads = [g if g.dtype == p.dtype else g.to(torch.promote_types(g.dtype, p.dtype)) for p, g in pairs]
    if hold is not None:
        options: dict[str, Any] = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        alike = all(p.stride() == g.stride() == m.stride() for p, g, m in zip(params, grads, momenta, strict=True))
        if momentum and alike and len({t.dtype for t in (*params, *grads, *momenta)}) == 1:  # as the kernel needs them
            extra: dict[str, Any] = dict(dampening=0.0, maximize=False, is_first_step=False, found_inf=hold.float())
            torch._fused_sgd_(params, grads, momenta, **options, **extra)
            return
        kept = [t.clone() for t in (*params, *momenta)]
        sgd_step_(params, grads, momenta, **options)
        for t, old in zip((*params, *momenta), kept, strict=True):
            t.copy_(torch.where(hold, old, t))
        return
    if weight_decay:
        torch._foreach_add_(grads, params, alpha=weight_decay)
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    if nesterov:
        torch._foreach_add_(grads, momenta, alpha=momentum)
    torch._foreach_add_(params, grads if nesterov else momenta, alpha=-lr)


_OWN_KEYS = ("lr", "momentum", "nesterov", "weight_decay", *CLIPPING_KEYS)


class SGD_AGC(torch.optim.Optimizer):
    """SGD with Nesterov momentum, weight decay added to the gradient, and adaptive gradient clipping before both.

    Gradients are consumed: after `step` their values are not the gradients any more. Sparse ones (of
    `Embedding(sparse=True)`) are taken as torch.optim.SGD takes them: without weight decay, and the momentum moves the
    rows of earlier steps on. Parameters and momenta keep their dtype, so bfloat16 weights stand still where an update
    is less than 1/256 of them, as they do in torch.optim.SGD; keep them in float32 and use autocast.

    Args:
        params: parameters or groups; a group may set any of the options, ε as `clip_eps`. `param_groups(model)` makes
            the authors'.
        lr: learning rate, a number or a tensor of one; the paper's peak is 0.1 * batch / 256.
        weight_decay: coupled, not multiplied by the learning rate schedule on its own.
        clipping: λ of AGC; None clips nothing.
        eps: ε of AGC.

    `load_state_dict` takes states of torch.optim.SGD, too; options that a state lacks stay as they are.

    Attributes:
        stats: `AGCStats` of the last step.

    Raises:
        InputError: a negative rate, a momentum outside [0, 1), Nesterov without momentum, λ, ε or units out of range;
            a weight decay, λ or ε given though all groups have others of their own; misspelt keys in groups.
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
        check_given(groups, weight_decay=weight_decay, clipping=clipping, clip_eps=eps)
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=plain(weight_decay))
        super().__init__(groups, defaults | dict(clipping=plain(clipping), clip_eps=plain(eps)))
        self.stats = AGCStats()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group = _renamed(param_group)
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by torch with what is to be loaded, a copy or a pickle; `state` is by parameter already."""
        for p, kept in state["state"].items():
            if other := ", ".join(sorted(kept.keys() - {"momentum_buffer"})):
                raise InputError(f"this state is of another optimizer, which keeps {other}")
            momentum = kept.get("momentum_buffer")
            if momentum is not None and momentum.shape != p.shape:
                raise InputError(f"a momentum of {tuple(momentum.shape)} does not fit a weight of {tuple(p.shape)}")
        groups = [_renamed(group) for group in state["param_groups"]]
        groups = keep_missing(groups, getattr(self, "param_groups", ()), _OWN_KEYS)
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
        """One update. With `ema`, its `update(ema_step)` too, which on a CPU costs little more in the same pass.

        `hold`: bool scalar on the parameters' device; where it is true the step is not made, and the host need not wait
        for it.
        """
        if (ema is None) != (ema_step is None):
            raise InputError("ema and ema_step, the number of the step from 0, are given together")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hold is not None and hold.device.type == "cpu":  # where asking is free
            if hold:
                return loss
            hold = None
        averages = {} if ema is None else ema.averages()
        blend = 0.0 if ema is None or ema_step is None else 1 - ema.decay_at(ema_step)
        pieces: list[Piece] = []
        updates: list[dict[str, Any]] = []
        spans: list[tuple[range, dict[str, Any]]] = []  # pieces of each group, by number, and its options
        for group in self.param_groups:
            start, clipping = len(pieces), _check(group)
            options = {name: float(group[name]) for name in ("lr", "momentum", "weight_decay")}
            options["nesterov"] = group["nesterov"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse and options["weight_decay"]:
                    what = "weight decay would move all rows of a parameter with sparse gradients"
                    raise InputError(f"{what}: give it a group with weight_decay 0, or dense gradients (sparse=False)")
                pieces.append(piece_of(p, *clipping, dense=True))
                state = self.state[p]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
                updates.append(options | {"m": local(state["momentum_buffer"]), "e": averages.get(p), "blend": blend})
            spans.append((range(start, len(pieces)), options))
        self.stats, swept = clip_pieces_(pieces, updates)
        for i in swept:
            averages.pop(pieces[i].param, None)
        for span, options in spans:
            if rest := [i for i in span if i not in swept]:
                weights, grads = [pieces[i].weight for i in rest], [pieces[i].grad for i in rest]
                sgd_step_(weights, grads, [updates[i]["m"] for i in rest], **options, hold=hold)
        blend_(averages, blend)
        return loss


def _renamed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group, with ε by the name of today: it was "eps", which is Adam's in groups that torch has filled."""
    group = dict(group)
    if "eps" in group and "foreach" not in group and group.setdefault("clip_eps", group["eps"]) != group.pop("eps"):
        raise InputError("a parameter group has both clip_eps and eps, its former name, and they differ")
    return group


def _check(group: Mapping[str, Any]) -> tuple:
    """What `clipping_of` says of the group; InputError for options out of range."""
    clipping = clipping_of(group, ours=_OWN_KEYS)
    if not (0 <= group["lr"] < math.inf and 0 <= group["weight_decay"] < math.inf and 0 <= group["momentum"] < 1):
        raise InputError("lr and weight_decay are at least 0 and finite, momentum lies in [0, 1)")
    if group["nesterov"] and not group["momentum"]:
        raise InputError("Nesterov momentum needs a momentum above 0")
    for name in ("dampening", "maximize", "differentiable"):
        if group.get(name):
            raise InputError(f"SGD_AGC has no {name}: torch.optim.SGD with AGC attached does")
    return clipping
