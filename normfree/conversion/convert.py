"""From batch-normalized residual networks to normalizer-free ones, with the weights kept."""

from __future__ import annotations

import copy
import math
import operator
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from normfree import functional
from normfree._compat import conv_pads
from normfree.conversion.graph import BATCH_NORMS, ConvSite, Graph
from normfree.conversion.trace import BlockSignal, trace_signal
from normfree.errors import InputError
from normfree.layers import (
    BranchEnd,
    BranchEndConv1d,
    BranchEndConv2d,
    BranchEndConv3d,
    ChannelAffine,
    Conv2d,
    SkipInit,
    WSConv,
    WSConv1d,
    WSConv2d,
    WSConv3d,
)
from normfree.models.network import Network

# plain convolution -> its standardized replacement, inside a branch and at its end
REPLACEMENTS: dict[type[nn.Module], tuple[type[WSConv], type[WSConv]]] = {
    nn.Conv1d: (WSConv1d, BranchEndConv1d),
    nn.Conv2d: (WSConv2d, BranchEndConv2d),
    nn.Conv3d: (WSConv3d, BranchEndConv3d),
}
NOISE = {1: (4, 1024), 2: (2, 224, 224), 3: (2, 8, 64, 64)}  # dimensions -> batch and sides


@dataclass(frozen=True)
class Conversion:
    """What `convert_to_nf` did, by names of modules."""

    convs: tuple[str, ...]  # convolutions with scaled weight standardization
    folded: tuple[str, ...]  # batch normalizations folded into gain and bias of the convolution before them
    on_stream: tuple[str, ...]  # others: with statistics replaced by a factor and offset per channel, else removed
    branches: dict[str, float]  # module with α and the SkipInit gain -> standard deviation of the branch before them
    left: dict[str, str]  # unchanged modules -> reason
    statistics: bool  # whether the batch normalizations had seen data
    noise: bool  # whether the scales were measured with noise, because no images were given
    before: tuple[BlockSignal, ...]  # `trace_signal` of the original, with its statistics or those of the batch
    after: tuple[BlockSignal, ...]  # of the result, branch variances before α and the SkipInit gain

    def __str__(self) -> str:
        known = "with" if self.statistics else "without"
        lines = [
            f"{len(self.convs)} convolutions standardized; {len(self.folded)} batch normalizations {known} statistics "
            f"folded, {len(self.on_stream)} elsewhere; {len(self.branches)} residual branches; scales traced with "
            + ("noise" if self.noise else "the images given")
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"left, {why}: {_first_of(names)}" for why, names in reasons.items()]
        if self.after:
            lines.append(f"{'block':28}{'squared mean':>20}{'variance':>20}{'branch variance':>20}")
        for old, new in zip(self.before, self.after, strict=False):
            line = f"{new.name:28}"
            for key in ("squared_mean", "variance", "branch_variance"):
                a, b = getattr(old, key), getattr(new, key)
                line += "" if a is None or b is None else f"{f'{a:.3g} -> {b:.3g}':>20}"
            lines.append(line)
        return "\n".join(lines)


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def convert_to_nf(
    module: nn.Module,
    x: Tensor | None = None,
    *,
    alpha: float = 0.2,
    skip_init: float | None = None,
    strict: bool = True,
) -> nn.Module:
    """A normalizer-free copy of a batch-normalized residual network, with the weights of its convolutions.

    Classes, attributes and names of modules stay.

    - Convolutions get scaled weight standardization (`WSConv`). Its `input_scale`, γβ in the papers, is one over the
      standard deviation of the input when `x` passes through the network as converted so far; 1 for the first one.
    - Batch normalization with statistics is folded into gain and bias of the convolution before it. In evaluation mode
      the network then computes the same, as far as standardized filters can: a filter's mean is lost, and the bias
      keeps only its average effect on `x`. Elsewhere it becomes one factor and offset for each channel.
    - Batch normalization without statistics is removed: gains are 1, biases 0.
    - The end of every residual branch is multiplied by α * gain, with a learnable SkipInit gain: on the weights of a
      convolution, or as a submodule `skip_init` of another last module (squeeze-excite). Without statistics, α is
      divided by the standard deviation of the branch's end, so every branch adds `alpha`² to the variance.

    Squeeze-excite and other gates stay as they are. The attribute `conversion` of the result, a `Conversion`, lists
    what was done and what was left. The state dict has the original's names, without batch normalizations, and gain,
    bias, input_scale, skip_gain, alpha.

    Args:
        x: training images (N, C, H, W), some dozens for a trained network; None: noise.
        alpha: strength of the branches, above 0.
        skip_init: initial SkipInit gains; None: 1, or 1 / `alpha` for a network with statistics, which keeps the
            strength of its branches. (The papers use 0; AGC keeps a gain of 0 from growing.)
        strict: refuse a network in which normalization would remain; False: leave and list it.

    Raises:
        InputError: torch.fx cannot trace the network; nothing to convert; normalization would remain.

    Source: Brock et al. 2021, arXiv 2101.08692; SkipInit: De and Smith 2020, arXiv 2002.10444.
    """
    if alpha <= 0:
        raise InputError(f"alpha {alpha}: more than 0")
    original, result = copy.deepcopy(module).eval(), copy.deepcopy(module).eval()
    graph = Graph(result)
    if graph.remaining and strict:
        names, why = list(graph.remaining), next(iter(graph.remaining.values()))
        raise InputError(f"normalization would remain in {_first_of(names)} ({why}); strict=False leaves it in")
    if not graph.convs:
        raise InputError(f"{type(module).__name__} has no convolution that can be converted")
    first = cast(nn.Conv2d, graph.modules[next(iter(graph.convs.values())).name])
    images = (_noise(first) if x is None else x).to(first.weight)
    with torch.no_grad():
        means = _conv_means(original, (conv.name for conv in graph.convs.values()), images) if graph.statistics else {}
        _replace_layers(result, graph)
        deviations = _Calibration(result, graph, means, alpha, skip_init).measure(images)
    for m in original.modules():
        if isinstance(m, BATCH_NORMS):
            m.train(not graph.statistics)
    report = Conversion(
        convs=tuple(conv.name for conv in graph.convs.values()),
        folded=tuple(conv.norm for conv in graph.convs.values() if conv.norm is not None),
        on_stream=tuple(graph.on_stream),
        branches=deviations,
        left=graph.left | graph.remaining,
        statistics=graph.statistics,
        noise=x is None,
        before=_signal(original, images, {}),
        after=_signal(result, images, deviations),
    )
    object.__setattr__(result, "conversion", report)  # nn.Module is typed for tensors and modules only
    modes = {name: m.training for name, m in module.named_modules()}
    for name, m in result.named_modules():
        m.training = modes.get(name, module.training)
    if isinstance(result, Network):
        result.info = None  # a weight file could not describe it
    return result


