"""Signal propagation: what each residual block of any network does to the mean and variance of its activations.

Blocks are identified by their residual sum, not by class names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from normfree.errors import InputError
from normfree.models.network import Block

SUMS = {"add", "add_", "addcmul", "addcmul_"}  # as torch calls +, += and the functions
STOCHASTIC_DEPTH = {"drop_path", "stochastic_depth"}  # as timm and torchvision call the layer in a block


@dataclass(frozen=True)
class BlockSignal:
    """The activations (N, C, H, W) that leave one residual block, or the stem."""

    name: str  # "stem", "stages.0.0", "layer1.2", ...
    squared_mean: float  # average over channels of the squared channel mean (over N, H, W) of the block's output
    variance: float  # average over channels of the channel variance of the block's output
    branch_variance: float | None  # the same variance at the END of the residual branch; None for the stem
    transition: bool  # first block of a stage (its shortcut is not the identity)


def trace_signal(model: nn.Module, x: Tensor) -> list[BlockSignal]:
    """Measures one forward pass of `model`: first the stem's output, then every residual block, in order.

    A residual block is the innermost module with children whose forward adds two maps (N, C, H, W) of equal shape
    that both depend on `x`, one of them, the branch, through more convolutions. The block's output is that of the
    module, after the last ReLU in an ordinary ResNet. The branch ends after squeeze-excite and before stochastic
    depth, SkipInit gain and α (signal_metrics of the released code). In other libraries' networks it ends at
    stochastic depth, or else at the sum.

    Modules keep their modes, so batch normalization in training mode uses the statistics of the batch. Parameters,
    buffers (including running statistics) and random state are restored.

    Args:
        x: images (N, C, H, W) on the model's device, in its dtype.

    Raises:
        InputError: the network has no residual block.
    """
    tracer = _Tracer(x)
    with ExitStack() as cleanup:
        cleanup.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
        cleanup.enter_context(_buffers_restored(model))
        for name, module in model.named_modules():
            hooks = []
            if name.rpartition(".")[2] in STOCHASTIC_DEPTH:
                hooks.append(module.register_forward_pre_hook(tracer.end_branch))
            elif module is model or isinstance(module, Block) or any(module.children()):
                hooks.append(module.register_forward_pre_hook(partial(tracer.enter, name or "model")))
                hooks.append(module.register_forward_hook(tracer.leave))
            for hook in hooks:
                cleanup.callback(hook.remove)
        with torch.no_grad(), tracer:
            model(x)
    if not tracer.signals:
        raise InputError(
            f"{type(model).__name__} has no residual block: signal propagation is measured where the convolutions of "
            "a branch are added to a shortcut"
        )
    return tracer.signals


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def _is_map(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.ndim == 4


def _squared_mean_and_variance(x: Tensor) -> tuple[float, float]:
    """(N, C, H, W) -> averages over the channels of squared mean and of variance; half precision is widened."""
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean.square().mean().item(), variance.mean().item()


@dataclass(eq=False)
class _Node:
    """The origin of a tensor: the tensors it was computed from, and the convolutions on the longest path to it."""

    index: int
    convs: int
    parents: list[_Node]

    def descends_from(self, other: _Node) -> bool:
        """Parents have smaller indices, so that the search ends at `other`."""
        seen: set[_Node] = {self}
        left: list[_Node] = [self]
        while left:
            new = {parent for parent in left.pop().parents if parent.index >= other.index} - seen
            seen |= new
            left += new
        return other in seen


@dataclass(frozen=True)
class _Sum:
    """A residual sum. `entry`: the statistics of the block's input, if the block may be the first."""

    entry: tuple[float, float] | None
    convs: int
    shape: torch.Size
    signal: BlockSignal


@dataclass(eq=False)
class _Frame:
    """A running module."""

    name: str
    module: nn.Module
    input: tuple[float, float] | None  # its statistics, taken until the first block has run
    branch_variance: float | None = None  # where stochastic depth begins
    sums: list[_Sum] = field(default_factory=list)


