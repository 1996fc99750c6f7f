"""NF-ResNets (Brock, De, Smith 2021, arXiv 2101.08692): pre-activation bottleneck ResNets without normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normfree.config import Four
from normfree.layers import Activation, SqueezeExcite, StochasticDepth, WSConv2d
from normfree.models.network import (
    Block,
    ClassifierHead,
    FeatureInfo,
    Network,
    SameMaxPool,
    block_schedule,
    check_four,
    check_rates,
    conv_macs,
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
    """h + α · f(β · act(h)): 1x1, 3x3 (stride), 1x1, optionally squeeze-excite. Strided 1x1 shortcut at transitions."""

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
        stochastic_depth: float,
        skip_init: float,
    ):
        super().__init__()
        self.act = Activation(activation)
        self.stride, self.alpha = stride, alpha
        gamma = self.act.gamma
        self.conv0 = WSConv2d(in_channels, mid_channels, 1, input_scale=beta * gamma)
        self.conv1 = WSConv2d(mid_channels, mid_channels, 3, stride, input_scale=gamma)
        self.conv2 = WSConv2d(mid_channels, out_channels, 1, input_scale=gamma)
        projects = stride > 1 or in_channels != out_channels
        shortcut = WSConv2d(in_channels, out_channels, 1, stride, input_scale=beta * gamma) if projects else None
        self.conv_shortcut = shortcut
        self.se = None if se_ratio is None else SqueezeExcite(out_channels, max(1, int(out_channels * se_ratio)))
        self.stochastic_depth = StochasticDepth(stochastic_depth)
        self.skip_gain = nn.Parameter(torch.tensor(float(skip_init)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(out)
        out = self.act(self.conv1(self.act(self.conv0(out))))
        scale = self.skip_gain * self.alpha
        if self.se is not None:
            out = self.conv2(out)
            return torch.addcmul(shortcut, out, self.stochastic_depth(self.se(out) * (2 * scale)))
        out = self.conv2(out, output_scale=scale)
        return shortcut + self.stochastic_depth(out)

    def count_macs(self, side: int) -> int:
        out_side = -(-side // self.stride)
        se = 0 if self.se is None else self.se.fc1.weight.numel() + self.se.fc2.weight.numel()
        convs = (self.conv1, self.conv2, self.conv_shortcut)
        return conv_macs(self.conv0, side) + sum(conv_macs(conv, out_side) for conv in convs) + se


class NFResNet(Network):
    """Stem (7x7 convolution and maximum, both stride 2), four stages of `NFResBlock`, activation, classifier.

    Args:
        width, depth: output channels and number of blocks of the four stages; a quarter of the width is the width
            inside the blocks, and of the first stage's that of the stem.
        se_ratio: squeeze-excite with this share of the channels, 0.25 in the released code; None: without.
        drop_rate, stochastic_depth, skip_init, features_only, out_indices: as in `NFNet`.
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
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        check_four(width=width, depth=depth)
        check_rates(drop_rate=drop_rate, stochastic_depth=stochastic_depth)
        self.act = Activation(activation)
        channels = width[0] // 4
        self.stem = nn.Sequential()
        self.stem.add_module("conv", WSConv2d(in_channels, channels, 7, 2))
        self.stem.add_module("pool", SameMaxPool())
        self.feature_tap = "stem.conv"
        taps = [dict(num_chs=channels, reduction=2, module=self.feature_tap)]

        stages = [nn.Sequential() for _ in range(4)]
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
                stochastic_depth=rate,
                skip_init=skip_init,
            )
            stages[stage].append(block)
            channels = width[stage]
        self.stages = nn.Sequential(*stages)
        taps += [dict(num_chs=width[i], reduction=4 * 2**i, module=f"stages.{i}") for i in range(4)]
        self.feature_info = FeatureInfo(taps)
        self.final_conv = nn.Identity()
        head = ClassifierHead(channels, num_classes, drop_rate, scale=self.act.gamma)
        self._finish(num_classes, in_channels, channels, head, features_only, out_indices)
