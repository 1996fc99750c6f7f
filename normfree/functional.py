"""What the layers compute, with gradients written down where autograd's own would take more time or memory.

Compiled, exported, traced, under `torch.func` and in forward mode the same is left to PyTorch's operations, as is a
second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import Function, forward_ad

from normfree.native import library, native_for

Before = Callable[[Tensor], Tensor]
Pads = tuple[int, int, int, int]  # zeros left, right, above, below, beside those of a convolution's own padding
HALVES = (torch.float16, torch.bfloat16)

# torch.fx calls them as they are: their choices depend on tensors, which a symbol is not
for name in ("standardize", "spatial_mean", "avg_pool2x2", "gated_sum", "conv2d"):
    fx.wrap(name)


def _eager() -> bool:
    """Whether operations run as they are called, so that a gradient of our own may stand for theirs."""
    watched = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    return not watched and forward_ad._current_level < 0


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _run(kernel: str, *args: Tensor | float | None) -> None:
    """One of those that `native_for` has said to be there; of tensors it is told where they lie."""
    function = getattr(library(), f"normfree_{kernel}")
    function(*(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args), torch.get_num_threads())


def widened(x: Tensor) -> Tensor:
    """Half precision as float32, in which sums and squares neither overflow nor vanish; anything else as it is."""
    return x.float() if x.dtype in HALVES else x


def _placed_like(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the order of memory of `like`, which has its shape and is dense."""
    last = torch.channels_last if like.ndim == 4 and not like.is_contiguous() else torch.contiguous_format
    return x.contiguous(memory_format=last)


# --- weight standardization ---


def standardize(
    weight: Tensor, gain: Tensor, scale: float = 1.0, share: float = 1.0, floor: float = 1e-4, extra: float = 0.0
) -> Tensor:
    """(W_i - mean(W_i)) / sqrt(max(share * |W_i - mean(W_i)|², floor) + extra) * gain_i * scale.

    `weight` (out, ...), filter i its row i; `gain` (out,). `share`: part of the filter that one output sees.
    Half precision is computed in float32 and rounded at the end.
    """
    options = (scale, share, floor, extra)
    return _Standardize.apply(weight, gain, *options) if _eager() else _standardize(weight, gain, *options)


def _standardize(weight: Tensor, gain: Tensor, scale: float, share: float, floor: float, extra: float) -> Tensor:
    centred, r, _ = _centre(widened(weight), share, floor, extra)
    standardized = centred * (r * (widened(gain) * scale).view(r.shape))
    return standardized.to(torch.promote_types(weight.dtype, gain.dtype))


def _centre(weight: Tensor, share: float, floor: float, extra: float) -> tuple[Tensor, Tensor, Tensor]:
    """W - mean(W), the factor r that standardizes it, and what the floor is compared with."""
    dims = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(dims, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=dims, keepdim=True)  # torch.var takes five times as long on a CPU
    if extra:
        square = norm.square() * share
        return centred, (square.clamp(min=floor) + extra).rsqrt(), square
    root = norm * share**0.5
    return centred, root.clamp(min=floor**0.5).reciprocal(), root.square()


class _Standardize(Function):
    """With its gradient in closed form: with u = dL/dŴ and c = W - mean(W),

    dW = gain r (u - mean(u)) - gain bend <u, c> c, dgain = r <u, c>, where bend = share r³, or 0 where the floor holds.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, *options: float) -> Tensor:
        scale, *rest = ctx.options = options
        fits = _dense(weight) and weight.numel() and gain.is_contiguous() and gain.shape == weight.shape[:1]
        if not fits or not native_for(weight, gain):
            ctx.save_for_backward(weight, gain)
            return _standardize(weight, gain, *options)
        out, rows = torch.empty_like(weight), weight.shape[0]
        mean, r, bend = weight.new_empty(3, rows).unbind()
        sizes = (rows, weight.numel() // rows)
        _run("standardize", weight, gain, float(scale), *rest, *sizes, out, mean, r, bend)  # converted: a tensor
        ctx.save_for_backward(weight, gain, mean, r, bend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, gain, *rows = ctx.saved_tensors
        grad, options = grads[0], ctx.options
        native = rows and not torch.is_grad_enabled() and native_for(grad)
        found = (
            _by_rows(grad, weight, gain, rows, float(options[0])) if native else _closed(grad, weight, gain, *options)
        )
        return *found, None, None, None, None


def _by_rows(grad: Tensor, weight: Tensor, gain: Tensor, rows: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """dW and dgain from mean, r and bend of each row, in one pass through memory."""
    grad, sizes = _placed_like(grad, weight), (weight.shape[0], weight[0].numel())
    dweight, dgain = torch.empty_like(weight), torch.empty_like(gain)
    _run("standardize_gradient", weight, gain, scale, *rows, grad, *sizes, dweight, dgain)
    return dweight, dgain


def _closed(
    grad: Tensor, weight: Tensor, gain: Tensor, scale: float, share: float, floor: float, extra: float
) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's operations, differentiable."""
    dims = tuple(range(1, weight.ndim))
    grad = widened(grad)
    centred, r, square = _centre(widened(weight), share, floor, extra)
    bend = torch.where(square < floor, 0, share * r**3)
    factor, dot = (widened(gain) * scale).view(r.shape), (grad * centred).sum(dims, keepdim=True)
    dweight = (grad - grad.mean(dims, keepdim=True)) * (factor * r) - centred * (factor * bend * dot)
    return dweight.to(weight.dtype), ((dot * r).view(gain.shape) * scale).to(gain.dtype)


