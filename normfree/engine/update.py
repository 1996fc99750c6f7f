"""One update of the weights: clipping, the optimizer's step and the moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.config import OptimConfig
from normfree.optim import AGC, EMA, SGD_AGC, AGCStats, param_groups


class Update:
    """What a run does with the gradients of a step, as its `OptimConfig` says.

    Args:
        roles: `classifier` and `exempt`, for `param_groups`.

    Attributes:
        optimizer: `SGD_AGC`, or AdamW with AGC attached to it.
        ema: the moving average of the weights.
    """

    def __init__(self, model: nn.Module, o: OptimConfig, **roles: Any):
        self.model, self.options = model, o
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        groups = param_groups(model, o.weight_decay, o.clipping if o.clip == "agc" else None, **roles)
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

    def step(self, step: int, lr: float, hold: Tensor) -> None:
        """Update number `step`, counted from 0, at learning rate `lr`.

        `hold`: bool scalar on the device. If it is true, weights and optimizer do not change. Only a CPU waits for it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.options.clip == "norm" and self.options.clipping is not None:
            self.norm = nn.utils.clip_grad_norm_(self.names, self.options.clipping)
        if isinstance(self.optimizer, SGD_AGC):
            self.optimizer.step(ema=self.ema, ema_step=step, hold=hold)
            return
        if hold.device.type == "cuda":
            self.optimizer.found_inf = hold.float()  # type: ignore[attr-defined]  # read by fused optimizers, as GradScaler sets it
        elif hold:
            return
        self.optimizer.step()
        self.ema.update(step)

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
