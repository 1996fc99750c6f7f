"""The feature pyramid of a detector (Lin et al. 2017, arXiv 1612.03144), without normalization, on any backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.layers import Activation, Conv2d, WSConv2d, convolve
from normfree.models.bn_resnet import BNAct
from normfree.models.network import Network
from normfree.models.table import defaults


class FeaturePyramid(nn.Module):
    """Four maps of a backbone -> maps "0" to "3" of the same sizes (P2 to P5) and "pool" (P6), with `channels` each.

    Each map passes `entries`, as the backbone's next block would have it, then a 1x1 convolution (`inner_blocks`); the
    sum with the coarser levels passes a 3x3 convolution (`layer_blocks`). P6 is every second pixel of P5. At
    initialisation all have variance 1: `scales` bring the four maps there, and a sum of n levels counts 1 / sqrt(n).
    The scalars multiply the weights: standardized ones always, plain ones when they are drawn.

    Args:
        in_channels, entries, scales: of the four maps; a scale is a number, or a tensor, which files keep.
        standardize: weight standardization, else plain convolutions.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        entries: Sequence[nn.Module],
        scales: Sequence[float | Tensor],
        channels: int,
        standardize: bool,
    ):
        super().__init__()
        levels, conv = range(len(in_channels)), _standardized if standardize else _plain
        self.entries = nn.ModuleList(entries)
        self.inner_blocks = nn.ModuleList(nn.Sequential(conv(in_channels[i], channels, 1, scales[i])) for i in levels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(conv(channels, channels, 3, (len(levels) - i) ** -0.5)) for i in levels
        )

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps (N, C_i, H_i, W_i), the finest first -> name to (N, channels, H_i, W_i)."""
        names, total = [str(i) for i in range(len(self.entries))], None
        out, convs = {}, cast(Any, self.inner_blocks)
        for name in reversed(names):
            x, entry, conv = maps[int(name)], self.entries[int(name)], convs[int(name)][0]
            before = entry if isinstance(entry, Activation) else None
            lateral = convolve(conv, x if before else entry(x), before)
            up = 0 if total is None else F.interpolate(total, lateral.shape[-2:], mode="nearest")
            total = lateral + up
            out[name] = self.layer_blocks[int(name)](total)
        return {name: out[name] for name in names} | {"pool": out[names[-1]][..., ::2, ::2]}


def _standardized(in_channels: int, out_channels: int, kernel: int, scale: float | Tensor) -> WSConv2d:
    conv = WSConv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    if isinstance(scale, Tensor):
        del conv.input_scale
        conv.register_buffer("input_scale", scale)
    else:
        conv.input_scale = scale
    return conv


def _plain(in_channels: int, out_channels: int, kernel: int, scale: float | Tensor) -> Conv2d:
    """torchvision's initialisation, times `scale`."""
    conv = Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(cast(Tensor, conv.bias))
    with torch.no_grad():
        conv.weight.mul_(scale)
    return conv


class PyramidBackbone(nn.Module):
    """Images (N, C, H, W) -> the maps of `FeaturePyramid` on the four maps of `body`.

    Args:
        body: a network made with features_only and out_indices (1, 2, 3, 4), or any other module that returns a list of
            four maps, each half as large as the one before, and has timm's `feature_info`.
    """

    def __init__(self, body: nn.Module, channels: int, standardize: bool):
        super().__init__()
        info = cast(Any, getattr(body, "feature_info", None))
        self.reductions: list[int] = list(info.reduction()) if info else []
        if len(self.reductions) != 4 or any(
            b != 2 * a for a, b in zip(self.reductions, self.reductions[1:], strict=False)
        ):
            raise InputError(
                "a pyramid needs four maps, each half as large as the one before: make the backbone with "
                "features_only=True, out_indices=(1, 2, 3, 4)"
            )
        self.out_channels, in_channels = channels, cast(list[int], list(info.channels()))
        entries = _entries(body, in_channels)
        scales = _scales(body, entries, standardize)
        self.body = body
        self.fpn = FeaturePyramid(in_channels, entries, scales, channels, standardize)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) -> name to (N, channels, h, w)."""
        return self.fpn(self.body(x))


def _entries(body: nn.Module, channels: Sequence[int]) -> list[nn.Module]:
    """What another block would begin with: the activation, as the maps are taken before it, in BN twins after BN."""
    if not isinstance(body, Network) or body.info is None:  # None: it was converted
        return [nn.Identity() for _ in channels]
    name = (defaults(body.info.architecture) | body.info.overrides)["activation"]
    return [BNAct(c, name) if body.final_norm else Activation(name) for c in channels]


@torch.no_grad()
def _scales(body: nn.Module, entries: Sequence[nn.Module], standardize: bool) -> list[float | Tensor]:
    """One over the deviation of each map after its entry: around the mean of a pixel's channels if standardized
    filters follow, which subtract it, else around 0.

    It is measured, as β is too far off: a network's shortcuts average, which takes variance away, and training changes
    it. After batch normalization it is known.
    """

    def scale(x: Tensor) -> Tensor:
        return (x.var(1, correction=0).mean() if standardize else x.square().mean()).rsqrt()

    if isinstance(entries[0], BNAct):
        x = torch.randn(1, 1000, 100, generator=torch.Generator().manual_seed(0), device="cpu")
        return [scale(cast(BNAct, entry).function(x)).item() for entry in entries]
    first = next(p for p in body.parameters() if p.ndim == 4)
    if first.is_meta:
        return [torch.ones(()) for _ in entries]
    modes = {module: module.training for module in body.modules()}
    maps = body.eval()(_pictures(first.shape[1]).to(first))
    for module, mode in modes.items():
        module.training = mode
    return [scale(entry(x)) for entry, x in zip(entries, maps, strict=True)]


def _pictures(channels: int) -> Tensor:
    """(4, channels, 128, 128) of variance 1, correlated like photographs: noise at seven scales, mostly grey.

    White noise would fade in pooling as photographs do not. The weights were fitted to photographs: their maps have
    0.7 to 1.4 times the deviation of these in untrained and trained networks (docs/detection.md).
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(4, channels, 128, 128)
    for level, weight in enumerate((0.6, 1, 1, 1, 1, 1, 2.5), 1):
        grey, colour = (torch.randn(4, c, 128 >> level, 128 >> level, generator=generator) for c in (1, channels))
        total += weight * F.interpolate(0.8**0.5 * grey + 0.2**0.5 * colour, 128, mode="nearest")
    return total / total.std()
