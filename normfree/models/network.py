"""What all networks share: a stem, four stages of blocks, a head, and timm's interface to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree import functional
from normfree.config import InputError
from normfree.layers import Activation, WSConv2d, init_normal_, same_padding
from normfree.weights import ModelInfo


class FeatureInfo(list[dict]):
    """timm's convention: one {num_chs, reduction, module} for each feature map, and the columns by name."""

    def channels(self) -> list[int]:
        return [row["num_chs"] for row in self]

    def reduction(self) -> list[int]:
        return [row["reduction"] for row in self]

    def module_name(self) -> list[str]:
        return [row["module"] for row in self]


def make_classifier(in_features: int, num_classes: int, std: float) -> nn.Module:
    """Weights N(0, std²), bias 0; no layer for no classes."""
    if not num_classes:
        return nn.Identity()
    fc = nn.Linear(in_features, num_classes)
    init_normal_(fc.weight, std)
    nn.init.zeros_(fc.bias)
    return fc


class ClassifierHead(nn.Module):
    """Global average pool, dropout, linear layer: (N, C, H, W) -> (N, num_classes); num_classes 0: no linear layer.

    `scale` multiplies the pooled features; `std` is the deviation of a new classifier's weights.
    """

    def __init__(self, in_features: int, num_classes: int, drop_rate: float, scale: float = 1.0, std: float = 0.01):
        super().__init__()
        self.scale, self.std = scale, std
        self.drop = nn.Dropout(drop_rate)
        self.fc = make_classifier(in_features, num_classes, std)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = functional.spatial_mean(x) * self.scale
        return pooled if pre_logits else self.fc(self.drop(pooled))


class Block(nn.Module):
    """A residual block: (N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""

    stride: int
    conv_shortcut: nn.Module | None  # None: the shortcut is the identity

    def branch(self, x: Tensor) -> Tensor:
        """The end of the residual branch: after squeeze-excite, before stochastic depth, SkipInit gain and α."""
        raise NotImplementedError

    def count_macs(self, side: int) -> int:
        """Multiply-adds for an input of side x side pixels."""
        raise NotImplementedError


def conv_macs(conv: nn.Module | None, side: int) -> int:
    """Multiply-adds of a convolution whose output is side x side pixels; 0 for none."""
    return side**2 * conv.weight.numel() if isinstance(conv, nn.Conv2d) else 0


class MaxPool(nn.Module):
    """3x3 maximum with stride 2; `padding` "same" as TensorFlow places it, or "symmetric" as PyTorch does."""

    def __init__(self, padding: str = "same"):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == "symmetric":
            return F.max_pool2d(x, 3, 2, 1)
        if not torch.compiler.is_compiling():
            return F.max_pool2d(x, 3, 2, (x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)
        # the same for sides that are not yet known
        (top, bottom), (left, right) = (same_padding(side, 3, 2) for side in x.shape[-2:])
        return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), 3, 2)


def same_avg_pool(x: Tensor) -> Tensor:
    """2x2 mean with stride 2 and 'SAME' padding, which is left out of the mean."""
    if not torch.compiler.is_exporting():
        return functional.avg_pool2x2(x)
    # the same for sides that are not yet known: what is repeated past an even side is in no window
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 2)


class BuffersKept:
    """Context that hands the buffers of `module`, such as running averages, back as it found them."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.kept = [buffer.clone() for buffer in self.module.buffers()]

    def __exit__(self, *error: object) -> None:
        for buffer, kept in zip(self.module.buffers(), self.kept, strict=True):
            buffer.copy_(kept)


