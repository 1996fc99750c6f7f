"""What all networks share: a stem, four stages of blocks, a head, and timm's interface to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree import functional
from normfree.errors import InputError
from normfree.layers import (
    REUSED,
    Activation,
    EfficientChannelAttention,
    Linear,
    SqueezeExcite,
    WSConv2d,
    convolve,
    same_padding,
)
from normfree.weights import ModelInfo


class FeatureInfo(list[dict]):
    """timm's convention: one {num_chs, reduction, module, index} for each feature map.

    Methods describe the map or maps `idx`; by default those that the network returns, `out_indices`.
    """

    def __init__(self, rows: Iterable[dict] = (), out_indices: Sequence[int] | None = None):
        super().__init__({**row, "index": i} for i, row in enumerate(rows))
        self.out_indices = tuple(range(len(self)) if out_indices is None else out_indices)

    @property
    def info(self) -> list[dict]:
        """The rows as a plain list."""
        return list(self)

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """The rows of the maps, reduced to `keys` if given; one row for an integer `idx`."""
        if isinstance(idx, int):
            return self[idx] if keys is None else {key: self[idx][key] for key in keys}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """The values of `key`; one value for an integer `idx`."""
        return self[idx][key] if isinstance(idx, int) else [row[key] for row in self.get_dicts(idx=idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """The number of channels of the maps."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """By how much the maps are smaller than the image."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """The names of the modules whose outputs the maps are."""
        return self.get("module", idx)


class ClassifierHead(nn.Module):
    """Global average pool, dropout, linear layer: (N, C, H, W) -> (N, num_classes); num_classes 0: no linear layer.

    `global_pool` "" leaves out pooling, for maps (N, C, H, W). `std` is the standard deviation of a new classifier's
    weights; its bias is 0.
    """

    def __init__(
        self, in_features: int, num_classes: int, drop_rate: float, global_pool: str = "avg", std: float = 0.01
    ):
        super().__init__()
        self.global_pool, self.std = global_pool, std
        self.drop = nn.Dropout(drop_rate)
        self.reset(in_features, num_classes)

    def reset(self, in_features: int, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; None keeps the pooling."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in ("avg", ""):
            raise InputError(f'global_pool {global_pool!r}: "avg", or "" for maps')
        if num_classes < 0 or (num_classes and not global_pool):
            raise InputError(f'num_classes {num_classes}: 0 or more, and 0 with global_pool ""')
        self.global_pool, self.fc = global_pool, nn.Identity()
        if num_classes:
            self.fc = Linear(in_features, num_classes)
            self.fc.initialize(self.std)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes), or with `pre_logits` pooled features (N, C)."""
        pooled = functional.spatial_mean(x) if self.global_pool else x
        return pooled if pre_logits else self.fc(self.drop(pooled))


