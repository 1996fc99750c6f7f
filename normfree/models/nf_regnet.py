"""NF-RegNets (Brock, De, Smith 2021, arXiv 2101.08692): small groups, inverted bottlenecks, swish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from normfree.config import Four
from normfree.layers import Activation, SqueezeExcite, StochasticDepth, WSConv2d, convolve
from normfree.models.network import (
    Block,
    Network,
    Stage,
    block_schedule,
    check_four,
    check_padding,
    check_rates,
)


@dataclass(frozen=True)
class Variant:
    """One row of the table; `width` is three quarters of the released code's, which multiplies by 0.75."""

    depth: Four
    width: Four
    train_px: int
    eval_px: int
    drop_rate: float
    published: str = ""


VARIANTS: dict[str, Variant] = {
    "nf_regnet_b0": Variant((1, 3, 6, 6), (36, 78, 156, 330), 192, 224, 0.2),
    "nf_regnet_b1": Variant((2, 4, 7, 7), (36, 78, 156, 330), 224, 256, 0.2),
    "nf_regnet_b2": Variant((2, 4, 8, 8), (42, 84, 174, 366), 240, 272, 0.3),
    "nf_regnet_b3": Variant((2, 5, 9, 9), (42, 96, 186, 396), 288, 320, 0.3),
    "nf_regnet_b4": Variant((2, 6, 11, 11), (48, 108, 216, 462), 320, 384, 0.4),
    "nf_regnet_b5": Variant((3, 7, 14, 14), (60, 126, 252, 528), 384, 456, 0.4),
    "nf_regnet_b6": Variant((3, 8, 16, 16), (66, 138, 282, 594), 448, 528, 0.5),  # b6 to b8: in the released code only
    "nf_regnet_b7": Variant((4, 10, 19, 19), (72, 156, 312, 660), 512, 600, 0.5),
    "nf_regnet_b8": Variant((4, 11, 22, 22), (78, 174, 342, 726), 600, 672, 0.5),
}


def round_channels(channels: float, divisor: int) -> int:
    """The nearest multiple of `divisor`, half upwards; for 1, rounded down as in the released code."""
    return int(channels + divisor // 2) // divisor * divisor


class NFRegBlock(Block):
    """h + α · f(β · act(h)): 1x1, grouped 3x3 (stride), squeeze-excite, 1x1; average-pooled shortcut at transitions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        groups: int,
        se_channels: int,
        stride: int,
        beta: float,
        alpha: float,
        activation: str,
        stochastic_depth: float,
        skip_init: float | None,
        conv: Callable[..., WSConv2d],
    ):
        super().__init__()
        self.act = Activation(activation)
        self.stride, self.alpha = stride, alpha
        gamma = self.act.gamma
        self.conv0 = conv(in_channels, mid_channels, 1, input_scale=beta * gamma)
        self.conv1 = conv(mid_channels, mid_channels, 3, stride, groups=groups, input_scale=gamma)
        self.se = SqueezeExcite(mid_channels, se_channels)
        self.conv2 = conv(mid_channels, out_channels, 1, input_scale=gamma)
        projects = stride > 1 or in_channels != out_channels
        self.conv_shortcut = conv(in_channels, out_channels, 1, input_scale=beta * gamma) if projects else None
        self.stochastic_depth = StochasticDepth(stochastic_depth)
        self._add_skip_gain(skip_init, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        shortcut = self._shortcut(x, pools=self.stride > 1)
        out = self._gated(x)
        scale = self.alpha if self.skip_gain is None else self.skip_gain * self.alpha
        out = convolve(self.conv2, out, self.act, scale)
        return shortcut + self.stochastic_depth(out)

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch of x, before stochastic depth, SkipInit gain and α."""
        return convolve(self.conv2, self._gated(x), self.act)

    def _gated(self, x: Tensor) -> Tensor:
        out = convolve(self.conv1, convolve(self.conv0, x, self.act), self.act)
        return out * (2 * self.se(out))


class NFRegNet(Network):
    """Stem (3x3 convolution, stride 2), four stages of `NFRegBlock` with stride 2, a 1x1 convolution, classifier.

    Args:
        width, depth: output channels and number of blocks of the four stages.
        expansion: width inside a block over its input width, rounded down to a multiple of `group_width`; 1 in the
            very first block.
        channel_divisor: the widths inside a block are rounded to multiples of it, 8 in timm.
        final_width: output channels of the last convolution; None: 1280 / 440 times `width[3]`.
        drop_rate, stochastic_depth, skip_init, skip_gain, gamma_in_conv, padding, ws_eps, global_pool, features_only,
            out_indices: as in `NFNet`.
    """

    def __init__(
        self,
        width: Sequence[int],
        depth: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        drop_rate: float = 0.0,
        stochastic_depth: float = 0.1,
        activation: str = "silu",
        expansion: float = 2.25,
        group_width: int = 8,
        se_ratio: float = 0.5,
        alpha: float = 0.2,
        skip_init: float = 0.0,
        skip_gain: bool = True,
        channel_divisor: int = 1,
        final_width: int | None = None,
        gamma_in_conv: bool = False,
        padding: str = "same",
        ws_eps: float | None = None,
        global_pool: str = "avg",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        check_four(width=width, depth=depth)
        check_rates(drop_rate=drop_rate, stochastic_depth=stochastic_depth)
        check_padding(padding)
        self.act = Activation(activation, scaled=not gamma_in_conv)
        outer_scale = self.act.gamma if gamma_in_conv else 1.0
        conv = partial(WSConv2d, padding=padding, eps=ws_eps)
        channels = width[0]
        self.stem = nn.Sequential()
        self.stem.add_module("conv", conv(in_channels, channels, 3, 2, input_scale=outer_scale))

        stages = [Stage() for _ in range(4)]
        for stage, i, beta, rate in block_schedule(depth, alpha, stochastic_depth):
            inner = channels if stage == i == 0 else round_channels(channels * expansion, channel_divisor)
            groups = max(1, inner // group_width)
            inner = groups * group_width if inner >= group_width else inner
            block = NFRegBlock(
                channels,
                width[stage],
                inner,
                groups,
                max(1, round_channels(inner * se_ratio, channel_divisor)),
                stride=2 if i == 0 else 1,
                beta=beta,
                alpha=alpha,
                activation=activation,
                stochastic_depth=rate,
                skip_init=skip_init if skip_gain else None,
                conv=conv,
            )
            stages[stage].append(block)
            channels = width[stage]
        self.stages = nn.Sequential(*stages)
        self.final_conv = conv(channels, final_width or 1280 * channels // 440, 1, input_scale=outer_scale)
        self._finish(num_classes, in_channels, drop_rate, global_pool, features_only, out_indices, std=0.0)
