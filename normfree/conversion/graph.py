"""A network as a graph: its convolutions, its normalizations, its residual branches."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from normfree import functional
from normfree._compat import BatchNorm, ConvNd, DropoutNd, NormBase, conv_pads, has_forward_hooks
from normfree.errors import InputError
from normfree.layers import Conv2d, WSConv

BATCH_NORMS = (BatchNorm, FrozenBatchNorm2d)
OTHER_NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
NORM_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm, F.local_response_norm)
PLAIN_CONVS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, Conv2d.forward)
CONV_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
ADDCMULS = (torch.addcmul, "addcmul", "addcmul_", functional.gated_sum)
MULS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
GLOBAL_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
GLOBAL_MEANS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.mean, "mean")
IN_GATE = "part of a gate or of a classifier"
OFF_IN_EVALUATION = ("DropPath", "StochasticDepth", "DropBlock2d")  # classes of timm, of torchvision, of ours


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: by class, or for other libraries' by class name, if it has parameters or buffers."""
    if isinstance(module, (*BATCH_NORMS, *OTHER_NORMS)):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return "norm" in type(module).__name__.lower() and bool(own)


def has_statistics(norm: Any) -> bool:
    """Whether batch normalization has seen data. (Old weight files lack the count of batches.)"""
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and bool(mean.any() or (var != 1).any())


def _why_not(conv: Any) -> str | None:
    """The reason why this convolution cannot be converted."""
    if type(conv).forward not in PLAIN_CONVS or isinstance(conv, WSConv):
        return f"{type(conv).__name__} is another kind of convolution"
    if parametrize.is_parametrized(conv) or has_forward_hooks(conv):
        return "its weight or output is computed by a parametrization or a hook"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    pads = conv_pads(conv)
    return None if pads[::2] == pads[1::2] else "uneven padding"


