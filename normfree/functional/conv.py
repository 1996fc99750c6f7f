"""2-D convolution of an activation, which the backward pass can compute again instead of saving it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from normfree._compat import has_hooks
from normfree.functional import dispatch
from normfree.functional.dispatch import Geometry, Pads, Pair
from normfree.functional.pointwise import gelu, gelu_gradient
from normfree.native import native_for


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    *,
    pads: Pads | None = None,
    before: Callable[[Tensor], Tensor] | None = None,
    recompute: bool = True,
) -> Tensor:
    """Convolution of `before(x)`, an activation, with zeros around it.

    With `recompute` x is saved for the backward pass in place of `before(x)`, which is then computed once more.

    `x` (N, in, H, W), `weight` (out, in / groups, kh, kw), `bias` (out,). `padding` is the number of pixels above and
    below, left and right; `pads` adds pixels left, right, above, below.
    """
    geometry = Geometry(stride, padding, dilation, groups, pads)
    eager = dispatch.is_eager() and x.ndim == 4  # not (in, H, W)
    autocast = eager and _is_autocast(x)
    if eager and not autocast and recompute and _is_gelu(before) and native_for(x):
        return _Conv2d.apply(x, None, weight, bias, geometry, None, True)
    activated = before(x) if before else x
    if not eager:
        return _torch_conv2d(activated, weight, bias, geometry)
    pre_activation = x if before and recompute else None
    if not autocast:
        return _Conv2d.apply(activated, pre_activation, weight, bias, geometry, before, False)
    dtype = torch.get_autocast_dtype(x.device.type)
    activated, weight, bias = activated.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _Conv2d.apply(activated, pre_activation, weight, bias, geometry, before, False)


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast would change the dtype of a convolution of x."""
    device = x.device.type
    available = x.dtype != torch.float64 and torch.amp.is_autocast_available(device)  # not on "meta"
    return available and torch.is_autocast_enabled(device)


def _padded(x: Tensor, pads: Pads | None) -> Tensor:
    return F.pad(x, pads) if pads else x


def _torch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups, pads = geometry
    return F.conv2d(_padded(x, pads), weight, bias, stride, padding, dilation, groups)


def _is_gelu(before: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether `before` is `gelu`, by itself or as a module without hooks."""
    if not isinstance(before, nn.Module):
        return before is gelu
    scaled = getattr(before, "scaled", False)
    return not has_hooks(before) and not scaled and getattr(before, "function", None) is gelu


class _Conv2d(Function):
    """Convolution of x, or with `apply_gelu` of gelu(x).

    x = before(pre_activation) is saved only if there is no `pre_activation` to compute it from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pre_activation: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        before: Any,
        apply_gelu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x if pre_activation is None else pre_activation, weight)
        ctx.recompute = None
        if pre_activation is not None:
            ctx.recompute = before.forward if isinstance(before, nn.Module) else before
        ctx.geometry, ctx.has_bias, ctx.apply_gelu = geometry, bias is not None, apply_gelu
        if dispatch.has_kernel("conv1x1", x, weight, bias, geometry):
            return _conv1x1(x, weight, bias, apply_gelu=apply_gelu)
        x = gelu(x) if apply_gelu else x
        if dispatch.has_kernel("winograd", x, weight, bias, geometry):
            return _winograd(x, weight, bias, geometry)
        return _torch_conv2d(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), (grad,), geometry, apply_gelu = ctx.saved_tensors, grads, ctx.geometry, ctx.apply_gelu
        x = ctx.recompute(x).to(weight.dtype) if ctx.recompute else x
        needs_dx, _, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
        needs_dbias = needs_dbias and ctx.has_bias
        dx = dweight = dbias = None
        if dispatch.has_gradient_kernel("winograd", grad, x, weight, None, geometry):
            grad = grad.contiguous(memory_format=torch.channels_last)
            sizes = _winograd_sizes(x, weight, geometry)
            if needs_dx:
                dx, pre_activation = torch.empty_like(x), x if apply_gelu else None
                dispatch.run("winograd", dx, weight, None, pre_activation, grad, *sizes, True)
            if needs_dweight:
                activated = gelu(x) if apply_gelu else x
                dweight, dbias = _filter_gradient("winograd", activated, grad, weight, needs_dbias, *sizes)
        elif dispatch.has_gradient_kernel("conv1x1", grad, x, weight, None, geometry):
            grad = grad.contiguous(memory_format=torch.channels_last)
            if needs_dx:
                dx = _conv1x1(grad, weight, pre_activation=x if apply_gelu else None, transposed=True)
            if needs_dweight:
                sizes = (grad[:, 0].numel(), weight.shape[1], weight.shape[0], apply_gelu)
                dweight, dbias = _filter_gradient("conv1x1", x, grad, weight, needs_dbias, *sizes)
        elif needs_dx or needs_dweight:
            activated, (stride, padding, dilation, groups, pads) = gelu(x) if apply_gelu else x, geometry
            needed = [needs_dx, needs_dweight, False]
            options = ([0], stride, padding, dilation, False, [0, 0], groups, needed)
            dx, dweight, _ = torch.ops.aten.convolution_backward(grad, _padded(activated, pads), weight, *options)
            if needs_dx:
                dx = F.pad(dx, [-n for n in pads]) if pads else dx
                dx = gelu_gradient(dx, x) if apply_gelu else dx
        if needs_dbias and dbias is None:
            dbias = grad.sum((0, 2, 3))
        return dx, None, dweight, dbias, None, None, None


def _filter_gradient(
    kernel: str, x: Tensor, grad: Tensor, weight: Tensor, needs_dbias: bool, *sizes: int
) -> tuple[Tensor, Tensor | None]:
    """dweight, in the memory format of the weight, and dbias (out,) if it is needed, in one pass over the pixels."""
    dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.shape[0]) if needs_dbias else None
    dispatch.run(f"{kernel}_filter_gradient", x, grad, dweight, dbias, *sizes)
    return dweight, dbias


def _conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pre_activation: Tensor | None = None,
    apply_gelu: bool = False,
    transposed: bool = False,
) -> Tensor:
    """1x1 convolution of x, or with `apply_gelu` of gelu(x).

    `transposed`: the gradient of the input, given x, that of the output. With `pre_activation` it is passed on through
    GELU, to become the gradient of `pre_activation`.
    """
    out_channels, in_channels = weight.shape[:2]
    images, _, height, width = x.shape
    channels = (out_channels, in_channels) if transposed else (in_channels, out_channels)
    shape, pixels = (images, channels[1], height, width), images * height * width
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    dispatch.run("conv1x1", x, weight, bias, pre_activation, y, pixels, *channels, apply_gelu, transposed)
    return y


def _winograd_sizes(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """The sizes that the Winograd kernels take; `x` is the input of the convolution."""
    (stride, _), (rows, columns), _, groups, pads = geometry
    left, _, top, _ = pads or (0, 0, 0, 0)
    images, _, height, width = x.shape
    channels = (weight.shape[1], weight.shape[0] // groups)
    outputs = dispatch.output_sides(x, geometry)
    return (images, height, width, *outputs, groups, *channels, stride, top + rows, left + columns)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    shape = (len(x), len(weight), *dispatch.output_sides(x, geometry))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    dispatch.run("winograd", x, weight, bias, None, y, *_winograd_sizes(x, weight, geometry), False)
    return y