Options = tuple[float, float, float, float]  # scale, share, floor, extra of `standardize`


def standardize_all(
    weights: Sequence[Tensor], gains: Sequence[Tensor], options: Sequence[Options]
) -> tuple[Tensor, ...]:
    """`standardize` of every weight with its gain and options: on a device in one pass for all filters of one length.

    The kernels on a CPU take them one by one: what the pass costs there is memory, not calls.
    """
    if not weights or not _eager() or all(native_for(weight) for weight in weights):
        return tuple(standardize(*one[:2], *one[2]) for one in zip(weights, gains, options, strict=True))
    return _StandardizeAll.apply(tuple(options), *weights, *gains)


class _StandardizeAll(Function):
    @staticmethod
    def forward(ctx: Any, options: tuple[Options, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        weights, gains = tensors[: len(options)], tensors[len(options) :]
        found: dict[int, Tensor] = {}
        for alike, kind in _kinds(weights, options):
            filters, gain = _stacked(weights, alike), _stacked_gains(gains, options, alike)
            found |= zip(alike, _unstacked(_standardize(filters, gain, 1.0, *kind), weights, alike), strict=True)
        return tuple(found[i] for i in range(len(options)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        options, num = ctx.options, len(ctx.options)
        weights, gains = ctx.saved_tensors[:num], ctx.saved_tensors[num:]
        found: list[Tensor | None] = [None for _ in range(2 * num)]
        for alike, kind in _kinds(weights, options, [i for i, grad in enumerate(grads) if grad is not None]):
            placed = {i: _placed_like(cast(Tensor, grads[i]), weights[i]) for i in alike}
            filters, gain = _stacked(weights, alike), _stacked_gains(gains, options, alike)
            dfilters, dgain = _closed(_stacked(placed, alike), filters, gain, 1.0, *kind)
            dgains = torch._foreach_mul(dgain.split([len(gains[i]) for i in alike]), [options[i][0] for i in alike])
            for i, dweight, one in zip(alike, _unstacked(dfilters, weights, alike), dgains, strict=True):
                found[i], found[num + i] = dweight, one
        return None, *found


def _kinds(
    weights: Sequence[Tensor], options: Sequence[Options], wanted: Sequence[int] | None = None
) -> list[tuple[list[int], tuple[float, ...]]]:
    """The weights, by their numbers, that can be stacked; with the options that they share, all but the scale."""
    kinds: dict[Any, list[int]] = {}
    for i in range(len(weights)) if wanted is None else wanted:
        weight = weights[i]
        key = (weight[0].numel(), weight.dtype, weight.device, options[i][1:])
        kinds.setdefault(key, []).append(i)
    return [(alike, key[-1]) for key, alike in kinds.items()]


def _rows(weight: Tensor) -> Tensor:
    """(out, ...) -> (out, fan-in), in the order of memory, so that it need not be copied."""
    last = weight.ndim == 4 and not weight.is_contiguous()
    return (weight.movedim(1, -1) if last else weight).flatten(1)


def _stacked(weights: Sequence[Tensor] | dict[int, Tensor], alike: Sequence[int]) -> Tensor:
    return torch.cat([_rows(weights[i]) for i in alike])


def _stacked_gains(gains: Sequence[Tensor], options: Sequence[Options], alike: Sequence[int]) -> Tensor:
    return torch.cat(torch._foreach_mul([gains[i] for i in alike], [options[i][0] for i in alike]))


def _unstacked(filters: Tensor, weights: Sequence[Tensor], alike: Sequence[int]) -> list[Tensor]:
    """The parts of (all filters, fan-in) in shape and order of memory of the weights that they belong to."""
    parts = filters.split([len(weights[i]) for i in alike])
    shaped = []
    for part, weight in zip(parts, (weights[i] for i in alike), strict=True):
        last = weight.ndim == 4 and not weight.is_contiguous()
        shape = weight.movedim(1, -1).shape if last else weight.shape
        shaped.append(part.view(shape).movedim(-1, 1) if last else part.view(shape))
    return shaped


# --- activations ---


def gelu(x: Tensor) -> Tensor:
    """GELU with the tanh, as the released networks have it: x sigmoid(2 sqrt(2/π) (x + 0.044715 x³)); any shape."""
    return _Gelu.apply(x) if _eager() and native_for(x) and _dense(x) else F.gelu(x, approximate="tanh")


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _run("gelu", x, y, x.numel())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _gelu_gradient(grads[0], *ctx.saved_tensors)


def _gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not native_for(grad, x) or not _dense(x):
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    grad, dx = _placed_like(grad, x), torch.empty_like(x)
    _run("gelu_gradient", x, grad, dx, x.numel())
    return dx


def spatial_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C), in the dtype of x. The gradient of x is a view of N * C numbers, not a map."""
    if x.dtype == torch.float16:  # a sum of bfloat16 is one of float32, rounded, and has its range
        return _HalfMean.apply(x) if _eager() else x.mean((2, 3), dtype=torch.float32).to(x.dtype)
    return x.sum((2, 3)) * (1 / (x.shape[2] * x.shape[3]))


class _HalfMean(Function):
    """The sum of a map may be beyond float16: it is taken in float32. Autograd's gradient of that would be a map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), dtype=torch.float32).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        share = grads[0].float() * (1 / (ctx.shape[2] * ctx.shape[3]))
        return share.to(grads[0].dtype)[:, :, None, None].expand(ctx.shape)


def avg_pool2x2(x: Tensor) -> Tensor:
    """2x2 mean with stride 2 of (N, C, H, W); of odd sides the last mean is over what there is. Keeps nothing of x."""
    return _AvgPool2x2.apply(x) if _eager() else F.avg_pool2d(x, 2, 2, ceil_mode=True)


class _AvgPool2x2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.shape, ctx.format = x.shape, torch.channels_last if last else torch.contiguous_format
        return F.avg_pool2d(x, 2, 2, ceil_mode=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)  # never read
        return torch.ops.aten.avg_pool2d_backward(grad, like, [2, 2], [2, 2], [0, 0], True, True, None)


def gated_sum(shortcut: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """shortcut + x * gate, for `shortcut` and `x` (N, C, H, W) and `gate` (N, C, 1, 1)."""
    return _GatedSum.apply(shortcut, x, gate) if _gate_fits(x, gate) else torch.addcmul(shortcut, x, gate)


def _gate_fits(x: Tensor, gate: Tensor) -> bool:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.numel() > 0
    return last and gate.shape == (*x.shape[:2], 1, 1) and _eager() and native_for(x, gate) is not None


class _GatedSum(Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return torch.addcmul(shortcut, x, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, gate), (grad,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled() or not native_for(grad):
            return grad, grad * gate, (grad * x).sum((2, 3), keepdim=True)
        grad, gate = grad.contiguous(memory_format=torch.channels_last), gate.contiguous()
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        _run("gate_gradient", grad, x, gate, dx, dgate, len(x), x[0, 0].numel(), x.shape[1])
        return grad, dx, dgate


# --- convolution ---


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    pads: Pads | None = None,
    before: Before | None = None,
    recompute: bool = True,
) -> Tensor:
    """Convolution of `before(x)`, an activation, with zeros around it.

    With `recompute` its result is not kept for the backward pass, but computed once more from x.

    `x` (N, in, H, W), `weight` (out, in / groups, kh, kw), `bias` (out,); `padding` pixels above and below, left and
    right, or `pads`: left, right, above, below.
    """
    geometry = (stride, padding, dilation, groups)
    eager = _eager() and x.ndim == 4  # not (in, H, W)
    autocast = eager and _autocast(x)
    if eager and not autocast and recompute and _is_gelu(before) and native_for(x):
        return _Conv2d.apply(x, None, weight, bias, geometry, None, pads, True)
    made = before(x) if before else x
    if not eager:
        return F.conv2d(_padded(made, pads), weight, bias, *geometry)
    source = x if before and recompute else None
    if not autocast:
        return _Conv2d.apply(made, source, weight, bias, geometry, before, pads, False)
    dtype = torch.get_autocast_dtype(x.device.type)
    made, weight, bias = made.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _Conv2d.apply(made, source, weight, bias, geometry, before, pads, False)


def _autocast(x: Tensor) -> bool:
    """Whether PyTorch's convolution of x would be one of a narrower dtype."""
    device = x.device.type
    available = x.dtype != torch.float64 and torch.amp.is_autocast_available(device)  # not on "meta"
    return available and torch.is_autocast_enabled(device)


def _padded(x: Tensor, pads: Pads | None) -> Tensor:
    return F.pad(x, pads) if pads else x


def _is_gelu(before: Before | None) -> bool:
    """Whether `before` is `gelu`, by itself or as a module that nobody watches by hooks."""
    if not isinstance(before, nn.Module):
        return before is gelu
    hooks = before._forward_hooks, before._forward_pre_hooks, before._backward_hooks, before._backward_pre_hooks
    watched = any(hooks) or nn.modules.module._has_any_global_hook()
    scaled = getattr(before, "scaled", False)
    return not watched and not scaled and getattr(before, "function", None) is gelu


class _Conv2d(Function):
    """Of `made`, which is kept only if there is no `source` to make it from; or, `activated`, of gelu(made)."""

    @staticmethod
    def forward(
        ctx: Any,
        made: Tensor,
        source: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Any,
        before: Any,
        pads: Any,
        activated: bool,
    ) -> Tensor:
        ctx.save_for_backward(made if source is None else source, weight)
        ctx.remake = None if source is None else before.forward if isinstance(before, nn.Module) else before
        ctx.geometry, ctx.pads, ctx.has_bias, ctx.activated = geometry, pads, bias is not None, activated
        if _products_fit(made, weight, geometry, pads, bias):
            return _conv1x1(made, weight, bias, activated=activated)
        made = gelu(made) if activated else made
        if _winograd_fits(made, weight, geometry, pads, bias):
            return _winograd(made, weight, bias, geometry, pads)
        return F.conv2d(_padded(made, pads), weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (kept, weight), (grad,) = ctx.saved_tensors, grads
        made = ctx.remake(kept).to(weight.dtype) if ctx.remake else kept
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.has_bias and ctx.needs_input_grad[3]]
        dx, dweight, dbias = _conv2d_gradients(grad, made, weight, ctx.geometry, ctx.pads, wanted, ctx.activated)
        return dx, None, dweight, dbias, None, None, None, None


def _conv2d_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Any,
    pads: Pads | None,
    wanted: list[bool],
    activated: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of input, weight and bias that are wanted, each by the fastest way; if `activated`, of one of gelu(x)."""
    stride, padding, dilation, groups = geometry
    dx = dweight = dbias = None
    # with gradients enabled these are to be differentiated again
    native = not torch.is_grad_enabled() and native_for(x, grad, weight) is not None
    if native and _winograd_fits(x, weight, geometry, pads):
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = _winograd_input_gradient(x, grad, weight, geometry, pads, activated) if wanted[0] else None
        if wanted[1]:
            made = gelu(x) if activated else x
            dweight, dbias = _winograd_filter_gradient(made, grad, weight, geometry, pads, wanted[2])
    elif native and _products_fit(x, weight, geometry, pads):
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = _conv1x1(grad, weight, seen=x if activated else None, turned=True) if wanted[0] else None
        if wanted[1]:
            dweight, dbias = _conv1x1_filter_gradient(x, grad, weight, wanted[2], activated)
    elif wanted[0] or wanted[1]:
        made = gelu(x) if activated else x
        args = ([0], stride, padding, dilation, False, [0, 0], groups, [*wanted[:2], False])
        dx, dweight, _ = torch.ops.aten.convolution_backward(grad, _padded(made, pads), weight, *args)
        if wanted[0]:
            dx = F.pad(dx, [-n for n in pads]) if pads else dx
            dx = _gelu_gradient(dx, x) if activated else dx
    if wanted[2] and dbias is None:
        dbias = grad.sum((0, 2, 3))
    return dx, dweight, dbias


def _kernel_fits(x: Tensor, weight: Tensor, groups: int, bias: Tensor | None) -> bool:
    """Whether one of our convolutions takes what it is given; else PyTorch does, or complains."""
    if native_for(x, weight) is None:
        return False
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.is_contiguous() and native_for(bias)):
        return False
    out, size = weight.shape[0] // groups, weight.shape[1]
    last = torch.channels_last
    return (
        out % 16 == size % 16 == 0
        and (x.shape[1], weight.shape[0]) == (groups * size, groups * out)
        and x.numel() > 0
        and x.is_contiguous(memory_format=last)
        and weight.is_contiguous(memory_format=last)
    )


def _empty_gradients(weight: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
    """For those of filters, in whose order they lie, and, if `biased`, of the bias."""
    return torch.empty_like(weight), weight.new_empty(weight.shape[0]) if biased else None


def _products_fit(x: Tensor, weight: Tensor, geometry: Any, pads: Pads | None, bias: Tensor | None = None) -> bool:
    stride, padding, _, groups = geometry
    pointwise = weight[0, 0].numel() == groups == 1 and (stride, padding) == ((1, 1), (0, 0)) and not pads
    return pointwise and min(weight.shape[:2]) >= 32 and _kernel_fits(x, weight, 1, bias)


def _conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    activated: bool = False,
    turned: bool = False,
) -> Tensor:
    """The convolution of x, or of gelu(x); `turned`, the gradient of its input from that of its output, x.

    With `seen` the input is gelu(`seen`), and the gradient is that of `seen`.
    """
    out, size = weight.shape[:2]
    images, _, height, width = x.shape
    sizes = (out, size) if turned else (size, out)
    y = torch.empty(images, sizes[1], height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _run("conv1x1", x, weight, bias, seen, y, images * height * width, *sizes, activated, turned)
    return y


def _conv1x1_filter_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, biased: bool, activated: bool
) -> tuple[Tensor, Tensor | None]:
    """dW (out, in, 1, 1) and, if `biased`, the bias's gradient of a 1x1 convolution, in one pass over the pixels."""
    dweight, dbias = _empty_gradients(weight, biased)
    sizes = (grad[:, 0].numel(), weight.shape[1], weight.shape[0])
    _run("conv1x1_filter_gradient", x, grad, dweight, dbias, *sizes, activated)
    return dweight, dbias


def _winograd_fits(x: Tensor, weight: Tensor, geometry: Any, pads: Pads | None, bias: Tensor | None = None) -> bool:
    stride, _, dilation, groups = geometry
    square = weight.shape[2:] == (3, 3) and stride in ((1, 1), (2, 2)) and dilation == (1, 1)
    return square and _kernel_fits(x, weight, groups, bias) and min(_winograd_sizes(x, weight, geometry, pads)[1]) > 0


def _winograd_sizes(
    x: Tensor, weight: Tensor, geometry: Any, pads: Pads | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the kernels are told of a convolution, and the shape of its output."""
    (stride, _), (rows, columns), _, groups = geometry
    left, right, top, bottom = pads or (0, 0, 0, 0)
    images, _, height, width = x.shape
    out, size = weight.shape[:2]
    out_height = (height + 2 * rows + top + bottom - 3) // stride + 1
    out_width = (width + 2 * columns + left + right - 3) // stride + 1
    maps = (images, height, width, out_height, out_width, groups, size, out // groups)
    return (*maps, stride, top + rows, left + columns), (images, out, out_height, out_width)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, pads: Pads | None) -> Tensor:
    sizes, shape = _winograd_sizes(x, weight, geometry, pads)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _run("winograd", x, weight, bias, None, y, *sizes, False)
    return y


def _winograd_input_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, geometry: Any, pads: Pads | None, activated: bool
) -> Tensor:
    dx, (sizes, _) = torch.empty_like(x), _winograd_sizes(x, weight, geometry, pads)
    _run("winograd", dx, weight, None, x if activated else None, grad, *sizes, True)
    return dx


def _winograd_filter_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, geometry: Any, pads: Pads | None, biased: bool
) -> tuple[Tensor, Tensor | None]:
    (dweight, dbias), (sizes, _) = _empty_gradients(weight, biased), _winograd_sizes(x, weight, geometry, pads)
    _run("winograd_filter_gradient", x, grad, dweight, dbias, *sizes)
    return dweight, dbias
