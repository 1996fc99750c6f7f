"""The authors' optimizer: AGC, coupled weight decay, Nesterov momentum (released code: optim.py, SGD_AGC)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normfree.config import InputError
from normfree.optim.agc import AGCStats, Piece, arrange, check_clipping, clip_pieces_, local, make_stats, piece_of
from normfree.optim.ema import EMA
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


class SGD_AGC(torch.optim.Optimizer):
    """SGD with Nesterov momentum, weight decay added to the gradient, and adaptive gradient clipping before both.

    Gradients are consumed: after `step` their values are not the gradients any more.

    Args:
        params: parameters or groups; a group may set any of the options. `param_groups(model)` makes the authors'.
        lr: learning rate; the paper's peak is 0.1 * batch / 256.
        weight_decay: coupled, not multiplied by the learning rate schedule on its own.
        clipping: λ of AGC; None clips nothing.
        eps: ε of AGC.

    Attributes:
        stats: `AGCStats` of the last step.

    Raises:
        InputError: a negative rate, a momentum outside [0, 1), Nesterov without momentum, λ or ε out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 2e-5,
        clipping: float | None = 0.01,
        eps: float = 1e-3,
    ):
        defaults = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, clipping=clipping, eps=eps
        )
        super().__init__(params, defaults)
        self.stats = AGCStats()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_clipping(group["clipping"], group["eps"])
        if group["lr"] < 0 or group["weight_decay"] < 0 or not 0 <= group["momentum"] < 1:
            raise InputError("lr and weight_decay are at least 0, momentum lies in [0, 1)")
        if group["nesterov"] and not group["momentum"]:
            raise InputError("Nesterov momentum needs a momentum above 0")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        ema: EMA | None = None,
        ema_step: int = 0,
        hold: Tensor | None = None,
    ) -> float | None:
        """One update. With `ema`, its `update(ema_step)` too, which on a CPU costs little more in the same pass.

        `hold`: bool scalar on the parameters' device; where it is true the step is not made, and the host need not wait
        for it.
        """
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
        averages = {} if ema is None else ema.averages()
        blend = 0.0 if ema is None else 1 - ema.decay_at(ema_step)
        for group in self.param_groups:
            plain: list[tuple[Piece, Tensor]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                piece = piece_of(p, group.get("units", "channel"), group.get("transposed", 0))
                update = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
                momentum, average = local(self.state[p]["momentum_buffer"]), averages.get(p)
                item = piece.item(group["clipping"], group["eps"], m=momentum, e=average, blend=blend, **update)
                if item is not None:
                    averages.pop(p, None)
                    swept.append((None if group["clipping"] is None else len(pieces), item))
                else:
                    plain.append((piece, momentum))
                    order += [] if group["clipping"] is None else [len(pieces)]
                pieces += [] if group["clipping"] is None else [piece]
            if plain:
                found += self._plain_step(
                    [piece for piece, _ in plain], [momentum for _, momentum in plain], group, hold
                )
        if swept:
            columns = sweep([item for _, item in swept])
            clipped = [i for i, (place, _) in enumerate(swept) if place is not None]
            found.append(columns[:, clipped])
            order += [place for place, _ in swept if place is not None]
        if averages:
            torch._foreach_lerp_(list(averages.values()), [local(p) for p in averages], blend)
        self.stats = make_stats(pieces, arrange(found, order))
        return loss

    def _plain_step(
        self, pieces: list[Piece], momenta: list[Tensor], group: dict[str, Any], hold: Tensor | None = None
    ) -> list[Tensor]:
        """By batched operations; what `clip_pieces_` found, if it was to clip."""
        clipping = group["clipping"]
        found = [] if clipping is None else [clip_pieces_(pieces, clipping, group["eps"])]
        sgd_step_(
            [piece.weight for piece in pieces],
            [piece.grad for piece in pieces],
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            hold=hold,
        )
        return found
