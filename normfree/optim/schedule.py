"""Learning rates as functions of the step."""

from __future__ import annotations

import math

from normfree.errors import InputError


def warmup_cosine(
    step: int, *, peak_lr: float, total_steps: int, warmup_steps: float = 0.0, final_lr: float = 0.0
) -> float:
    """Learning rate of a step, counted from 0: linear warm-up to `peak_lr`, then half a cosine to `final_lr`.

        peak_lr * step / warmup_steps                                               before warmup_steps
        final_lr + (peak_lr - final_lr) * (1 + cos(pi * t)) / 2,
            t = (step - warmup_steps) / (total_steps - warmup_steps)                after

    `warmup_steps` may be a fraction (5 epochs at batch 4096 are 1563.9 steps). Released code: experiment.py.

    Example:
        >>> [round(warmup_cosine(s, peak_lr=1.0, total_steps=4, warmup_steps=2), 2) for s in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < 0:
        raise InputError(f"step {step}: counted from 0")
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    t = min((step - warmup_steps) / max(total_steps - warmup_steps, 1e-9), 1.0)
    return final_lr + (peak_lr - final_lr) * 0.5 * (1 + math.cos(math.pi * t))
