"""GELU, means over pixels and gated sums: operations that memory traffic limits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from normfree.functional import dispatch


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form of the released networks: x sigmoid(2 sqrt(2/π) (x + 0.044715 x³)); any shape."""
    if dispatch.is_eager() and dispatch.has_kernel("gelu", x):
        return _Gelu.apply(x)
    return F.gelu(x, approximate="tanh")


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        dispatch.run("gelu", x, y, x.numel())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return gelu_gradient(grads[0], *ctx.saved_tensors)


def gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, given that of gelu(x)."""
    if not dispatch.has_gradient_kernel("gelu", grad, x):
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    grad, dx = grad.contiguous(memory_format=dispatch.memory_format(x)), torch.empty_like(x)
    dispatch.run("gelu_gradient", x, grad, dx, x.numel())
    return dx


def spatial_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C), in the dtype of x. The gradient of x is a view of N * C numbers, not a map."""
    if x.dtype == torch.float16:  # bfloat16 needs no care: its sums are float32 inside, and it has the range of float32
        return _HalfMean.apply(x) if dispatch.is_eager() else x.mean((2, 3), dtype=torch.float32).to(x.dtype)
    return x.sum((2, 3)) * (1 / (x.shape[2] * x.shape[3]))


class _HalfMean(Function):
    """The mean in float32, since the sum may overflow float16. Autograd's gradient of it would be a whole map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), dtype=torch.float32).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        share = grads[0].float() * (1 / (ctx.shape[2] * ctx.shape[3]))
        return share.to(grads[0].dtype)[:, :, None, None].expand(ctx.shape)


def avg_pool2x2(x: Tensor) -> Tensor:
    """2x2 mean with stride 2 of (N, C, H, W). At an odd side the last windows are cut off. Saves nothing of x."""
    return _AvgPool2x2.apply(x) if dispatch.is_eager() else F.avg_pool2d(x, 2, 2, ceil_mode=True)


class _AvgPool2x2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.format = torch.channels_last if dispatch.is_channels_last(x) else torch.contiguous_format
        return F.avg_pool2d(x, 2, 2, ceil_mode=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        # stands for x, of which the backward pass of PyTorch reads shape and memory format alone
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)
        return torch.ops.aten.avg_pool2d_backward(grad, x, [2, 2], [2, 2], [0, 0], True, True, None)


def gated_sum(shortcut: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """shortcut + x * gate, for `shortcut` and `x` (N, C, H, W) and `gate` (N, C, 1, 1)."""
    if dispatch.is_eager() and dispatch.has_kernel("gated_sum", x, gate):
        return _GatedSum.apply(shortcut, x, gate)
    return torch.addcmul(shortcut, x, gate)


class _GatedSum(Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return torch.addcmul(shortcut, x, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, gate), (grad,) = ctx.saved_tensors, grads
        if not dispatch.has_gradient_kernel("gated_sum", grad, x, gate):
            return grad, grad * gate, (grad * x).sum((2, 3), keepdim=True)
        grad, gate = grad.contiguous(memory_format=torch.channels_last), gate.contiguous()
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        dispatch.run("gate_gradient", grad, x, gate, dx, dgate, len(x), x[0, 0].numel(), x.shape[1])
        return grad, dx, dgate