def _noise(first: nn.Conv2d) -> Tensor:
    """Standard normal input for a network that begins with `first`, from a fixed seed."""
    batch, *sides = NOISE[first.weight.ndim - 2]
    return torch.randn(batch, first.in_channels, *sides, generator=torch.Generator().manual_seed(0))


def _signal(module: nn.Module, x: Tensor, deviations: dict[str, float]) -> tuple[BlockSignal, ...]:
    """Signal propagation, with branch variances before α; empty for a network without residual blocks."""
    try:
        signals = trace_signal(module, x)
    except InputError:
        return ()
    ends = {s.name: [std for end, std in deviations.items() if end.startswith(f"{s.name}.")] for s in signals}
    return tuple(replace(s, branch_variance=ends[s.name][-1] ** 2) if ends[s.name] else s for s in signals)


def _conv_means(module: nn.Module, names: Iterable[str], x: Tensor) -> dict[str, Tensor]:
    """Channel means of the outputs of convolutions."""
    convs, means = {module.get_submodule(name): name for name in names}, {}

    def record(conv: nn.Module, args: Any, out: Tensor) -> None:
        means[convs[conv]] = out.mean(_dims(out))

    hooks = [conv.register_forward_hook(record) for conv in convs]
    module(x)
    for hook in hooks:
        hook.remove()
    return means


def _replace_layers(module: nn.Module, graph: Graph) -> None:
    """Replaces convolutions by standardized ones with gain 1, and batch normalizations by constants or nothing."""
    for conv in graph.convs.values():
        norm = None if conv.norm is None else graph.modules[conv.norm]
        old = cast(nn.Conv2d, graph.modules[conv.name])
        module.set_submodule(conv.name, _standardized(old, norm, conv.ends_branch))
    for name in graph.norms:
        norm = graph.modules[name]
        layers = OrderedDict(norm.named_children())  # timm's hold dropout and activation
        if name in graph.on_stream and graph.statistics:
            affine = ChannelAffine(*_scale_and_offset(norm))
            affine.requires_grad_(any(p.requires_grad for p in norm.parameters(recurse=False)))
            layers = OrderedDict[str, nn.Module](affine=affine, **layers)
        module.set_submodule(name, nn.Sequential(layers) if layers else nn.Identity())
    if graph.on_stream and not graph.statistics:
        for m in module.modules():  # a layer after a removed normalization must not overwrite the shortcut
            if getattr(m, "inplace", False):
                cast(Any, m).inplace = False


