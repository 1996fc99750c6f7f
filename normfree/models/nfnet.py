"""NFNets (Brock, De, Smith, Simonyan 2021, arXiv 2102.06171): F0 to F7, wide versions, and small ones of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree.config import InputError
from normfree.layers import Activation, SqueezeExcite, StochasticDepth, WSConv2d, init_normal_
from normfree.weights import ModelInfo

Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class Variant:
    """One row of the table. `published`: ImageNet top-1 at `eval_px` as the paper's Table 3 prints it."""

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
    "nfnet_f0": Variant((1, 2, 6, 3), 0.2, 192, 256, published="83.6 %"),
    "nfnet_f1": Variant((2, 4, 12, 6), 0.3, 224, 320, published="84.7 %"),
    "nfnet_f2": Variant((3, 6, 18, 9), 0.4, 256, 352, published="85.1 %"),
    "nfnet_f3": Variant((4, 8, 24, 12), 0.4, 320, 416, published="85.7 %"),
    "nfnet_f4": Variant((5, 10, 30, 15), 0.5, 384, 512, published="85.9 %"),
    "nfnet_f5": Variant((6, 12, 36, 18), 0.5, 416, 544, published="86.0 %"),
    "nfnet_f6": Variant((7, 14, 42, 21), 0.5, 448, 576, published="86.5 % with SAM"),
    "nfnet_f7": Variant((8, 16, 48, 24), 0.5, 480, 608),  # in the released code, not in the paper
}
VARIANTS |= {
    f"{name}_plus": replace(variant, width=(384, 768, 2048, 2048), published="") for name, variant in VARIANTS.items()
}
# Ours, sized for CPUs: 28 to 64 px and 64 to 128 px. They start with open branches: a run of a few thousand steps is
# over before AGC, which holds a parameter at 0 to gradients of λ * ε, has let the SkipInit gains grow (docs/log.md).
VARIANTS |= {
    "nfnet_nano": Variant(
        (1, 2, 3, 1), 0.1, 32, 32, (64, 128, 256, 256), 32, stem_channels=(16,), stem_strides=(1, 2), skip_init=1.0
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


class FeatureInfo(list[dict]):
    """timm's convention: one {num_chs, reduction, module} for each feature map, and the columns by name."""

    def channels(self) -> list[int]:
        return [row["num_chs"] for row in self]

    def reduction(self) -> list[int]:
        return [row["reduction"] for row in self]

    def module_name(self) -> list[str]:
        return [row["module"] for row in self]


class NFBlock(nn.Module):
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
        stochastic_depth: float,
        skip_init: float,
    ):
        super().__init__()
        self.act = Activation(activation)
        self.stride, self.alpha = stride, alpha
        gamma = self.act.gamma
        self.conv0 = WSConv2d(in_channels, mid_channels, 1, input_scale=beta * gamma)
        self.conv1 = WSConv2d(mid_channels, mid_channels, 3, stride, groups, input_scale=gamma)
        self.conv1b = WSConv2d(mid_channels, mid_channels, 3, 1, groups, input_scale=gamma) if second_conv else None
        self.conv2 = WSConv2d(mid_channels, out_channels, 1, input_scale=gamma)
        projects = stride > 1 or in_channels != out_channels
        self.conv_shortcut = WSConv2d(in_channels, out_channels, 1, input_scale=beta * gamma) if projects else None
        self.se = SqueezeExcite(out_channels, max(1, int(out_channels * se_ratio)))
        self.stochastic_depth = StochasticDepth(stochastic_depth)
        self.skip_gain = nn.Parameter(torch.tensor(float(skip_init)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(x)
        shortcut = x
        if self.conv_shortcut is not None:
            # 'SAME' average pooling leaves padding out of the mean, hence ceil_mode
            pooled = F.avg_pool2d(out, 2, 2, ceil_mode=True) if self.stride > 1 else out
            shortcut = self.conv_shortcut(pooled)
        out = self.act(self.conv1(self.act(self.conv0(out))))
        if self.conv1b is not None:
            out = self.act(self.conv1b(out))
        out = self.conv2(out)
        gate = self.stochastic_depth(self.se(out) * (self.skip_gain * (2 * self.alpha)))
        return torch.addcmul(shortcut, out, gate)


def make_classifier(in_features: int, num_classes: int) -> nn.Module:
    """Weights N(0, 0.01²), bias 0; no layer for no classes."""
    if not num_classes:
        return nn.Identity()
    fc = nn.Linear(in_features, num_classes)
    init_normal_(fc.weight, 0.01)
    nn.init.zeros_(fc.bias)
    return fc


class ClassifierHead(nn.Module):
    """Global average pool, dropout, linear layer: (N, C, H, W) -> (N, num_classes); num_classes 0: no linear layer."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float, scale: float):
        super().__init__()
        self.scale = scale
        self.drop = nn.Dropout(drop_rate)
        self.fc = make_classifier(in_features, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3)) * self.scale
        return pooled if pre_logits else self.fc(self.drop(pooled))


class NFNet(nn.Module):
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
        stochastic_depth: rate r; block i of n is skipped with probability r * i / n.
        features_only: return the list of feature maps `out_indices` of `feature_info` instead of logits.
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
        stem_channels: Sequence[int] = (16, 32, 64),
        stem_strides: Sequence[int] = (2, 1, 1, 2),
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        _check_options(width, depth, bottleneck_width, stem_channels, stem_strides, drop_rate, stochastic_depth)
        self.info: ModelInfo | None = None  # what a weight file says of this network; create_model and load set it
        self.num_classes, self.in_channels = num_classes, in_channels
        self.grad_checkpointing = False
        self.act = Activation(activation)
        gamma = self.act.gamma

        self.stem = nn.Sequential()
        channels, reduction = in_channels, 1
        for i, (out, stride) in enumerate(zip((*stem_channels, width[0] // 2), stem_strides, strict=True)):
            if i:
                self.stem.add_module(f"act{i}", Activation(activation))
            self.stem.add_module(f"conv{i}", WSConv2d(channels, out, 3, stride, input_scale=gamma if i else 1.0))
            channels, reduction = out, reduction * stride
        self._stem_tap = len(self.stem) - 3  # the convolution before the last
        tap = f"stem.conv{len(stem_channels) - 1}"
        self.feature_info = FeatureInfo(
            [dict(num_chs=stem_channels[-1], reduction=reduction // stem_strides[-1], module=tap)]
        )

        num_blocks, index, expected_var = sum(depth), 0, 1.0
        self.stages = nn.Sequential()
        for stage in range(4):
            stride = 1 if stage == 0 else 2
            reduction *= stride
            inner = bottleneck_width[stage] if bottleneck_width else width[stage] // 2
            groups = max(1, inner // group_width)
            if bottleneck_width is None and inner > group_width:
                inner = groups * group_width
            blocks = nn.Sequential()
            for i in range(depth[stage]):
                blocks.append(
                    NFBlock(
                        channels,
                        width[stage],
                        inner,
                        groups,
                        stride=stride if i == 0 else 1,
                        beta=expected_var**-0.5,
                        alpha=alpha,
                        activation=activation,
                        second_conv=second_conv,
                        se_ratio=se_ratio,
                        stochastic_depth=stochastic_depth * index / num_blocks,
                        skip_init=skip_init,
                    )
                )
                channels, index = width[stage], index + 1
                # a transition block's shortcut is a fresh convolution of unit variance
                expected_var = (1.0 if i == 0 else expected_var) + alpha**2
            self.stages.append(blocks)
            self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=f"stages.{stage}"))

        self.num_features = self.head_hidden_size = 2 * channels
        self.final_conv = WSConv2d(channels, self.num_features, 1)
        self.feature_info[-1] = dict(num_chs=self.num_features, reduction=reduction, module="final_conv")
        self.out_indices: tuple[int, ...] | None = None
        if features_only:
            self._select_features(range(5) if out_indices is None else out_indices)
        self.head = ClassifierHead(self.num_features, 0 if features_only else num_classes, drop_rate, scale=gamma)

    def _select_features(self, indices: Sequence[int]) -> None:
        if not indices or not all(-5 <= i < 5 for i in indices):
            raise InputError(f"out_indices {list(indices)}: this network has the feature maps 0 to 4")
        self.out_indices = tuple(sorted({i % 5 for i in indices}))
        self.feature_info = FeatureInfo(self.feature_info[i] for i in self.out_indices)
        # what no requested map needs is taken out, so that every parameter left has a gradient
        last = self.out_indices[-1]
        if last == 0:
            self.stem = self.stem[: self._stem_tap + 1]
        self.stages = self.stages[:last]
        if last < 4:
            del self.final_conv

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The feature maps of `feature_info`, before the activation that follows them (timm's taps)."""
        wanted = self.out_indices or range(5)
        x = self.stem[: self._stem_tap + 1](x)
        maps = [x] if 0 in wanted else []
        if wanted[-1] > 0:
            x = self.stem[self._stem_tap + 1 :](x)
        for i, stage in enumerate(self.stages, 1):
            x = self._run_stage(stage, x)
            if i in wanted:
                maps.append(self.final_conv(x) if i == 4 else x)
        return maps

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        for block in stage.children():
            rematerialize = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if rematerialize else block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_features, H / 32, W / 32) for F0 to F7, after the last activation.

        Its γ is applied by `forward_head`, after pooling.
        """
        x = self.stem(x)
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return self.act(self.final_conv(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, h, w) -> logits (N, num_classes), or pooled features (N, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.out_indices is not None:
            return self.forward_intermediates(x)
        return self.forward_head(self.forward_features(x))

    def count_macs(self, px: int) -> int:
        """Multiply-adds of convolutions and linear layers for one px x px image; the paper prints them as FLOPs."""
        total, side = 0, px
        for conv in self.stem.children():
            if isinstance(conv, WSConv2d):
                side = -(-side // conv.stride[0])
                total += side**2 * conv.weight.numel()
        for block in self.modules():
            if isinstance(block, NFBlock):
                total += side**2 * block.conv0.weight.numel()
                side = -(-side // block.stride)
                for conv in (block.conv1, block.conv1b, block.conv2, block.conv_shortcut):
                    total += side**2 * conv.weight.numel() if conv is not None else 0
                total += block.se.fc1.weight.numel() + block.se.fc2.weight.numel()
        total += side**2 * self.final_conv.weight.numel()
        return total + (self.head.fc.weight.numel() if isinstance(self.head.fc, nn.Linear) else 0)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for `num_classes` classes, on the device and in the dtype of the old network; 0: none."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head.fc = make_classifier(self.num_features, num_classes).to(like.device, like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable


def _check_options(width, depth, bottleneck_width, stem_channels, stem_strides, drop_rate, stochastic_depth) -> None:
    for name, four in (("width", width), ("depth", depth), ("bottleneck_width", bottleneck_width)):
        if four is not None and (len(four) != 4 or min(four) < 1):
            raise InputError(f"{name} {tuple(four)}: four positive numbers are needed, one a stage")
    if not stem_channels or len(stem_strides) != len(stem_channels) + 1:
        raise InputError(
            "stem_strides has one number more than stem_channels: the last convolution is width[0] / 2 wide"
        )
    for name, rate in (("drop_rate", drop_rate), ("stochastic_depth", stochastic_depth)):
        if not 0 <= rate < 1:
            raise InputError(f"{name} {rate}: a rate lies in [0, 1)")