def rematerialize(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, computed once more in the backward pass, where no running average counts the batch again."""
    if torch.compiler.is_compiling():  # the compiler repeats no update, and takes no context
        return checkpoint(block, x, use_reentrant=False)
    contexts = nullcontext(), BuffersKept(block)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


class Stem(nn.Sequential):
    """Convolutions in a row, and activations, each of which is the next convolution's to compute."""

    def forward(self, input: Tensor) -> Tensor:
        before = None
        for layer in self:
            if isinstance(layer, Activation):
                before = layer
            else:
                input, before = layer(input, before=before), None
        return input


class Stage(nn.Sequential):
    """Blocks in a row; with `grad_checkpointing` each is computed once more in the backward pass."""

    grad_checkpointing = False

    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            input = rematerialize(block, input) if self.grad_checkpointing and torch.is_grad_enabled() else block(input)
        return input


class Network(nn.Module):
    """A network of stem, stages, final convolution or none, activation, head.

    Images (N, in_channels, H, W), normalized, any H and W from 32 px up -> logits (N, num_classes), or the list of
    feature maps `out_indices` of `feature_info` where `features_only` was asked for. Subclasses build the parts and
    call `_finish`.
    """

    stem: nn.Sequential
    stages: nn.Sequential
    final_conv: nn.Module
    act: nn.Module
    head: ClassifierHead
    feature_info: FeatureInfo
    feature_tap: str  # name of the stem's layer whose output is feature map 0
    info: ModelInfo | None = None  # what a weight file says of this network; create_model and load set it
    out_indices: tuple[int, ...] | None = None

    def _finish(
        self,
        num_classes: int,
        in_channels: int,
        num_features: int,
        head: ClassifierHead,
        features_only: bool,
        out_indices: Sequence[int] | None,
    ) -> None:
        self.num_classes, self.in_channels = num_classes, in_channels
        self.num_features = self.head_hidden_size = num_features
        self.head = head
        if features_only:
            self._select_features(range(5) if out_indices is None else out_indices)

    @property
    def _stem_tap(self) -> int:
        """Its place in `stem`."""
        return [name for name, _ in self.stem.named_children()].index(self.feature_tap.removeprefix("stem."))

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
            self.final_conv = nn.Identity()
        self.act = nn.Identity()
        self.head.fc = nn.Identity()

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The feature maps of `feature_info`, before the activation that follows them (timm's taps)."""
        wanted = self.out_indices or range(5)
        x = self.stem[: self._stem_tap + 1](x)
        maps = [x] if 0 in wanted else []
        if wanted[-1] > 0:
            x = self.stem[self._stem_tap + 1 :](x)
        for i, stage in enumerate(self.stages, 1):
            x = stage(x)
            if i in wanted:
                maps.append(self.final_conv(x) if i == 4 else x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_features, H / 32, W / 32), after the last activation.

        Its γ is applied by `forward_head`, after pooling.
        """
        return self.act(self.final_conv(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, h, w) -> logits (N, num_classes), or pooled features (N, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.out_indices is not None:
            return self.forward_intermediates(x)
        return self.forward_head(self.forward_features(x))

    def count_macs(self, px: int) -> int:
        """Multiply-adds of convolutions and linear layers for one px x px image; the papers print them as FLOPs."""
        total, side = 0, px
        for layer in self.stem.children():
            if isinstance(layer, nn.Conv2d | MaxPool):
                side = -(-side // (layer.stride[0] if isinstance(layer, nn.Conv2d) else 2))
                total += conv_macs(layer, side)
        for block in self.modules():
            if isinstance(block, Block):
                total += block.count_macs(side)
                side = -(-side // block.stride)
        total += conv_macs(self.final_conv, side)
        return total + (self.head.fc.weight.numel() if isinstance(self.head.fc, nn.Linear) else 0)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for `num_classes` classes, on the device and in the dtype of the old network; 0: none."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head.fc = make_classifier(self.num_features, num_classes, self.head.std).to(like.device, like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable


def block_schedule(depth: Sequence[int], alpha: float, rate: float) -> Iterator[tuple[int, int, float, float]]:
    """(stage, index in the stage, β, stochastic-depth rate) of every block of a normalizer-free network.

    β is one over the deviation that the block's input has at initialisation: its variance starts at 1, grows by α² a
    block, and starts anew after the first block of a stage, whose shortcut is a fresh convolution. Of n blocks, block i
    is skipped with probability rate * i / n. Paper section 3; released code.
    """
    index, expected_var = 0, 1.0
    for stage in range(4):
        for i in range(depth[stage]):
            yield stage, i, expected_var**-0.5, rate * index / sum(depth)
            index += 1
            expected_var = (1.0 if i == 0 else expected_var) + alpha**2


def make_skip_gain(skip_init: float | None, last_conv: WSConv2d) -> nn.Parameter | None:
    """The SkipInit gain of a block; None for None, and then the gains of its last convolution start at 0 (timm)."""
    if skip_init is not None:
        return nn.Parameter(torch.tensor(float(skip_init)))
    nn.init.zeros_(last_conv.gain)
    return None


def check_four(**options: Sequence[int] | None) -> None:
    """InputError unless each option is None or four positive numbers."""
    for name, four in options.items():
        if four is not None and (len(four) != 4 or min(four) < 1):
            raise InputError(f"{name} {tuple(four)}: four positive numbers are needed, one a stage")


def check_padding(padding: str) -> None:
    """InputError unless `padding` is one of the two ways."""
    if padding not in ("same", "symmetric"):
        raise InputError(f'padding {padding!r}: "same" or "symmetric"')


def check_stem(channels: Sequence[int], strides: Sequence[int]) -> None:
    if not channels or len(strides) != len(channels) + 1:
        raise InputError("stem_strides has one number more than stem_channels; the last is for width[0] / 2 channels")


def check_rates(**options: float) -> None:
    """InputError unless each option lies in [0, 1)."""
    for name, rate in options.items():
        if not 0 <= rate < 1:
            raise InputError(f"{name} {rate}: a rate lies in [0, 1)")