def _scale_and_offset(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and offset of batch normalization in evaluation, x -> scale * x + offset."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -norm.running_mean * scale
    return scale.detach(), (offset if norm.bias is None else offset + norm.bias).detach()


def _standardized(conv: nn.Conv2d, norm: nn.Module | None, ends_branch: bool) -> WSConv:
    """The replacement of `conv`, with the same weight, gain 1, bias 0. `input_scale` is a buffer, to be saved."""
    same = isinstance(conv, Conv2d) and conv.padding == "same"
    cls = next(cls for cls in REPLACEMENTS if isinstance(conv, cls))
    with torch.device("meta"):  # no random numbers drawn
        new = cast(Any, REPLACEMENTS[cls][ends_branch])(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding="same" if same else tuple(conv_pads(conv)[::-2]),
            dilation=conv.dilation,
            groups=conv.groups,
        )
    like = conv.weight.detach()
    parameters = [] if norm is None else list(norm.parameters(recurse=False))
    trained = any(p.requires_grad for p in parameters or [conv.weight])
    new.weight = conv.weight
    new.gain = nn.Parameter(like.new_ones(conv.out_channels), trained)
    new.bias = nn.Parameter(like.new_zeros(conv.out_channels), trained)
    del new.input_scale
    new.register_buffer("input_scale", like.new_ones(()))
    if ends_branch:
        new.skip_gain = nn.Parameter(like.new_ones(()), trained)
        new.alpha = like.new_ones(())
    return new


def _apply_skip_init(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # no lambda: it must be picklable
    return cast(SkipInit, module.skip_init)(output)


def _dims(x: Tensor) -> list[int]:
    """All but the channels."""
    return [0, *range(2, x.ndim)]


def _deviation(x: Tensor, place: str) -> float:
    """Standard deviation: the square root of the average channel variance."""
    std = x.to(torch.promote_types(x.dtype, torch.float32)).var(_dims(x), correction=0).mean().sqrt().item()
    if not 0 < std < math.inf:
        raise InputError(f"the signal at {place} has the deviation {std:g}: pass more, larger or other images as x")
    return std


class _Calibration(fx.Interpreter):
    """Runs the converted network and sets the scalars, gain and bias of each convolution just before its call."""

    def __init__(
        self, module: nn.Module, graph: Graph, means: dict[str, Tensor], alpha: float, skip_init: float | None
    ):
        super().__init__(module, graph=graph.fx)
        self.extra_traceback = False  # errors are for users
        self.plan, self.means, self.alpha = graph, means, alpha
        default = 1 / alpha if graph.statistics else 1.0
        self.skip_init = default if skip_init is None else skip_init
        self.deviations: dict[str, float] = {}

    def measure(self, x: Tensor) -> dict[str, float]:
        """The standard deviations of the branches, by the module that ends each."""
        self.run(x)
        for name, std in self.deviations.items():
            end = self.submodules[name]
            scaled = end if isinstance(end, BranchEnd) else self._add_skip_init(end)
            scaled.skip_gain.fill_(self.skip_init)
            scaled.alpha.fill_(self.alpha if self.plan.statistics else self.alpha / std)
        return self.deviations

    def _add_skip_init(self, end: nn.Module) -> SkipInit:
        """Adds a submodule and a hook, so that other names stay; nn.Sequential runs the submodule without a hook."""
        skip_init = SkipInit().to(next(self.module.parameters()))
        skip_init.requires_grad_(all(p.requires_grad for p in end.parameters()))
        end.add_module("skip_init", skip_init)
        if not isinstance(end, nn.Sequential):
            end.register_forward_hook(_apply_skip_init)
        return skip_init

    def run_node(self, n: fx.Node) -> Any:
        if n in self.plan.convs:
            self._set_conv(self.plan.convs[n], self.env[n.all_input_nodes[0]])
        elif n in self.plan.branches:  # measure the branch and scale it as its scalars will
            branch = self.plan.branches[n]
            out = reduce(operator.mul, (self.env[operand] for operand in branch.operands))
            std = self.deviations[branch.end] = _deviation(out, branch.end)
            factor = self.alpha * self.skip_init if self.plan.statistics else self.alpha / std
            self.env[branch.scaled] = self.env[branch.scaled] * factor
        return super().run_node(n)

    def _set_conv(self, conv: ConvSite, x: Tensor) -> None:
        """Sets the scale for input x; with statistics, also the gain and bias that restore filters and means."""
        new = cast(Any, self.submodules[conv.name])
        if not conv.is_first:
            new.input_scale.fill_(1 / _deviation(x, conv.name))
        if not self.plan.statistics:
            return
        mean = self.means[conv.name]
        var = functional.widened(new.weight).flatten(1).var(1, correction=0)
        new.gain.copy_((var * new.fan_in).clamp(min=1e-4).sqrt() / new.input_scale)
        if conv.norm is not None:
            scale, offset = _scale_and_offset(self.plan.modules[conv.norm])
            new.gain.mul_(scale)
            mean = mean * scale + offset
        out = new(x)
        new.bias.copy_(mean - out.mean(_dims(out)))