class _Tracer(TorchFunctionMode):
    """Intercepts every torch function that the model calls; hooks tell which module calls it."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.nodes = WeakTensorKeyDictionary()
        self.nodes[x] = _Node(0, 0, [])
        self.num_nodes = 1
        self.frames: list[_Frame] = []
        self.signals: list[BlockSignal] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        parents = self._nodes_of(args, *kwargs.values())
        keep = self._find_residual(*args) if func.__name__ in SUMS else None  # now: += overwrites what it adds
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if parents and isinstance(tensor, Tensor):
                convs = max(p.convs for p in parents) + (func.__name__ == "conv2d")
                self.nodes[tensor] = _Node(self.num_nodes, convs, parents)
                self.num_nodes += 1
        if keep is not None:
            self.frames[-1].sums.append(keep(out))
        return out

    def _nodes_of(self, *values: Any) -> list[_Node]:
        """The nodes of the tensors among `values` and in lists and tuples there."""
        nodes = []
        for value in values:
            if isinstance(value, list | tuple):
                nodes += self._nodes_of(*value)
            elif isinstance(value, Tensor) and value in self.nodes:
                nodes.append(self.nodes[value])
        return nodes

    def _find_residual(self, a: Any, b: Any = None, c: Any = 1) -> Callable[[Any], _Sum] | None:
        """If a + b * c is a residual sum, the function that records its result; else None."""
        nodes, frame = self._nodes_of(a, b), self.frames[-1]
        if len(nodes) < 2 or nodes[0].convs == nodes[1].convs or isinstance(frame.module, Block):
            return None
        if a.ndim != 4 or a.shape != b.shape:
            return None
        (shortcut, x), (branch, end) = sorted(zip(nodes, (a, b * c), strict=True), key=lambda pair: pair[0].convs)
        # earlier sums that this shortcut bypasses were steps inside the branch (Res2Net)
        frame.sums = [kept for kept in frame.sums if kept.convs <= shortcut.convs]
        transition = not branch.descends_from(shortcut)
        entry = None if self.signals else frame.input if transition else _squared_mean_and_variance(x)
        variance, frame.branch_variance = frame.branch_variance, None
        if variance is None:
            variance = _squared_mean_and_variance(end)[1]

        def keep(out: Tensor) -> _Sum:
            signal = BlockSignal(frame.name, *_squared_mean_and_variance(out), variance, transition)
            return _Sum(entry, branch.convs, out.shape, signal)

        return keep

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        measured = not self.signals and bool(args) and _is_map(args[0])
        self.frames.append(_Frame(name, module, _squared_mean_and_variance(args[0]) if measured else None))

    def end_branch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.frames[-1].branch_variance = _squared_mean_and_variance(args[0])[1] if _is_map(args[0]) else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        frame = self.frames.pop()
        if isinstance(module, Block):
            branch_variance = _squared_mean_and_variance(module.branch(args[0]))[1]
            transition = module.conv_shortcut is not None
            signal = BlockSignal(frame.name, *_squared_mean_and_variance(out), branch_variance, transition)
            frame.sums = [_Sum(frame.input, 0, out.shape, signal)]
        blocks = [found.signal for found in frame.sums]
        if len(blocks) > 1:
            blocks = [replace(block, name=f"{block.name}:{k}") for k, block in enumerate(blocks, 1)]
        elif blocks and isinstance(out, Tensor) and out.shape == frame.sums[0].shape:
            squared_mean, variance = _squared_mean_and_variance(out)  # after whatever the module does to its sum
            blocks = [replace(blocks[0], squared_mean=squared_mean, variance=variance)]
        if blocks and not self.signals:
            entry = frame.sums[0].entry
            assert entry is not None
            self.signals.append(BlockSignal("stem", *entry, None, False))
        self.signals += blocks
