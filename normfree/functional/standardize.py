"""Weight standardization, of one weight and of all weights of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from normfree.functional import dispatch
from normfree.native import native_for

Options = tuple[float, float, float, float]  # scale, share, floor, eps of `standardize`


def widened(x: Tensor) -> Tensor:
    """Half precision as float32, in which sums and squares neither overflow nor vanish; other dtypes unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def standardize(
    weight: Tensor, gain: Tensor, scale: float = 1.0, share: float = 1.0, floor: float = 1e-4, eps: float = 0.0
) -> Tensor:
    """(W_i - mean(W_i)) / sqrt(max(share * |W_i - mean(W_i)|², floor) + eps) * gain_i * scale.

    `weight` (out, ...): filter i is row i; `gain` (out,). `share` is the part of the filter that one output sees.
    Half precision is computed in float32 and rounded at the end.
    """
    options = (scale, share, floor, eps)
    return _Standardize.apply(weight, gain, *options) if dispatch.is_eager() else _standardize(weight, gain, *options)


def _standardize(weight: Tensor, gain: Tensor, scale: float, share: float, floor: float, eps: float) -> Tensor:
    centred, r, _ = _centre(widened(weight), share, floor, eps)
    standardized = centred * (r * (widened(gain) * scale).view(r.shape))
    return standardized.to(torch.promote_types(weight.dtype, gain.dtype))


