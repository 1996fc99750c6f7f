"""NF-ResNets (Brock, De, Smith 2021, arXiv 2101.08692): pre-activation bottleneck ResNets without normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from normfree import functional
from normfree.config import Four
from normfree.layers import Activation, EfficientChannelAttention, SqueezeExcite, StochasticDepth, WSConv2d, convolve
from normfree.models.network import (
    Block,
    MaxPool,
    Network,
    Stage,
    block_schedule,
    check_four,
    check_padding,
    check_rates,
)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    depth: Four
    width: Four = (256, 512, 1024, 2048)
    train_px: int = 224
    eval_px: int = 224
    published: str = ""


VARIANTS: dict[str, Variant] = {
    "nf_resnet26": Variant((2, 2, 2, 2)),  # ours
    "nf_resnet50": Variant((3, 4, 6, 3)),
    "nf_resnet101": Variant((3, 4, 23, 3)),
    "nf_resnet152": Variant((3, 8, 36, 3)),
    "nf_resnet200": Variant((3, 24, 36, 3)),
    "nf_resnet288": Variant((24, 24, 24, 24)),
    "nf_resnet600": Variant((50, 50, 50, 50)),
}


class NFResBlock(Block):
    """h + α · f(β · act(h)): 1x1, 3x3 (stride), 1x1, optionally a gate; 1x1 shortcut at transitions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        stride: int,
        beta: float,
        alpha: float,
        activation: str,
        se_ratio: float | None,
        eca: bool,
        pool_shortcut: bool,
        stochastic_depth: float,
        skip_init: float | None,
        conv: Callable[..., WSConv2d],
    ):
        super().__init__()
        self.act = Activation(activation)
        self.stride, self.alpha = stride, alpha
        gamma = self.act.gamma
        self.conv0 = conv(in_channels, mid_channels, 1, input_scale=beta * gamma)
        self.conv1 = conv(mid_channels, mid_channels, 3, stride, input_scale=gamma)
        self.conv2 = conv(mid_channels, out_channels, 1, input_scale=gamma)
        self.pools = pool_shortcut and stride > 1
        projects, step = stride > 1 or in_channels != out_channels, 1 if self.pools else stride
        self.conv_shortcut = conv(in_channels, out_channels, 1, step, input_scale=beta * gamma) if projects else None
        self.se = None
        if eca:
            self.se = EfficientChannelAttention(out_channels)
        elif se_ratio is not None:
            self.se = SqueezeExcite(out_channels, max(1, int(out_channels * se_ratio)))
        self.stochastic_depth = StochasticDepth(stochastic_depth)
        self._add_skip_gain(skip_init, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        shortcut = self._shortcut(x, self.pools)
        out = convolve(self.conv1, convolve(self.conv0, x, self.act), self.act)
        scale = self.alpha if self.skip_gain is None else self.skip_gain * self.alpha
        if self.se is not None:
            out = convolve(self.conv2, out, self.act)
            return functional.gated_sum(shortcut, out, self.stochastic_depth(self.se(out) * (2 * scale)))
        out = convolve(self.conv2, out, self.act, scale)
        return shortcut + self.stochastic_depth(out)

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch of x, before stochastic depth, SkipInit gain and α."""
        out = convolve(self.conv1, convolve(self.conv0, x, self.act), self.act)
        out = convolve(self.conv2, out, self.act)
        return out if self.se is None else out * (2 * self.se(out))


class NFResNet(Network):
    """Stem (7x7 convolution and maximum, both stride 2), four stages of `NFResBlock`, activation, classifier.

    Args:
        width, depth: output channels and number of blocks of the four stages; a quarter of the width is the width
            inside the blocks, and of the first stage's that of the stem.
        se_ratio: squeeze-excite with this share of the channels, 0.25 in the released code; None: without.
        pool_shortcut: 2x2 mean and 1x1 convolution, as in timm, where a shortcut is otherwise a strided convolution.
        drop_rate, stochastic_depth, skip_init, skip_gain, eca, gamma_in_conv, padding, ws_eps, global_pool,
            features_only, out_indices: as in `NFNet`.
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
        activation: str = "relu",
        se_ratio: float | None = None,
        alpha: float = 0.2,
        skip_init: float = 0.0,
        skip_gain: bool = True,
        eca: bool = False,
        pool_shortcut: bool = False,
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
        channels = width[0] // 4
        self.stem = nn.Sequential()
        self.stem.add_module("conv", conv(in_channels, channels, 7, 2, input_scale=outer_scale))
        self.stem.add_module("pool", MaxPool(padding))

        stages = [Stage() for _ in range(4)]
        for stage, i, beta, rate in block_schedule(depth, alpha, stochastic_depth):
            block = NFResBlock(
                channels,
                width[stage],
                width[stage] // 4,
                stride=2 if stage > 0 and i == 0 else 1,
                beta=beta,
                alpha=alpha,
                activation=activation,
                se_ratio=se_ratio,
                eca=eca,
                pool_shortcut=pool_shortcut,
                stochastic_depth=rate,
                skip_init=skip_init if skip_gain else None,
                conv=conv,
            )
            stages[stage].append(block)
            channels = width[stage]
        self.stages = nn.Sequential(*stages)
        self.final_conv = nn.Identity()
        self._finish(num_classes, in_channels, drop_rate, global_pool, features_only, out_indices)
