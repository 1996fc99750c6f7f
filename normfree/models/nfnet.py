"""NFNets (Brock, De, Smith, Simonyan 2021, arXiv 2102.06171): F0 to F7, wide versions, and small ones of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from normfree import functional
from normfree.config import Four
from normfree.layers import Activation, EfficientChannelAttention, SqueezeExcite, StochasticDepth, WSConv2d, convolve
from normfree.models.network import (
    Block,
    Network,
    Stage,
    Stem,
    block_schedule,
    check_four,
    check_padding,
    check_rates,
    check_stem,
)


@dataclass(frozen=True)
class Variant:
    """One row of the table. `published`: ImageNet top-1 at `eval_px`, with who printed it."""

    depth: Four
    drop_rate: float
    train_px: int
    eval_px: int
    width: Four = (256, 512, 1536, 1536)
    group_width: int = 128
    stem_channels: tuple[int, ...] = (16, 32, 64)
    stem_strides: tuple[int, ...] = (2, 1, 1, 2)
    skip_init: float = 0.0
    published: str = ""


VARIANTS: dict[str, Variant] = {
    "nfnet_f0": Variant((1, 2, 6, 3), 0.2, 192, 256, published="83.6 % (paper)"),
    "nfnet_f1": Variant((2, 4, 12, 6), 0.3, 224, 320, published="84.7 % (paper)"),
    "nfnet_f2": Variant((3, 6, 18, 9), 0.4, 256, 352, published="85.1 % (paper)"),
    "nfnet_f3": Variant((4, 8, 24, 12), 0.4, 320, 416, published="85.7 % (paper)"),
    "nfnet_f4": Variant((5, 10, 30, 15), 0.5, 384, 512, published="85.9 % (paper)"),
    "nfnet_f5": Variant((6, 12, 36, 18), 0.5, 416, 544, published="86.0 % (paper)"),
    "nfnet_f6": Variant((7, 14, 42, 21), 0.5, 448, 576, published="86.5 % with SAM (paper)"),
    "nfnet_f7": Variant((8, 16, 48, 24), 0.5, 480, 608),  # in the released code, not in the paper
}
VARIANTS |= {
    f"{name}_plus": replace(variant, width=(384, 768, 2048, 2048), published="") for name, variant in VARIANTS.items()
}
# Ours, sized for CPUs: 28 to 64 px and 64 to 128 px. They start with open branches: a run of a few thousand steps is
# over before AGC, which holds a parameter at 0 to gradients of λ * ε, has let the SkipInit gains grow (docs/log.md).
VARIANTS |= {
    "nfnet_nano": Variant(
        (1, 2, 3, 1), 0.1, 32, 32, (64, 128, 256, 256), 128, stem_channels=(16,), stem_strides=(1, 2), skip_init=1.0
    ),
    "nfnet_micro": Variant(
        (1, 2, 4, 2),
        0.2,
        96,
        128,
        (64, 128, 256, 384),
        32,
        stem_channels=(16, 32),
        stem_strides=(2, 1, 2),
        skip_init=1.0,
    ),
}


@dataclass(frozen=True)
class LightVariant(Variant):
    """timm's networks for one GPU, with timm's arithmetic; not of the paper. `published`: by timm, at `eval_px`."""

    width: Four = (256, 512, 1536, 1536)
    group_width: int = 64
    bottleneck_width: Four = (64, 128, 384, 384)
    final_width: int = 3072
    activation: str = "silu"
    se_ratio: float = 0.25
    eca: bool = True
    stochastic_depth: float = 0.0
    skip_gain: bool = False
    gamma_in_conv: bool = True
    padding: str = "symmetric"
    ws_eps: float = 1e-5
    stem_width: int | None = None


LIGHT_VARIANTS: dict[str, LightVariant] = {
    "nfnet_l0": LightVariant((1, 2, 6, 3), 0.0, 224, 288, final_width=2304, eca=False, published="82.8 % (timm)"),
    "eca_nfnet_l0": LightVariant((1, 2, 6, 3), 0.0, 224, 288, final_width=2304, published="82.6 % (timm)"),
    "eca_nfnet_l1": LightVariant((2, 4, 12, 6), 0.0, 256, 320, published="84.0 % (timm)"),
    "eca_nfnet_l2": LightVariant((3, 6, 18, 9), 0.0, 320, 384, published="84.7 % (timm)"),
    "test_nfnet": LightVariant(  # to try things out
        (1, 1, 1, 1),
        0.0,
        160,
        160,
        (32, 64, 96, 128),
        8,
        bottleneck_width=(8, 16, 24, 32),
        final_width=192,
        eca=False,
        stem_width=128,
    ),
}


class NFBlock(Block):
    """Residual bottleneck h + α · f(β · act(h)): 1x1, grouped 3x3 (stride), grouped 3x3, 1x1, squeeze-excite.

    (N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)). The shortcut of a transition block starts from the
    scaled activation, that of any other is the identity on h. β follows the activation, as in the released code; the
    paper's formula has it before.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        groups: int,
        stride: int,
        beta: float,
        alpha: float,
        activation: str,
        second_conv: bool,
        se_ratio: float,
        eca: bool,
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
        self.conv1b = conv(mid_channels, mid_channels, 3, groups=groups, input_scale=gamma) if second_conv else None
        self.conv2 = conv(mid_channels, out_channels, 1, input_scale=gamma)
        projects = stride > 1 or in_channels != out_channels
        self.conv_shortcut = conv(in_channels, out_channels, 1, input_scale=beta * gamma) if projects else None
        hidden = max(1, int(out_channels * se_ratio))
        self.se = EfficientChannelAttention(out_channels) if eca else SqueezeExcite(out_channels, hidden)
        self.stochastic_depth = StochasticDepth(stochastic_depth)
        self._add_skip_gain(skip_init, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        shortcut = self._shortcut(x, pools=self.stride > 1)
        out = self._convolve(x)
        scale = 2 * self.alpha if self.skip_gain is None else self.skip_gain * (2 * self.alpha)
        return functional.gated_sum(shortcut, out, self.stochastic_depth(self.se(out) * scale))

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch of x, before stochastic depth, SkipInit gain and α."""
        out = self._convolve(x)
        return out * (2 * self.se(out))

    def _convolve(self, x: Tensor) -> Tensor:
        out = convolve(self.conv1, convolve(self.conv0, x, self.act), self.act)
        if self.conv1b is not None:
            out = convolve(self.conv1b, out, self.act)
        return convolve(self.conv2, out, self.act)


class NFNet(Network):
    """The network of the paper's section 5: stem, four stages of `NFBlock`, a 1x1 convolution, classifier.

    Images (N, in_channels, H, W), normalized, any H and W from 32 px up -> logits (N, num_classes).

    Args:
        width, depth: output channels and number of blocks of the four stages.
        group_width: channels in one group of the 3x3 convolutions. Half of a stage's width, rounded down to a multiple
            of it, is the width inside its blocks.
        bottleneck_width: those four inner widths themselves; the paper's F4+ is (192, 384, 1024, 1024).
        drop_rate: dropout before the classifier, in [0, 1).
        skip_init: first value of the SkipInit gains. 0 makes all but transition blocks the identity, which very deep
            networks need; 1 gives activations the variance that β expects.
        skip_gain: False: no such gains (`skip_init` is void), and the last convolution's gains start at 0, as in timm.
        eca: efficient channel attention in place of squeeze-excite.
        final_width: output channels of the last convolution; None: twice `width[3]`.
        gamma_in_conv: γ multiplies every convolution, the first and the last too, in place of every activation, as in
            timm's `nfnet_*`, `nf_resnet*`, `nf_regnet_*`.
        padding: of strided convolutions: "same" as TensorFlow and the released weights, or "symmetric" as PyTorch.
        ws_eps: weight standardization's epsilon, timm's way; None: the released code's (`WSConv`).
        stochastic_depth: rate r; block i of n is skipped with probability r * i / n.
        global_pool: "avg", or "" for the maps themselves, with `num_classes` 0.
        features_only: return the list of feature maps `out_indices` of `feature_info` instead of logits; an integer
            n as `out_indices` is the last n.
    """

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
        second_conv: bool = True,
        group_width: int = 128,
        bottleneck_width: Sequence[int] | None = None,
        se_ratio: float = 0.5,
        alpha: float = 0.2,
        skip_init: float = 0.0,
        skip_gain: bool = True,
        eca: bool = False,
        final_width: int | None = None,
        stem_channels: Sequence[int] = (16, 32, 64),
        stem_strides: Sequence[int] = (2, 1, 1, 2),
        stem_width: int | None = None,
        gamma_in_conv: bool = False,
        padding: str = "same",
        ws_eps: float | None = None,
        global_pool: str = "avg",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        check_four(width=width, depth=depth, bottleneck_width=bottleneck_width)
        check_rates(drop_rate=drop_rate, stochastic_depth=stochastic_depth)
        check_stem(stem_channels, stem_strides)
        check_padding(padding)
        self.act = Activation(activation, scaled=not gamma_in_conv)
        gamma = self.act.gamma
        outer_scale = gamma if gamma_in_conv else 1.0
        conv = partial(WSConv2d, padding=padding, eps=ws_eps)

        self.stem = Stem()
        channels = in_channels
        for i, (out, stride) in enumerate(
            zip((*stem_channels, stem_width or width[0] // 2), stem_strides, strict=True)
        ):
            if i:
                self.stem.add_module(f"act{i}", Activation(activation))
            self.stem.add_module(f"conv{i}", conv(channels, out, 3, stride, input_scale=gamma if i else outer_scale))
            channels = out

        stages = [Stage() for _ in range(4)]
        for stage, i, beta, rate in block_schedule(depth, alpha, stochastic_depth):
            inner = bottleneck_width[stage] if bottleneck_width else width[stage] // 2
            groups = max(1, inner // group_width)
            if bottleneck_width is None and inner > group_width:
                inner = groups * group_width
            stages[stage].append(
                NFBlock(
                    channels,
                    width[stage],
                    inner,
                    groups,
                    stride=2 if stage > 0 and i == 0 else 1,
                    beta=beta,
                    alpha=alpha,
                    activation=activation,
                    second_conv=second_conv,
                    se_ratio=se_ratio,
                    eca=eca,
                    stochastic_depth=rate,
                    skip_init=skip_init if skip_gain else None,
                    conv=conv,
                )
            )
            channels = width[stage]
        self.stages = nn.Sequential(*stages)
        self.final_conv = conv(channels, final_width or 2 * channels, 1, input_scale=outer_scale)
        self._finish(num_classes, in_channels, drop_rate, global_pool, features_only, out_indices)
