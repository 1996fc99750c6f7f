"""Exponential moving average of the parameters, and of running statistics."""

from __future__ import annotations

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
    """

    def __init__(self, model: nn.Module, decay: float = 0.99999):
        if not 0 <= decay < 1:
            raise InputError(f"EMA decay {decay}: a number in [0, 1); the paper's is 0.99999")
        self.decay = decay
        self.params: dict[str, Tensor] = dict(model.named_parameters())
        self.params |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self.shadow = {name: p.detach().clone() for name, p in self.params.items()}

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters of now into the average; `step` counts from 0."""
        averages = self.averages()
        torch._foreach_lerp_(list(averages.values()), [local(p) for p in averages], 1 - self.decay_at(step))

    def averages(self) -> dict[Tensor, Tensor]:
        """What this rank has of each parameter's average, by parameter."""
        return {p: local(self.shadow[name]) for name, p in self.params.items()}

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.params.items():
            if is_sharded(p):  # whose .data does not hold the shard
                own, average = local(p), local(self.shadow[name])
                kept = own.clone()
                own.copy_(average)
                average.copy_(kept)
            else:
                p.data, self.shadow[name] = self.shadow[name], p.data

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged parameters inside, its own again afterwards; only shards are copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.shadow.keys():
            raise InputError("this average belongs to a network with other parameters")
        for name, value in state.items():
            self.shadow[name].copy_(value)
