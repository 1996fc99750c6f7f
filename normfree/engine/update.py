"""One update of the weights: clipping, the optimizer's step and the moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from normfree.config import OptimConfig
from normfree.optim import AGC, EMA, SGD_AGC, AGCStats, param_groups
from normfree.optim.groups import split_by_layer


@dataclass(frozen=True)
class LayerRates:
    """Learning rates by layer: that of layer l is multiplied by decay^(head - l), where `head` is the last layer.

    Attributes:
        layers: the layer of each parameter, from 0 on.
        decay: above 0, at most 1.
        head_steps: so many first steps train the head alone; in as many after them, all other rates rise from 0.
        train_head_only: called with whether a step trains the head alone, before it.
    """

    layers: Mapping[nn.Parameter, int]
    decay: float = 1.0
    head_steps: int = 0
    train_head_only: Callable[[bool], None] = lambda only: None

    @cached_property
    def head(self) -> int:
        """The last layer."""
        return max(self.layers.values())

    def factor(self, layer: int, step: int) -> float:
        """What the learning rate of `layer` is multiplied by in step number `step`, counted from 0."""
        below = self.head - layer
        rising = (step + 1 - self.head_steps) / self.head_steps if below and self.head_steps else 1.0
        return self.decay**below * min(max(rising, 0.0), 1.0)


class Update:
    """What a run does with the gradients of a step, as its `OptimConfig` says.

    Args:
        rates: learning rates by layer; None: one for all.
        roles: `classifier` and `exempt`, for `param_groups`.

    Attributes:
        optimizer: `SGD_AGC`, or AdamW with AGC attached to it.
        ema: the moving average of the weights.
    """

    def __init__(self, model: nn.Module, o: OptimConfig, rates: LayerRates | None = None, **roles: Any):
        self.model, self.options, self.rates = model, o, rates
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        groups = param_groups(model, o.weight_decay, o.clipping if o.clip == "agc" else None, **roles)
        groups = groups if rates is None else split_by_layer(groups, rates.layers)
        device = next(model.parameters()).device.type
        self.agc: AGC | None = None
        if o.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = SGD_AGC(groups, lr=0.0, momentum=o.momentum, eps=o.clip_eps)
        else:
            fused = device in ("cpu", "cuda")
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(o.momentum, 0.999), fused=fused)
            if o.clip == "agc" and o.clipping is not None:
                self.agc = AGC(self.optimizer, eps=o.clip_eps)
        self.ema = EMA(model, o.ema_decay)
        self.norm: Tensor | None = None  # of all gradients in the last step, with `clip` "norm"

    def prepare(self, step: int) -> None:
        """Clears the gradients, and freezes what step number `step` does not train."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.rates is not None and self.rates.head_steps:
            self.rates.train_head_only(step < self.rates.head_steps)

    def step(self, step: int, lr: float, hold: Tensor) -> None:
        """Update number `step`, counted from 0, at learning rate `lr`.

        `hold`: bool scalar on the device. If it is true, weights and optimizer do not change. Only a CPU waits for it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr if self.rates is None else lr * self.rates.factor(group["layer"], step)
        if self.options.clip == "norm" and self.options.clipping is not None:
            self.norm = nn.utils.clip_grad_norm_(self.names, self.options.clipping)
        if isinstance(self.optimizer, SGD_AGC):
            self.optimizer.step(ema=self.ema, ema_step=step, hold=hold)
            return
        on_cuda = hold.device.type == "cuda"
        if on_cuda:
            self.optimizer.found_inf = hold.float()  # type: ignore[attr-defined]  # read by fused optimizers, as GradScaler sets it
        elif hold:
            return
        self.optimizer.step()
        self.ema.update(step, hold if on_cuda else None)

    def figures(self, group_of: Callable[[str], str]) -> dict[str, float]:
        """Statistics of the last clipping, for the log; waits for the device. `group_of`: parameter name -> row."""
        norm = {} if self.norm is None else {"grad_norm": self.norm.item()}
        stats = self.agc.stats if self.agc else getattr(self.optimizer, "stats", None)
        if stats is None:
            return norm
        overall = {"clipped_fraction": stats.clipped_fraction, "max_grad_ratio": stats.max_ratio.item()}
        return overall | self._by_group(stats, group_of) | norm

    def _by_group(self, stats: AGCStats, group_of: Callable[[str], str]) -> dict[str, float]:
        """Share of the units that AGC clipped: "agc_ROW" for each row."""
        units: dict[str, int] = {}
        clipped: dict[str, float] = {}
        for p, size, count in zip(stats.params, stats.units, stats.clipped.tolist(), strict=True):
            row = "agc_" + group_of(self.names[p])
            units[row] = units.get(row, 0) + size
            clipped[row] = clipped.get(row, 0.0) + count
        return {row: clipped[row] / size for row, size in sorted(units.items())}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name. Creates the optimizer's state if there is none yet."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.state[p]
                if not state:
                    state |= self._fresh(p)
                tensors |= {f"{key.removesuffix('_buffer')}.{self.names[p]}": value for key, value in state.items()}
        return tensors

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of a parameter before its first step."""
        if isinstance(self.optimizer, SGD_AGC):
            return {"momentum_buffer": torch.zeros_like(p)}
        where = p.device if self.optimizer.defaults["fused"] else "cpu"
        averages = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32, device=where)} | averages