class _Tracer(fx.Tracer):
    """Leaves are normalizations, convolutions, modules that contain neither, and gates."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_norm(m) or isinstance(m, ConvNd):
            return True
        if type(m).forward is nn.Sequential.forward or any(map(is_norm, m.modules())):
            return False
        return not any(isinstance(inner, ConvNd) for inner in m.modules()) or _is_gate(m)


def _is_gate(module: nn.Module) -> bool:
    """Whether a module averages over the image, as squeeze-excite does, or cannot be traced."""
    try:
        graph = fx.Tracer().trace(module)
    except Exception:
        return True
    modules = dict(module.named_modules())
    return any(
        node.target in GLOBAL_MEANS
        or (node.op == "call_module" and isinstance(modules[cast(str, node.target)], GLOBAL_POOLS))
        for node in graph.nodes
    )


@dataclass
class ConvSite:
    """A convolution that can be converted."""

    name: str
    is_first: bool  # no convolution before it
    norm: str | None = None  # the batch normalization right after it
    ends_branch: bool = False


@dataclass
class Branch:
    """A residual branch: the module that ends it, and the operands of the sum whose product it is."""

    end: str
    operands: list[fx.Node]
    scaled: fx.Node  # the operand that comes from `end`


class Graph:
    """Every convolution, normalization and residual sum of a network in evaluation mode, and what can be done to it."""

    def __init__(self, module: nn.Module):
        try:
            self.fx = _Tracer().trace(module)
        except Exception as error:  # the network's code may raise anything when it gets symbols instead of tensors
            reason = str(error).partition("\n")[0]
            raise InputError(f"torch.fx cannot trace {type(module).__name__}: {reason}") from error
        self.modules = dict(module.named_modules())
        self.calls = Counter(node.target for node in self.fx.nodes if node.op == "call_module")
        self.statistics = any(isinstance(m, BATCH_NORMS) and has_statistics(m) for m in self.modules.values())
        self.convs: dict[fx.Node, ConvSite] = {}
        self.norms: list[str] = []  # batch normalizations that can be removed
        self.on_stream: list[str] = []  # those among them that do not follow a convolution
        self.branches: dict[fx.Node, Branch] = {}  # by their sums
        self.left: dict[str, str] = {}
        self.remaining: dict[str, str] = {}  # the same for normalizations
        convs_before: dict[fx.Node, int] = {}  # the convolutions on the paths to a node, and itself, as bits
        for i, node in enumerate(self.fx.nodes):
            convs_before[node] = reduce(operator.or_, (convs_before[source] for source in node.all_input_nodes), 0)
            called = self._called(node)
            if isinstance(called, ConvNd):
                self._add_conv(node, is_first=convs_before[node] == 0)
                convs_before[node] |= 1 << i
            elif called is not None and is_norm(called):
                self._add_norm(node, called)
            elif node.target in NORM_FUNCTIONS:
                self.remaining[_place(node)] = "a function, no layer"
            elif node.target in CONV_FUNCTIONS:
                self.left[_place(node)] = "a function, no layer"
            elif node.target in (*ADDS, *ADDCMULS):
                self._add_sum(node, convs_before)
        self._name_unreached()

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.modules[cast(str, node.target)] if node.op == "call_module" else None

    def _add_conv(self, node: fx.Node, is_first: bool) -> None:
        name = cast(str, node.target)
        why = _why_not(self.modules[name])
        if self.calls[name] > 1:
            why = f"called {self.calls[name]} times"
        elif self._follows_global_pool(node):
            why = IN_GATE
        if why is None:
            self.convs[node] = ConvSite(name, is_first)
        else:
            self.left[name] = why

    def _follows_global_pool(self, conv: fx.Node) -> bool:
        """Whether a global pool precedes `conv`, without a fork between, and no batch normalization follows."""
        if any(isinstance(self._called(user), BATCH_NORMS) for user in conv.users):
            return False
        node = conv
        while len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
            if node.target in GLOBAL_MEANS or isinstance(self._called(node), GLOBAL_POOLS):
                return True
        return False

    def _add_norm(self, node: fx.Node, norm: Any) -> None:
        name, source = cast(str, node.target), node.all_input_nodes[0]
        if not isinstance(norm, BATCH_NORMS):
            self.remaining[name] = type(norm).__name__
        elif self.calls[name] > 1:
            self.remaining[name] = f"called {self.calls[name]} times"
        elif self.statistics and norm.running_mean is None:
            self.remaining[name] = "it keeps no statistics"
        elif source.target in self.left:
            self.remaining[name] = f"{source.target} before it stays: {self.left[cast(str, source.target)]}"
        elif source in self.convs and len(source.users) == 1:
            self.norms.append(name)
            self.convs[source].norm = name
        elif any(user.kwargs.get("inplace") or str(user.target).endswith("_") for user in node.users):
            self.remaining[name] = "a function after it overwrites its output, which would become its input"
        else:
            self.norms.append(name)
            self.on_stream.append(name)

    def _add_sum(self, node: fx.Node, convs_before: dict[fx.Node, int]) -> None:
        """Adds a residual sum. Its branch is the operand with more convolutions that the other does not depend on."""
        operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
        if len(operands) != (3 if node.target in ADDCMULS else 2):
            return
        sides = [operands[:1], operands[1:]]
        first, second = (reduce(operator.or_, (convs_before[operand] for operand in side)) for side in sides)
        lead = (first & ~second).bit_count() - (second & ~first).bit_count()
        if lead == 0 and first == second:
            return
        branch = sides[0] if lead > 0 else sides[1]
        scaled, end = next(((o, end) for o in reversed(branch) if (end := self._branch_end(o))), (node, None))
        if lead == 0 or node.kwargs or end is None:
            why = "both sides have as many convolutions" if lead == 0 else "no module ends the branch"
            self.left[_place(node)] = f"residual sum without α: {why}"
            return
        self.branches[node] = Branch(cast(str, end.target), branch, scaled)
        if end in self.convs:
            self.convs[end].ends_branch = True

    def _branch_end(self, node: fx.Node) -> fx.Node | None:
        """The module that computes the value of `node`, if nothing else uses that value."""
        while len(node.users) == 1:
            called, sources = self._called(node), node.all_input_nodes
            if called is not None and not self._is_identity(node, called):
                return node if self.calls[node.target] == 1 else None
            if node.target in MULS and len(sources) == 2:  # a gate, or what it gates
                return self._branch_end(sources[1]) or self._branch_end(sources[0])
            if called is None and node.target not in MULS:
                return None
            node = sources[0]
        return None

    def _is_identity(self, node: fx.Node, called: nn.Module) -> bool:
        if isinstance(called, BATCH_NORMS):  # folded into the convolution before it
            source = self.convs.get(node.all_input_nodes[0])
            rest_is_idle = all(isinstance(child, nn.Identity) for child in called.children())
            return source is not None and source.norm == node.target and rest_is_idle
        return isinstance(called, (nn.Identity, DropoutNd)) or (type(called).__name__ in OFF_IN_EVALUATION)

    def _name_unreached(self) -> None:
        for name, m in self.modules.items():
            if name in self.calls:
                continue
            if is_norm(m):
                self.remaining[name] = "not reached in evaluation"
            elif isinstance(m, ConvNd):
                inside = any(name.startswith(f"{leaf}.") for leaf in self.calls)
                self.left[name] = IN_GATE if inside else "not reached in evaluation"


def _place(node: fx.Node) -> str:
    """A name for a node that is not a module: its module's name and its own."""
    stack = [name for name in node.meta.get("nn_module_stack", {}) if name]
    return f"{stack[-1]}.{node.name}" if stack else node.name
