"""The authors' optimizer: AGC, coupled weight decay, Nesterov momentum (released code: optim.py, SGD_AGC)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normfree.config import InputError
from normfree.optim.agc import AGCStats, Piece, arrange, clip_pieces_, local, make_stats, piece_of
from normfree.optim.ema import EMA, blend_
from normfree.optim.groups import (
    CLIPPING_KEYS,
    Default,
    as_groups,
    check_clipping,
    check_given,
    check_names,
    keep_missing,
    plain,
)
from normfree.optim.sweep import Item, sweep


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    hold: Tensor | None = None,
) -> None:
    """One batched step over all tensors; overwrites `params`, `grads` and `momenta`.

    d = g + weight_decay * p;   m <- momentum * m + d;   p <- p - lr * (d + momentum * m  if nesterov else  m)

    `hold`: bool scalar on the device; where it is true, parameters and momenta stay as they are, whatever the
    gradients are.
    """
    params, grads, momenta = list(params), list(grads), list(momenta)
    if hold is not None:
        options: dict[str, Any] = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        if _alike([params, grads, momenta]) and momentum:
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


def _alike(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether PyTorch's fused kernel takes them: of one dtype, and the tensors of one parameter in one order."""
    return len({t.dtype for tensors in lists for t in tensors}) == 1 and all(
        t.stride() == same[0].stride() for same in zip(*lists, strict=True) for t in same
    )


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
            if isinstance(kept, Mapping) and kept.keys() - {"momentum_buffer"}:
                other = ", ".join(sorted(kept.keys() - {"momentum_buffer"}))
                raise InputError(f"this state is of another optimizer, which keeps {other}")
            momentum = kept.get("momentum_buffer") if isinstance(p, Tensor) else None
            if momentum is not None and momentum.shape != p.shape:
                raise InputError(f"a momentum of {tuple(momentum.shape)} does not fit a weight of {tuple(p.shape)}")
        groups = [_renamed(g) if "clipping" in g and "clip_eps" not in g else g for g in state["param_groups"]]
        if "param_groups" in self.__dict__:
            groups = keep_missing(groups, self.param_groups, _OWN_KEYS)
        for group in groups:
            _check(group)
        super().__setstate__(state | {"param_groups": groups})
        self.__dict__.setdefault("stats", AGCStats())

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
        pieces: list[Piece] = []  # what is clipped, in an order that is the same on all ranks
        found, order = [], []
        swept: list[tuple[int | None, Item]] = []
        batched: list[tuple[dict[str, Any], list[tuple[Piece, Tensor]]]] = []
        averages = {} if ema is None else ema.averages()
        blend = 0.0 if ema is None or ema_step is None else 1 - ema.decay_at(ema_step)
        for group in self.param_groups:
            _check(group)
            clipping, eps = group["clipping"], group["clip_eps"]
            update = {name: float(group[name]) for name in ("lr", "momentum", "weight_decay")}
            update |= {"nesterov": group["nesterov"]}
            rest: list[tuple[Piece, Tensor]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse and update["weight_decay"]:
                    raise InputError(
                        "weight decay would move all rows of a parameter with sparse gradients: give it a group of its "
                        "own with weight_decay 0, or dense gradients (sparse=False)"
                    )
                if self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                piece = piece_of(p, group.get("units", "channel"), group.get("transposed", 0))
                momentum, average = local(self.state[p]["momentum_buffer"]), averages.get(p)
                item = piece.item(clipping, eps, m=momentum, e=average, blend=blend, **update)
                if item is not None and not p.grad.is_sparse:
                    averages.pop(p, None)
                    swept.append((None if clipping is None else len(pieces), item))
                else:
                    rest.append((piece, momentum))
                    order += [] if clipping is None else [len(pieces)]
                pieces += [] if clipping is None else [piece]
            batched.append((group | update, rest))
        for options, rest in batched:
            if rest:
                found += self._batched_step([piece for piece, _ in rest], [m for _, m in rest], options, hold)
        if swept:
            columns = sweep([item for _, item in swept])
            clipped = [i for i, (place, _) in enumerate(swept) if place is not None]
            found.append(columns[:, clipped])
            order += [place for place, _ in swept if place is not None]
        blend_(averages, blend)
        self.stats = make_stats(pieces, arrange(found, order))
        return loss

    def _batched_step(
        self, pieces: list[Piece], momenta: list[Tensor], group: dict[str, Any], hold: Tensor | None
    ) -> list[Tensor]:
        """By batched operations; what `clip_pieces_` found, if it was to clip."""
        clipping = group["clipping"]
        found = [] if clipping is None else [clip_pieces_(pieces, clipping, group["clip_eps"])]
        dense = [_dense(piece) for piece in pieces]
        sgd_step_(
            [weight for weight, _ in dense],
            [grad for _, grad in dense],
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            hold=hold,
        )
        return found


def _dense(piece: Piece) -> tuple[Tensor, Tensor]:
    """Parameter and gradient: of a sparse one the piece has only the rows that are in it.

    Decay and momentum are added to gradients, so these are at least as precise as the parameter.
    """
    grad, weight = piece.grad, piece.weight
    if piece.param.grad is not None and piece.param.grad.is_sparse:
        grad, weight = piece.param.grad.to_dense(), piece.param
    return weight, grad if grad.dtype == weight.dtype else grad.to(torch.promote_types(grad.dtype, weight.dtype))


def _renamed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group, with ε by the name of today: it was "eps", which is Adam's in groups that torch has filled."""
    group = dict(group)
    if "eps" in group and "foreach" not in group and group.setdefault("clip_eps", group["eps"]) != group.pop("eps"):
        raise InputError("a parameter group has both clip_eps and eps, its former name, and they differ")
    return group


def _check(group: Mapping[str, Any]) -> None:
    check_names(frozenset(group), _OWN_KEYS)
    check_clipping(group["clipping"], group["clip_eps"], group.get("units", "channel"))
    if not (0 <= group["lr"] < math.inf and 0 <= group["weight_decay"] < math.inf and 0 <= group["momentum"] < 1):
        raise InputError("lr and weight_decay are at least 0 and finite, momentum lies in [0, 1)")
    if group["nesterov"] and not group["momentum"]:
        raise InputError("Nesterov momentum needs a momentum above 0")
    for name in ("dampening", "maximize", "differentiable"):
        if group.get(name):
            raise InputError(f"SGD_AGC has no {name}: torch.optim.SGD with AGC attached does")