def _centre(weight: Tensor, share: float, floor: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """W - mean(W), the factor r that standardizes it, and share * |W - mean(W)|²."""
    dims = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(dims, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=dims, keepdim=True)  # torch.var takes five times as long on a CPU
    if eps:
        square = norm.square() * share
        return centred, (square.clamp(min=floor) + eps).rsqrt(), square
    root = norm * share**0.5
    return centred, root.clamp(min=floor**0.5).reciprocal(), root.square()


class _Standardize(Function):
    """The gradient in closed form: with u = dL/dŴ and c = W - mean(W),

    dW = gain r (u - mean(u)) - gain slope <u, c> c, dgain = r <u, c>; slope = share r³, and 0 where the floor holds.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, *options: float) -> Tensor:
        scale, *rest = ctx.options = options
        if not dispatch.has_kernel("standardize", weight, gain):
            ctx.save_for_backward(weight, gain)
            return _standardize(weight, gain, *options)
        out, rows = torch.empty_like(weight), weight.shape[0]
        mean, r, slope = weight.new_empty(3, rows).unbind()
        sizes = (rows, weight.numel() // rows)
        dispatch.run("standardize", weight, gain, float(scale), *rest, *sizes, out, mean, r, slope)
        ctx.save_for_backward(weight, gain, mean, r, slope)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (weight, gain, *rows) = grads, ctx.saved_tensors
        if rows and dispatch.has_gradient_kernel("standardize", grad, weight, gain):
            grad = grad.contiguous(memory_format=dispatch.memory_format(weight))
            dweight, dgain = torch.empty_like(weight), torch.empty_like(gain)
            sizes = (weight.shape[0], weight[0].numel())
            scale = float(ctx.options[0])
            dispatch.run("standardize_gradient", weight, gain, scale, *rows, grad, *sizes, dweight, dgain)
        else:
            dweight, dgain = _closed_form(grad, weight, gain, *ctx.options)
        return dweight, dgain, None, None, None, None


def _closed_form(
    grad: Tensor, weight: Tensor, gain: Tensor, scale: float, share: float, floor: float, eps: float
) -> tuple[Tensor, Tensor]:
    """dW and dgain by PyTorch's operations, which can be differentiated again."""
    dims = tuple(range(1, weight.ndim))
    grad = widened(grad)
    centred, r, square = _centre(widened(weight), share, floor, eps)
    slope = torch.where(square < floor, 0, share * r**3)
    factor, dot = (widened(gain) * scale).view(r.shape), (grad * centred).sum(dims, keepdim=True)
    dweight = (grad - grad.mean(dims, keepdim=True)) * (factor * r) - centred * (factor * slope * dot)
    return dweight.to(weight.dtype), ((dot * r).view(gain.shape) * scale).to(gain.dtype)


def standardize_all(
    weights: Sequence[Tensor], gains: Sequence[Tensor], options: Sequence[Options]
) -> tuple[Tensor, ...]:
    """`standardize` of every weight with its gain and options, in one pass for all filters of one length.

    The kernels on a CPU take the weights one by one: there a pass costs memory traffic, not calls.
    """
    if not weights or not dispatch.is_eager() or all(native_for(weight) for weight in weights):
        each = zip(weights, gains, options, strict=True)
        return tuple(standardize(weight, gain, *option) for weight, gain, option in each)
    return _StandardizeAll.apply(tuple(options), *weights, *gains)


class _StandardizeAll(Function):
    @staticmethod
    def forward(ctx: Any, options: tuple[Options, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        weights, gains = tensors[: len(options)], tensors[len(options) :]
        outputs: dict[int, Tensor] = {}
        for indices, shared in _stackable(weights, options, range(len(options))):
            filters, gain = _stack(weights, indices), _stack_gains(gains, options, indices)
            outputs |= zip(indices, _unstack(_standardize(filters, gain, 1.0, *shared), weights, indices), strict=True)
        return tuple(outputs[i] for i in range(len(options)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        options, num = ctx.options, len(ctx.options)
        weights, gains = ctx.saved_tensors[:num], ctx.saved_tensors[num:]
        dweights: list[Tensor | None] = [None] * num
        dgains: list[Tensor | None] = [None] * num
        for indices, shared in _stackable(weights, options, [i for i, grad in enumerate(grads) if grad is not None]):
            laid_out = {
                i: cast(Tensor, grads[i]).contiguous(memory_format=dispatch.memory_format(weights[i])) for i in indices
            }
            filters, gain = _stack(weights, indices), _stack_gains(gains, options, indices)
            dfilters, dgain = _closed_form(_stack(laid_out, indices), filters, gain, 1.0, *shared)
            parts = dgain.split([len(gains[i]) for i in indices])
            scaled = torch._foreach_mul(parts, [options[i][0] for i in indices])
            for i, dweight, part in zip(indices, _unstack(dfilters, weights, indices), scaled, strict=True):
                dweights[i], dgains[i] = dweight, part
        return None, *dweights, *dgains


def _stackable(
    weights: Sequence[Tensor], options: Sequence[Options], indices: Sequence[int]
) -> list[tuple[list[int], tuple[float, ...]]]:
    """`indices` grouped by weights that can be stacked, with the options that these share (all but the scale)."""
    groups: dict[Any, list[int]] = {}
    for i in indices:
        key = (weights[i][0].numel(), weights[i].dtype, weights[i].device, options[i][1:])
        groups.setdefault(key, []).append(i)
    return [(group, key[-1]) for key, group in groups.items()]


def _in_memory_order(weight: Tensor) -> Tensor:
    """A channels-last weight as (out, ..., in), so that it can be flattened without a copy."""
    return weight if dispatch.memory_format(weight) is torch.contiguous_format else weight.movedim(1, -1)


def _stack(weights: Sequence[Tensor] | Mapping[int, Tensor], indices: Sequence[int]) -> Tensor:
    """(number of filters, fan-in), in the order of memory."""
    return torch.cat([_in_memory_order(weights[i]).flatten(1) for i in indices])


def _stack_gains(gains: Sequence[Tensor], options: Sequence[Options], indices: Sequence[int]) -> Tensor:
    """Gains times scales."""
    return torch.cat(torch._foreach_mul([gains[i] for i in indices], [options[i][0] for i in indices]))


def _unstack(filters: Tensor, weights: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """The inverse of `_stack`: parts with the shapes and memory formats of the weights."""
    parts = []
    for part, i in zip(filters.split([len(weights[i]) for i in indices]), indices, strict=True):
        part = part.view(_in_memory_order(weights[i]).shape)
        parts.append(part if dispatch.memory_format(weights[i]) is torch.contiguous_format else part.movedim(-1, 1))
    return parts
