"""MixUp (Zhang et al. 2017) and CutMix (Yun et al. 2019) as in the released code: one training image from two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from normfree.config import MixPairs
from normfree.errors import InputError


@dataclass(frozen=True)
class Mixing:
    """Mixes two images, with a ratio drawn for each pair. The paper uses MixUp 0.2 and CutMix 1 (appendix A.3).

    `mixup`, `cutmix`: α of the Beta(α, α) distribution of MixUp's ratio and of the area outside CutMix's box; 0 turns
    one off. If both are on, they alternate over the images of a batch. `pairs`: the partner of an image in the loader.
    "stream" is the next image of the training stream, so two are read per training image, as in the released code;
    "batch" is the next image of its batch, so one is read. Raises `InputError` if both are 0 or one is negative, and
    for other `pairs`.
    """

    mixup: float = 0.2
    cutmix: float = 1.0
    pairs: MixPairs = "stream"

    def __post_init__(self) -> None:
        if self.pairs not in get_args(MixPairs):
            raise InputError(f"pairs is {self.pairs!r}; it must be {' or '.join(get_args(MixPairs))}")
        if min(self.mixup, self.cutmix) < 0 or not (self.mixup or self.cutmix):
            raise InputError(f"{self}: both are at least 0 and one is more; without mixing, leave it out")

    def __call__(self, first: Tensor, second: Tensor, place: int, rng: np.random.Generator) -> tuple[Tensor, float]:
        """The mixture of two images (C, H, W) of the same type, in that type, and the weight of the first label.

        `place` is the index of the mixture in its batch. If both are on, even places get MixUp, odd ones CutMix.
        """
        if self.mixup and not (self.cutmix and place % 2):
            return mixup(first, second, float(rng.beta(self.mixup, self.mixup)))
        height, width = first.shape[-2:]
        x, y = int(rng.integers(width)), int(rng.integers(height))
        return cutmix(first, second, cutmix_box(width, height, x, y, float(rng.beta(self.cutmix, self.cutmix))))


def mixup(first: Tensor, second: Tensor, ratio: float) -> tuple[Tensor, float]:
    """`ratio` * `first` + (1 - `ratio`) * `second`, rounded if uint8; and `ratio`. Images are (C, H, W)."""
    mixed = torch.lerp(second.float(), first.float(), ratio)
    return (mixed if first.is_floating_point() else mixed.round_().to(first.dtype)), ratio


def cutmix(first: Tensor, second: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """`first` inside the box (left, upper, right, lower), `second` outside; and the box's share of the area."""
    left, upper, right, lower = box
    mixed = second.clone()
    mixed[:, upper:lower, left:right] = first[:, upper:lower, left:right]
    return mixed, (right - left) * (lower - upper) / (first.shape[-2] * first.shape[-1])


def cutmix_box(width: int, height: int, x: int, y: int, outside: float) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of a box around (`x`, `y`), of 1 - `outside` of the area before it is clipped."""
    side = math.sqrt(1 - outside)
    half_width, half_height = int(side * width) // 2, int(side * height) // 2
    left, upper = max(x - half_width, 0), max(y - half_height, 0)
    return left, upper, min(x + half_width, width), min(y + half_height, height)
