"""The batch-normalized baselines: pre-activation ResNets (BN, then ReLU), and NFNet-F with BN instead of NF parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from normfree import functional
from normfree.layers import ACTIVATIONS, Conv2d, SqueezeExcite, StochasticDepth, init_normal_
from normfree.models import nf_resnet, nfnet
from normfree.models.network import (
    Block,
    MaxPool,
    Network,
    Stage,
    block_schedule,
    check_four,
    check_rates,
    check_stem,
    same_avg_pool,
)

RESNET_VARIANTS = {f"bn_resnet{depth}": nf_resnet.VARIANTS[f"nf_resnet{depth}"] for depth in (50, 101, 152, 200)}
# the "-NF, +BN" ablation (Table 6), and the twins of our small networks
NFNET_VARIANTS = {
    f"bn_{name}": replace(nfnet.VARIANTS[name], published=published)
    for name, published in {
        "nfnet_f0": "83.4 % (paper)",
        "nfnet_f1": "84.4 % (paper)",
        "nfnet_f2": "85.1 % (paper)",
        "nfnet_f3": "85.5 % (paper)",
        "nfnet_nano": "",
        "nfnet_micro": "",
    }.items()
}


class SameConv2d(Conv2d):
    """2-D convolution without bias, with TensorFlow's 'SAME' padding and haiku's default initialisation."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, "same", groups=groups, bias=False)

    def reset_parameters(self) -> None:
        """Normal of variance 1 / fan-in, truncated at two standard deviations."""
        init_normal_(self.weight, self.weight[0].numel() ** -0.5, truncated=True)


class BNAct(nn.Module):
    """Batch normalization, then the activation (without γ): the order of the published baselines."""

    def __init__(self, channels: int, activation: str):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)
        self.function = ACTIVATIONS[activation][0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return self.function(self.bn(x))


class BNResBlock(Block):
    """h + f(h), pre-activation bottleneck: 1x1, 3x3 (stride), 1x1, each after BN and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, projects: bool, activation: str):
        super().__init__()
        self.stride = stride
        mid = out_channels // 4
        self.act0, self.act1, self.act2 = (BNAct(c, activation) for c in (in_channels, mid, mid))
        self.conv0 = SameConv2d(in_channels, mid, 1)
        self.conv1 = SameConv2d(mid, mid, 3, stride)
        self.conv2 = SameConv2d(mid, out_channels, 1)
        self.conv_shortcut = SameConv2d(in_channels, out_channels, 1, stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        out = self.act0(x)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(out)
        out = self.conv1(self.act1(self.conv0(out)))
        return self.conv2(self.act2(out)) + shortcut

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch of x."""
        return self.conv2(self.act2(self.conv1(self.act1(self.conv0(self.act0(x))))))


class BNResNet(Network):
    """The BN twin of `NFResNet`: released code, resnet.py. Averages of the statistics have momentum 0.1 (decay 0.9)."""

    final_norm = True

    def __init__(
        self,
        width: Sequence[int],
        depth: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        drop_rate: float = 0.0,
        activation: str = "relu",
        global_pool: str = "avg",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        check_four(width=width, depth=depth)
        check_rates(drop_rate=drop_rate)
        channels = width[0] // 4
        self.stem = nn.Sequential()
        self.stem.add_module("conv", SameConv2d(in_channels, channels, 7, 2))
        self.stem.add_module("pool", MaxPool())
        stages = [Stage() for _ in range(4)]
        for stage, i, _, _ in block_schedule(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            stages[stage].append(BNResBlock(channels, width[stage], stride, projects=i == 0, activation=activation))
            channels = width[stage]
        self.stages = nn.Sequential(*stages)
        self.final_conv = nn.Identity()
        self.act = BNAct(channels, activation)
        self._finish(num_classes, in_channels, drop_rate, global_pool, features_only, out_indices, std=0.0)


class BNNFNetBlock(Block):
    """`NFBlock` with BN before each activation, and without scaled weights, γ, β, α, SkipInit and the factor 2."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        group_width: int,
        stride: int,
        activation: str,
        stochastic_depth: float,
    ):
        super().__init__()
        self.stride = stride
        groups = max(1, out_channels // 2 // group_width)
        mid = groups * min(group_width, out_channels // 2)
        self.act0 = BNAct(in_channels, activation)
        self.act1, self.act1b, self.act2 = (BNAct(mid, activation) for _ in range(3))
        self.conv0 = SameConv2d(in_channels, mid, 1)
        self.conv1 = SameConv2d(mid, mid, 3, stride, groups)
        self.conv1b = SameConv2d(mid, mid, 3, 1, groups)
        self.conv2 = SameConv2d(mid, out_channels, 1)
        projects = stride > 1 or in_channels != out_channels
        self.conv_shortcut = SameConv2d(in_channels, out_channels, 1) if projects else None
        self.se = SqueezeExcite(out_channels, out_channels // 2)
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        out = self.act0(x)
        shortcut = x
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(same_avg_pool(out) if self.stride > 1 else out)
        out = self.conv1b(self.act1b(self.conv1(self.act1(self.conv0(out)))))
        out = self.conv2(self.act2(out))
        return functional.gated_sum(shortcut, out, self.stochastic_depth(self.se(out)))

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch of x, before stochastic depth."""
        out = self.conv1b(self.act1b(self.conv1(self.act1(self.conv0(self.act0(x))))))
        out = self.conv2(self.act2(out))
        return out * self.se(out)


class BNNFNet(Network):
    """NFNet-F as a batch-normalized network, the last row of the paper's Table 6.

    Its code was not released: the order BN, then activation, follows the published ResNets, everything else NFNet-F.
    """

    final_norm = True

    def __init__(
        self,
        width: Sequence[int],
        depth: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        drop_rate: float = 0.0,
        stochastic_depth: float = 0.25,
        activation: str = "gelu",
        group_width: int = 128,
        stem_channels: Sequence[int] = (16, 32, 64),
        stem_strides: Sequence[int] = (2, 1, 1, 2),
        global_pool: str = "avg",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        check_four(width=width, depth=depth)
        check_rates(drop_rate=drop_rate, stochastic_depth=stochastic_depth)
        check_stem(stem_channels, stem_strides)
        self.stem = nn.Sequential()
        channels = in_channels
        for i, (out, stride) in enumerate(zip((*stem_channels, width[0] // 2), stem_strides, strict=True)):
            if i:
                self.stem.add_module(f"act{i}", BNAct(channels, activation))
            self.stem.add_module(f"conv{i}", SameConv2d(channels, out, 3, stride))
            channels = out
        stages = [Stage() for _ in range(4)]
        for stage, i, _, rate in block_schedule(depth, rate=stochastic_depth):
            stride = 2 if stage > 0 and i == 0 else 1
            stages[stage].append(BNNFNetBlock(channels, width[stage], group_width, stride, activation, rate))
            channels = width[stage]
        self.stages = nn.Sequential(*stages)
        self.final_conv = SameConv2d(channels, 2 * channels, 1)
        self.act = BNAct(2 * channels, activation)
        self._finish(num_classes, in_channels, drop_rate, global_pool, features_only, out_indices)
