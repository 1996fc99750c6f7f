"""Exponential moving average of the parameters, and of running statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.optim.agc import is_sharded, local, wide


class EMA:
    """ema <- d * ema + (1 - d) * parameter after each step t = 0, 1, ..., with d = min(decay, (1 + t) / (10 + t)).

    Starts as a copy of the parameters; the warm-up of d lets them go (released code: utils.py, tf1_ema). A batch
    normalization's running statistics are averaged with them: those of today do not fit the weights of long ago.
    Integers, such as its count of batches, are not.

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

    Averages of half-precision parameters are kept in float32, where steps of 1 - d are not lost. They follow the
    network by the names of its parameters: to another device or dtype, and when a parameter is replaced by another of
    the same shape (`load_state_dict(assign=True)`).

    Attributes:
        shadow: the averages, by name.

    Raises:
        InputError: a decay outside [0, 1); from every method, a network whose parameters have other names or shapes
            than when the average was made; `update` or `applied` inside `applied`.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99999):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay {decay}: a number in [0, 1); the paper's is 0.99999")
        self.model, self.decay = model, decay
        self.params, self._seen, self._applied = _averaged(model), _seen(model), False
        self.shadow = {name: p.detach().clone().to(wide(p.dtype)) for name, p in self.params.items()}

    def decay_at(self, step: int) -> float:
        if step < 0:
            raise InputError(f"step {step}: counted from 0")
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters of now into the average; `step` counts from 0."""
        blend_(self.averages(), 1 - self.decay_at(step))

    def averages(self) -> dict[Tensor, Tensor]:
        """What this rank has of each parameter's average, by parameter, where the parameters are now."""
        if self._applied:
            raise InputError("inside applied() the network has the averages: leave it before update() and applied()")
        if (seen := _seen(self.model)) != self._seen:
            params = _averaged(self.model)
            remedy = "make a new EMA after changing a network; under FSDP2, after fully_shard, and reshard() before use"
            _check(params, self.shadow, remedy)
            self.shadow = {name: self.shadow[name].to(p.device, wide(p.dtype)) for name, p in params.items()}
            self.params, self._seen = params, seen
        return {p: local(self.shadow[name]) for name, p in self.params.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged parameters inside, rounded to its precision, its own again afterwards."""
        averages = self.averages()
        own = {p: local(p).clone() for p in averages}
        self._applied = True
        try:
            _copy(averages)
            yield
        finally:
            _copy(own)
            self._applied = False

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes averages of another process, in any precision.

        Raises:
            InputError: names, shapes or kinds of numbers are others; nothing is changed then.
        """
        _check(state, self.shadow, "what is loaded belongs to a network with other parameters")
        for name, value in state.items():
            self.shadow[name].copy_(value)


def blend_(averages: Mapping[Tensor, Tensor], weight: float) -> None:
    """average <- average + weight * (parameter - average), for all of `averages` by parameter."""
    pairs = [(local(p), average.dtype) for p, average in averages.items()]
    values = [own if own.dtype == dtype else own.to(dtype) for own, dtype in pairs]  # .to() alone is a call each
    if values:
        torch._foreach_lerp_(list(averages.values()), values, weight)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that an average is made of, by name."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t for name, t in named.items() if t.is_floating_point() or t.is_complex()}


def _seen(model: nn.Module) -> list[tuple]:
    """Identity and form of all parameters and buffers, in a fraction of the time of `named_parameters`."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            found += module._parameters.values()
            found += module._buffers.values()
            modules += module._modules.values()
    return [(id(t), t.shape, t.dtype, t.device) for t in found if t is not None]


@torch.no_grad()
def _copy(values: Mapping[Tensor, Tensor]) -> None:
    for p, value in values.items():
        local(p).copy_(value)


def _check(found: Mapping[str, Any], averages: Mapping[str, Tensor], remedy: str) -> None:
    """InputError unless `found` has the names, shapes and kinds of numbers of the averages."""
    for name in sorted(found.keys() | averages.keys()):
        other, own = _form(found.get(name)), _form(averages.get(name))
        if other != own:
            raise InputError(f"{name} is {other}, in this average {own}: {remedy}")


def _form(t: Any) -> str:
    if not isinstance(t, Tensor):
        return "missing" if t is None else type(t).__name__
    kind = "complex" if t.is_complex() else "float" if t.is_floating_point() else str(t.dtype)
    return f"{tuple(t.shape)} {kind}{' in shards' if is_sharded(t) else ''}"
