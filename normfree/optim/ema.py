"""Exponential moving average of parameters and running statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normfree._compat import registered_tensors
from normfree.errors import InputError
from normfree.optim.agc import at_least_float32
from normfree.optim.shards import is_sharded, local


class EMA:
    """ema <- d * ema + (1 - d) * parameter after each step t = 0, 1, ..., with d = min(decay, (1 + t) / (10 + t)).

    The average starts as a copy of the parameters, and the warm-up of d soon forgets them (released code: utils.py,
    tf1_ema). The running statistics of batch normalization are averaged, too, so that they fit the averaged weights.
    Integers, such as the number of batches seen, are not averaged.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> torch.nn.init.zeros_(model.weight).item()
        0.0
        >>> ema = EMA(model, decay=0.99999)
        >>> for step in range(2):
        ...     torch.nn.init.ones_(model.weight).item()  # an update of the weights
        ...     ema.update(step)
        1.0
        1.0
        >>> with ema.applied():
        ...     round(model.weight.item(), 4)  # 1 - 1/10 * 2/11
        0.9818

    Averages of half-precision parameters are kept in float32, where steps of size 1 - d are not rounded away. They
    follow the network to another device or dtype, and parameters that are replaced by others of the same name and shape
    (`load_state_dict(assign=True)`).

    Attributes:
        shadow: the averages, by name.

    Raises:
        InputError: a decay outside [0, 1); a network whose parameters no longer have the names or shapes that they had
            when the EMA was made; `update` or `applied` inside `applied`.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99999):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay {decay}: a number in [0, 1); the paper's is 0.99999")
        self.model, self.decay = model, decay
        self.params, self._signature, self._applied = _averaged(model), _signature(model), False
        self.shadow = {name: p.detach().clone().to(at_least_float32(p.dtype)) for name, p in self.params.items()}

    def decay_at(self, step: int) -> float:
        """d of step `step`, which counts from 0."""
        if step < 0:
            raise InputError(f"step {step}: counted from 0")
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, hold: Tensor | None = None) -> None:
        """Updates the averages with the current parameters; `step` counts from 0.

        `hold`: bool scalar on their device. If it is true, nothing changes. The host does not wait for it.
        """
        blend_(self.averages(), 1 - self.decay_at(step), hold)

    def averages(self) -> dict[Tensor, Tensor]:
        """This rank's part of the averages, by parameter, on the parameters' current devices."""
        if self._applied:
            raise InputError("inside applied() the network holds the averages: leave it before update() or applied()")
        if (signature := _signature(self.model)) != self._signature:
            params = _averaged(self.model)
            remedy = "make a new EMA after changing a network; under FSDP2, after fully_shard, and reshard() before use"
            _check(params, self.shadow, remedy)
            self.shadow = {
                name: self.shadow[name].to(p.device, at_least_float32(p.dtype)) for name, p in params.items()
            }
            self.params, self._signature = params, signature
        return {p: local(self.shadow[name]) for name, p in self.params.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged parameters, rounded to its dtype; it restores the originals."""
        averages = self.averages()
        originals = {p: local(p).clone() for p in averages}
        self._applied = True
        try:
            _copy(averages)
            yield
        finally:
            _copy(originals)
            self._applied = False

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name; the tensors are shared."""
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies averages from `state`, in any floating-point dtype.

        Raises:
            InputError: `state` has other names, shapes or kinds of numbers; nothing is changed in this case.
        """
        _check(state, self.shadow, "the loaded state belongs to a network with other parameters")
        for name, value in state.items():
            self.shadow[name].copy_(value)


def blend_(averages: Mapping[Tensor, Tensor], weight: float, hold: Tensor | None = None) -> None:
    """average <- average + weight * (parameter - average), for all `averages`, by parameter, unless `hold` is true."""
    pairs = [(local(p), average.dtype) for p, average in averages.items()]
    values = [p if p.dtype == dtype else p.to(dtype) for p, dtype in pairs]  # .to() is a call even without a change
    if not values:
        return
    if hold is None:
        torch._foreach_lerp_(list(averages.values()), values, weight)
    else:  # a weight on the device, which lerp takes for one tensor at a time only
        moves = torch._foreach_sub(values, list(averages.values()))
        torch._foreach_mul_(moves, weight * ~hold)
        torch._foreach_add_(list(averages.values()), moves)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that are averaged, by name."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t for name, t in named.items() if t.is_floating_point() or t.is_complex()}


def _signature(model: nn.Module) -> list[tuple]:
    """Identity, shape, dtype and device of all parameters and buffers."""
    return [(id(t), t.shape, t.dtype, t.device) for t in registered_tensors(model)]


@torch.no_grad()
def _copy(values: Mapping[Tensor, Tensor]) -> None:
    for p, value in values.items():
        local(p).copy_(value)


def _check(values: Mapping[str, Any], averages: Mapping[str, Tensor], remedy: str) -> None:
    """Raises InputError unless `values` has the names, shapes and kinds of numbers of the averages."""
    for name in sorted(values.keys() | averages.keys()):
        actual, expected = _describe(values.get(name)), _describe(averages.get(name))
        if actual != expected:
            raise InputError(f"{name} is {actual}, in this average {expected}: {remedy}")


def _describe(t: Any) -> str:
    if not isinstance(t, Tensor):
        return "missing" if t is None else type(t).__name__
    kind = "complex" if t.is_complex() else "float" if t.is_floating_point() else str(t.dtype)
    return f"{tuple(t.shape)} {kind}{' in shards' if is_sharded(t) else ''}"
