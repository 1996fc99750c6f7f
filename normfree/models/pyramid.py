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
from normfree.weights import ModelInfo


class FeaturePyramid(nn.Module):
    """Four maps of a backbone -> maps "0" to "3" of the same sizes (P2 to P5) and "pool" (P6), with `channels` each.

    Each map passes `entries`, as the backbone's next block would have it, then a 1x1 convolution (`inner_blocks`); the
    sum with the coarser levels passes a 3x3 convolution (`layer_blocks`). P6 is every second pixel of P5. At
    initialisation all have variance 1: `scales` are those of the maps, and a sum of n levels counts 1 / sqrt(n). The
    scalars multiply the weights: standardized ones always, plain ones when they are drawn.

    Args:
        in_channels, entries, scales: of the four maps; a scale is a number, or a tensor that is to be kept in files.
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
        if isinstance(body, Network) and body.info is not None:  # None: it was converted
            entries, scales = _next_block(body, body.info, in_channels, standardize)
        else:
            entries, scales = [nn.Identity() for _ in in_channels], _measured(body, standardize)
        self.body = body
        self.fpn = FeaturePyramid(in_channels, entries, scales, channels, standardize)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) -> name to (N, channels, h, w)."""
        return self.fpn(self.body(x))


def _next_block(
    body: Network, info: ModelInfo, channels: list[int], standardize: bool
) -> tuple[list[nn.Module], list[float]]:
    """What the first layers of another block would do with each map: activation, or BN and activation, and its scale.

    The maps are taken before the activation. In normalizer-free networks their variance is 1 + n α² after n blocks.
    """
    options = defaults(info.architecture) | info.overrides
    act = Activation(options["activation"])
    scale = act.gamma if standardize else _root_mean_square(act) ** -1
    if body.final_norm:
        return [BNAct(c, act.name) for c in channels], [scale] * 4
    blocks: list[Any] = [list(stage.children()) for stage in body.stages]
    betas = [(1 + sum(block.alpha**2 for block in stage)) ** -0.5 for stage in blocks]
    return [Activation(act.name) for _ in channels], [scale * beta for beta in betas]


def _root_mean_square(act: Activation) -> float:
    """Of act(x) for x ~ N(0, 1): plain filters do not subtract the mean, as standardized ones do."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64, device="cpu")
    density = torch.exp(-(x**2) / 2)
    return float(((act.function(x) ** 2 * density).sum() / density.sum()).sqrt())


@torch.no_grad()
def _measured(body: nn.Module, standardize: bool) -> list[float | Tensor]:
    """One over the deviation of each map for noise from N(0, 1): around the mean of a pixel's channels if standardized
    filters follow, which subtract it, else around 0."""
    first = next(p for p in body.parameters() if p.ndim == 4)
    x = torch.randn(2, first.shape[1], 224, 224, generator=torch.Generator().manual_seed(0))
    modes = {module: module.training for module in body.modules()}
    maps = body.eval()(x.to(first))
    for module, mode in modes.items():
        module.training = mode
    squares = [x.var(1, correction=0).mean() if standardize else x.square().mean() for x in maps]
    return [square.rsqrt() for square in squares]
