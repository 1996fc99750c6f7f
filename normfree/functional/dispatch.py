"""When a native kernel runs, when PyTorch's operation does, and how a kernel is called.

A kernel runs if all of the following hold. Otherwise PyTorch's operation computes the same.

1. The call is eager (`is_eager`).
2. The tensors are plain float32 tensors on the CPU, and the library of kernels is there (`native_for`).
3. For gradients: they need not be differentiated again (`has_gradient_kernel`).
4. The kernel's row in `CONDITIONS` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normfree._compat import is_transformed
from normfree.native import library, native_for

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]  # zeros left, right, above, below


class Geometry(NamedTuple):
    """Of a 2-D convolution; `pads` are zeros in addition to `padding`."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    pads: Pads | None


# kernel and its gradient kernels -> whether they take arguments of these shapes and memory formats
CONDITIONS: dict[str, Callable[..., bool]] = {
    # else _standardize and _closed_form, or one pass for all filters of one length (standardize_all)
    "standardize": lambda weight, gain: (
        is_dense(weight) and weight.numel() > 0 and gain.is_contiguous() and gain.shape == weight.shape[:1]
    ),
    # else F.gelu
    "gelu": lambda x: is_dense(x),
    # else torch.addcmul and autograd; its forward pass is addcmul in any case
    "gated_sum": lambda x, gate: (
        x.ndim == 4 and is_channels_last(x) and x.numel() > 0 and gate.shape == (*x.shape[:2], 1, 1)
    ),
    # else the next row
    "conv1x1": lambda x, weight, bias, geometry: (
        weight.shape[2:] == (1, 1)
        and min(weight.shape[:2]) >= 32
        and (geometry.stride, geometry.padding, geometry.groups) == ((1, 1), (0, 0), 1)
        and not geometry.pads
        and _channels_fit(x, weight, bias, 1)
    ),
    # else F.conv2d
    "winograd": lambda x, weight, bias, geometry: (
        weight.shape[2:] == (3, 3)
        and geometry.stride in ((1, 1), (2, 2))
        and geometry.dilation == (1, 1)
        and _channels_fit(x, weight, bias, geometry.groups)
        and min(output_sides(x, geometry)) > 0
    ),
}


def has_kernel(kernel: str, *args: Tensor | Geometry | None) -> bool:
    """Whether an eager forward pass with these arguments is the kernel's."""
    tensors = [arg for arg in args if not isinstance(arg, Geometry | None)]  # or symbols of torch.fx
    return native_for(*tensors) is not None and CONDITIONS[kernel](*args)


def has_gradient_kernel(kernel: str, grad: Tensor, *args: Tensor | Geometry | None) -> bool:
    """Whether the backward pass is the kernel's, given the output's gradient and the arguments of the forward pass."""
    return not torch.is_grad_enabled() and native_for(grad) is not None and has_kernel(kernel, *args)


def is_eager() -> bool:
    """Whether operations run as they are called: neither compiled, traced or transformed, nor in forward mode."""
    return not (torch.compiler.is_compiling() or is_transformed())


def run(kernel: str, *args: Tensor | float | None) -> None:
    """Calls a kernel (native/kernels.h) that `native_for` has found. Tensors are passed as data pointers."""
    function = getattr(library(), f"normfree_{kernel}")
    function(*(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args), torch.get_num_threads())


def is_channels_last(x: Tensor) -> bool:
    """Whether memory has the order (N, H, W, C)."""
    return x.is_contiguous(memory_format=torch.channels_last)


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous, or (N, C, H, W) in channels-last order."""
    return x.is_contiguous() or (x.ndim == 4 and is_channels_last(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a dense x."""
    return torch.channels_last if x.ndim == 4 and not x.is_contiguous() else torch.contiguous_format


def output_sides(x: Tensor, geometry: Geometry) -> Pair:
    """Height and width of a 3x3 convolution of x without dilation."""
    (stride, _), (rows, columns), _, _, pads = geometry
    left, right, top, bottom = pads or (0, 0, 0, 0)
    height, width = x.shape[2:]
    return (height + 2 * rows + top + bottom - 3) // stride + 1, (width + 2 * columns + left + right - 3) // stride + 1


def _channels_fit(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    """Whether the channels of each group fill whole vectors, all is channels-last, and PyTorch would not complain."""
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    return (
        out_channels % 16 == in_channels % 16 == 0
        and (x.shape[1], weight.shape[0]) == (groups * in_channels, groups * out_channels)
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and x.numel() > 0
        and is_channels_last(x)
        and is_channels_last(weight)
    )
