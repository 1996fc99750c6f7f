"""Exponential moving average of the parameters, and of running statistics."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normfree.config import InputError
from normfree.optim.agc import is_sharded, local


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
        self.params = _averaged(model)
        self.shadow = {name: p.detach().clone().to(_wide(p)) for name, p in self.params.items()}
        self._seen, self._forms, self._applied = _tensors(model), _forms(self.params), False

    def decay_at(self, step: int) -> float:
        if step < 0:
            raise InputError(f"step {step}: counted from 0")
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters of now into the average; `step` counts from 0."""
        blend_(self.averages(), 1 - self.decay_at(step))

    def averages(self) -> dict[Tensor, Tensor]:
        """What this rank has of each parameter's average, by parameter."""
        self._follow()
        return {p: local(self.shadow[name]) for name, p in self.params.items()}

    def _follow(self) -> None:
        """Looks whether the network has the parameters that it had, and where they are now."""
        if self._applied:
            raise InputError("inside applied() the network has the averages: leave it before update() and applied()")
        seen = _tensors(self.model)
        if len(seen) != len(self._seen) or not all(map(operator.is_, seen, self._seen)):
            now = _averaged(self.model)
            if other := sorted(now.keys() ^ self.shadow.keys()):
                what = "has a new" if other[0] in now else "no longer has a"
                raise InputError(f"the network {what} parameter {other[0]}: make a new EMA after changing a network")
            self.params, self._seen, self._forms = now, seen, []
        if (forms := _forms(self.params)) == self._forms:
            return
        for name, p in self.params.items():
            average = self.shadow[name]
            if average.shape != p.shape or is_sharded(average) != is_sharded(p):
                raise InputError(
                    f"{name} is {_described(p)}, its average {_described(average)}: make a new EMA after changing a "
                    "network; under FSDP2, after fully_shard, and reshard() after a forward pass without a backward one"
                )
            if average.device != p.device or average.dtype != _wide(p):
                self.shadow[name] = average.to(p.device, _wide(p))
        self._forms = forms

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged parameters inside, its own again afterwards.

        Shards are copied, and averages in half precision are rounded for the time; others are not.
        """
        self._follow()
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, p in self.params.items():
                own, average = local(p), local(self.shadow[name])
                if is_sharded(p):  # whose .data does not hold the shard
                    kept.append((p, own.clone()))
                    own.copy_(average)
                else:
                    kept.append((p, p.data))
                    p.data = average.to(p.dtype)
        self._applied = True
        try:
            yield
        finally:
            self._applied = False
            with torch.no_grad():
                for p, own in kept:
                    if is_sharded(p):
                        local(p).copy_(own)
                    else:
                        p.data = own

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes averages of another process, in any precision.

        Raises:
            InputError: names, shapes or kinds of numbers are others; nothing is changed then.
        """
        if other := sorted(state.keys() ^ self.shadow.keys()):
            what = "has no" if other[0] in self.shadow else "has a"
            raise InputError(f"this average belongs to a network with other parameters: it {what} {other[0]}")
        for name, average in self.shadow.items():
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != average.shape or _kind(value) != _kind(average):
                what = _described(value) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"the average of {name} is {what}, that of this network {_described(average)}")
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


def _tensors(model: nn.Module) -> list[Tensor | None]:
    """All parameters and buffers without names, which takes a seventh of the time of `named_parameters`."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            found += module._parameters.values()
            found += module._buffers.values()
            modules += module._modules.values()
    return found


def _forms(params: Mapping[str, Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(p.shape, p.dtype, p.device) for p in params.values()]


def _wide(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype.itemsize < 4 else p.dtype


def _kind(t: Tensor) -> tuple[bool, bool]:
    return t.is_floating_point(), t.is_complex()


def _described(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}{' in shards' if is_sharded(t) else ''}"