class Block(nn.Module):
    """A residual block: (N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""

    stride: int
    act: Activation
    conv_shortcut: nn.Module | None  # None: the shortcut is the identity
    skip_init: float | None = None  # first value of the SkipInit gain, where there is one

    def _add_skip_gain(self, skip_init: float | None, last_conv: WSConv2d) -> None:
        """The SkipInit gain; None for None, and then the gains of the last convolution start at 0 (timm)."""
        self.skip_init = skip_init
        self.skip_gain = None if skip_init is None else nn.Parameter(torch.tensor(float(skip_init)))
        if skip_init is None:
            last_conv.initial_gain = 0.0
            nn.init.zeros_(last_conv.gain)

    def reset_parameters(self) -> None:
        """The block's own: the SkipInit gain."""
        if self.skip_init is not None:
            nn.init.constant_(cast(Tensor, self.skip_gain), self.skip_init)

    def _shortcut(self, x: Tensor, pools: bool) -> Tensor:
        """x, or its projection; `pools`: after a 2x2 mean."""
        if self.conv_shortcut is None:
            return x
        return self.conv_shortcut(same_avg_pool(self.act(x))) if pools else convolve(self.conv_shortcut, x, self.act)

    def branch(self, x: Tensor) -> Tensor:
        """The end of the residual branch: after squeeze-excite, before stochastic depth, SkipInit gain and α."""
        raise NotImplementedError

    def count_macs(self, side: int) -> int:
        """Multiply-adds for an input of side x side pixels; all convolutions but `conv0` put out the block's size."""
        macs = 0
        for name, layer in self.named_children():
            macs += conv_macs(layer, side if name == "conv0" else -(-side // self.stride))
            macs += layer.count_macs() if isinstance(layer, SqueezeExcite | EfficientChannelAttention) else 0
        return macs


def conv_macs(layer: nn.Module, side: int) -> int:
    """Multiply-adds of a convolution whose output is side x side pixels; 0 for other layers."""
    return side**2 * layer.weight.numel() if isinstance(layer, nn.Conv2d) else 0


class MaxPool(nn.Module):
    """3x3 maximum with stride 2; `padding` "same" as TensorFlow places it, or "symmetric" as PyTorch does."""

    stride = (2, 2)

    def __init__(self, padding: str = "same"):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""
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


class Recomputation:
    """Context for recomputing `module`, possibly in another thread, with the weights of the first time.

    Buffers, such as running averages, are restored.
    """

    def __init__(self, module: nn.Module):
        self.module, self.reused = module, REUSED.get()

    def __enter__(self) -> None:
        self.token = REUSED.set(self.reused)
        self.kept = [buffer.clone() for buffer in self.module.buffers()]

    def __exit__(self, *error: object) -> None:
        REUSED.reset(self.token)
        for buffer, kept in zip(self.module.buffers(), self.kept, strict=True):
            buffer.copy_(kept)


def rematerialize(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)` with activation checkpointing; running averages count the batch once."""
    if torch.compiler.is_compiling():  # the compiler repeats no update, and does not accept a context
        return checkpoint(block, x, use_reentrant=False)
    contexts = nullcontext(), Recomputation(block)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


def run_stem(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Applies layers in sequence; each activation is computed by the convolution after it."""
    before = None
    for layer in layers:
        if isinstance(layer, Activation):
            before = layer
        else:
            x, before = convolve(layer, x, before), None
    return x


class Stem(nn.Sequential):
    """A sequence of convolutions and activations."""

    def forward(self, input: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) -> (N, C, h, w)."""
        return run_stem(self, input)


class Stage(nn.Sequential):
    """A sequence of blocks; with `grad_checkpointing` each is recomputed in the backward pass."""

    grad_checkpointing = False

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, h, w)."""
        for block in self:
            input = rematerialize(block, input) if self.grad_checkpointing and torch.is_grad_enabled() else block(input)
        return input


class Network(nn.Module):
    """A network of stem, stages, final convolution or none, activation, head.

    Images (N, in_channels, H, W), normalized, any H and W from 32 px up -> logits (N, num_classes), or the list of
    feature maps `out_indices` of `feature_info` if `features_only`. Subclasses build the parts and call `_finish`.
    """

    stem: nn.Sequential
    stages: nn.Sequential
    final_conv: nn.Module
    act: nn.Module
    head: ClassifierHead
    feature_info: FeatureInfo
    info: ModelInfo | None = None  # what a weight file says of this network; create_model and load set it
    out_indices: tuple[int, ...] | None = None
    final_norm = False  # whether `act` normalizes
    head_only = False

    def _finish(
        self,
        num_classes: int,
        in_channels: int,
        drop_rate: float,
        global_pool: str,
        features_only: bool,
        out_indices: Sequence[int] | None,
        std: float = 0.01,
    ) -> None:
        """Adds the head, whose weights have the standard deviation `std`, and `feature_info`."""
        convs = [place for place, layer in enumerate(self.stem) if isinstance(layer, nn.Conv2d)]
        self._stem_tap = convs[-2:][0]  # the layer whose output is feature map 0
        rows, reduction = [], 1
        for place, (name, layer) in enumerate(cast(Any, self.stem).named_children()):
            reduction *= getattr(layer, "stride", (1, 1))[0]
            if place == self._stem_tap:
                rows.append(dict(num_chs=layer.out_channels, reduction=reduction, module=f"stem.{name}"))
        for i, stage in enumerate(cast(Any, self.stages)):
            reduction *= stage[0].stride
            rows.append(dict(num_chs=stage[-1].conv2.out_channels, reduction=reduction, module=f"stages.{i}"))
        if isinstance(self.final_conv, nn.Conv2d):
            rows[-1] |= dict(num_chs=self.final_conv.out_channels, module="final_conv")
        self.feature_info = FeatureInfo(rows)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.num_features = self.head_hidden_size = rows[-1]["num_chs"]
        self.head = ClassifierHead(self.num_features, num_classes, drop_rate, global_pool, std)
        if features_only:
            self._select_features(range(5) if out_indices is None else out_indices)

    def _select_features(self, indices: int | Sequence[int]) -> None:
        # layers that no requested map needs are removed, so that every remaining parameter has a gradient
        self.out_indices = tuple(self.prune_intermediate_layers(self._take(indices, "out_indices"), prune_norm=True))
        self.feature_info = FeatureInfo(self.feature_info, self.out_indices)

    def _take(self, indices: int | Sequence[int] | None, name: str = "indices") -> list[int]:
        """Numbers of feature maps, sorted: the last n for an integer, those that are returned for None."""
        num_maps = len(self.stages) + 1
        if indices is None:
            indices = self.out_indices or range(num_maps)
        elif isinstance(indices, int):  # the last n; an n that is too large fails the check below
            indices = range(num_maps - indices, num_maps) if indices <= num_maps else [indices]
        if not indices or not all(-num_maps <= i < num_maps for i in indices):
            raise InputError(f"{name} {list(indices)}: this network has the feature maps 0 to {num_maps - 1}")
        return sorted({i % num_maps for i in indices})

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes layers that the maps `indices` (as in `forward_intermediates`) do not need; returns their numbers.

        `prune_norm`: the last normalization, in batch-normalized networks; `prune_head`: pooling and classifier.
        """
        taken = self._take(indices)
        last, shorter = taken[-1], taken[-1] < len(self.stages)
        if last == 0:
            self.stem = self.stem[: self._stem_tap + 1]
        self.stages = self.stages[:last]
        if shorter:
            self.final_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if shorter or (prune_norm and self.final_norm):
            self.act, self.info = nn.Identity(), None  # a weight file could not describe it
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of `feature_info`, before the activation that follows them (timm's taps), and what comes after.

        Args:
            indices: numbers of maps, from the end if negative; an integer n: the last n; None: all.
            norm: in batch-normalized networks the last map after normalization and activation.
            stop_early: compute nothing after the last of `indices`.
            output_fmt: "NCHW".
            intermediates_only: leave the features out.

        Returns:
            (features, list of maps): `forward_features(x)`, or with `stop_early` what the last stage that was needed
            gives; or the list of maps.
        """
        if output_fmt != "NCHW":
            raise InputError(f'output_fmt {output_fmt!r}: "NCHW" alone')
        taken, layers = self._take(indices), list(self.stem)
        end = taken[-1] if stop_early or intermediates_only else len(self.stages)
        x = run_stem(layers[: self._stem_tap + 1], x)
        maps = [x] if 0 in taken else []
        if end or not intermediates_only:
            x = run_stem(layers[self._stem_tap + 1 :], x)
        for i, stage in enumerate(list(self.stages)[:end], 1):
            x = self.final_conv(stage(x)) if i == 4 else stage(x)
            if i in taken:
                maps.append(self.act(x) if i == 4 and norm and self.final_norm else x)
        if intermediates_only:
            return maps
        return self.act(x) if end == len(self.stages) else x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_features, h, w), after the last activation, γ included."""
        return self.act(self.final_conv(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, h, w) -> logits (N, num_classes), or pooled features (N, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (N, in_channels, H, W) -> logits (N, num_classes), or the list of feature maps."""
        if self.out_indices is not None:
            return self.forward_intermediates(x, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def count_macs(self, px: int) -> int:
        """Multiply-adds of convolutions and linear layers for one px x px image; the papers print them as FLOPs."""
        total, side = 0, px
        for layer in self.stem.children():
            if isinstance(layer, nn.Conv2d | MaxPool):
                side = -(-side // layer.stride[0])
                total += conv_macs(layer, side)
        for block in self.modules():
            if isinstance(block, Block):
                total += block.count_macs(side)
                side = -(-side // block.stride)
        total += conv_macs(self.final_conv, side)
        return total + (self.head.fc.weight.numel() if isinstance(self.head.fc, nn.Linear) else 0)

    def get_classifier(self) -> nn.Module:
        """The last linear layer; nn.Identity if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` classes, with the network's device and dtype; 0: none.

        `global_pool`: "avg", or "" for maps if there are no classes; None: unchanged. `info` is updated and loses its
        class names.
        """
        if self.out_indices is not None:
            raise InputError("a network with features_only has no classifier to reset")
        like = next(self.parameters())
        self.head.reset(self.num_features, num_classes, global_pool)
        self.head.fc.to(like.device, like.dtype)
        self.num_classes = num_classes
        if self.info is not None:
            pooling = {"global_pool": self.head.global_pool}
            overrides = {key: value for key, value in self.info.overrides.items() if key != "global_pool"}
            overrides |= {} if self.head.global_pool == "avg" else pooling
            self.info = replace(self.info, num_classes=num_classes, class_names=(), overrides=overrides)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of a network: image sizes, preparation, names of the first and last layer."""
        cfg = dict(num_classes=self.num_classes, classifier="head.fc")
        cfg |= dict(first_conv=f"stem.{next(name for name, _ in self.stem.named_children())}")
        if self.info is None:
            return cfg
        info, reduction = self.info, self.feature_info[-1]["reduction"]
        crop = info.crop_fraction if info.eval_crop == "center" else info.eval_px / (info.eval_px + 32)
        return cfg | dict(
            architecture=info.architecture,
            input_size=(info.in_channels, info.train_px, info.train_px),
            test_input_size=(info.in_channels, info.eval_px, info.eval_px),
            pool_size=(-(-info.train_px // reduction),) * 2,
            mean=info.mean,
            std=info.std,
            interpolation="bicubic",
            crop_pct=crop,
            crop_mode="squash" if info.eval_crop == "resize_crop" else "center",
        )

    default_cfg = pretrained_cfg

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters by depth, for layer-wise learning rates; `coarse`: by stage, not by block."""
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return dict(stem=r"^stem", blocks=[(block, None), (r"^final_conv|^act", (99999,))])

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: gains, biases, SkipInit gains (`param_groups`)."""
        return {name for name, p in self.named_parameters() if p.ndim <= 1}

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer-wise rates: 0 for the stem, one for each block, one for the head.

        The final convolution belongs to the last block, as in timm.
        """
        part, *place = name.split(".")
        blocks = [len(cast(Stage, stage)) for stage in self.stages]
        if part == "stages":
            return 1 + sum(blocks[: int(place[0])]) + int(place[1])
        return {"stem": 0, "head": sum(blocks) + 1}.get(part, sum(blocks))

    def train_head_only(self, only: bool = True) -> None:
        """Freezes everything but the head, and keeps it in evaluation mode while the head trains; False: trains all."""
        if only != self.head_only:
            self.head_only = only
            for name, p in self.named_parameters():
                p.requires_grad_(not only or name.startswith("head."))
            self.train(self.training)

    def train(self, mode: bool = True) -> Network:
        """Training or evaluation mode; what `train_head_only` froze stays in evaluation mode."""
        super().train(mode)
        if self.head_only:
            for name, part in self.named_children():
                part.train(mode and name == "head")
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable


def block_schedule(
    depth: Sequence[int], alpha: float = 0.0, rate: float = 0.0
) -> Iterator[tuple[int, int, float, float]]:
    """(stage, index in the stage, β, stochastic-depth rate) of every block of a network.

    β is one over the standard deviation of the block's input at initialisation. The variance starts at 1, grows by α²
    per block, and resets after the first block of a stage, whose shortcut is a convolution. Of n blocks, block i is
    skipped with probability rate * i / n. Paper section 3; released code.
    """
    index, expected_var = 0, 1.0
    for stage in range(4):
        for i in range(depth[stage]):
            yield stage, i, expected_var**-0.5, rate * index / sum(depth)
            index += 1
            expected_var = (1.0 if i == 0 else expected_var) + alpha**2


def check_four(**options: Sequence[int] | None) -> None:
    """InputError unless each option is None or four positive numbers."""
    for name, four in options.items():
        if four is not None and (len(four) != 4 or min(four) < 1):
            raise InputError(f"{name} {tuple(four)}: four positive numbers are needed, one for each stage")


def check_padding(padding: str) -> None:
    """InputError unless `padding` is "same" or "symmetric"."""
    if padding not in ("same", "symmetric"):
        raise InputError(f'padding {padding!r}: "same" or "symmetric"')


def check_stem(channels: Sequence[int], strides: Sequence[int]) -> None:
    """InputError unless every convolution of the stem has a stride."""
    if not channels or len(strides) != len(channels) + 1:
        raise InputError("stem_strides has one number more than stem_channels; the last is for width[0] / 2 channels")


def check_rates(**options: float) -> None:
    """InputError unless each option lies in [0, 1)."""
    for name, rate in options.items():
        if not 0 <= rate < 1:
            raise InputError(f"{name} {rate}: a rate lies in [0, 1)")
