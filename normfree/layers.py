"""The pieces of a normalizer-free network.

Scalars ride on weights: the gain γ of an activation and the β of a block multiply the standardized weights of the
convolution that follows (`WSConv2d.input_scale`), and α, the SkipInit gain and the stochastic-depth mask multiply the
squeeze-excite gate. No feature map is read and written for the sake of a number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfree import functional
from normfree._compat import ConvNd, ConvTransposeNd, conv_forward, conv_pads, output_padding
from normfree.errors import InputError, nearest

Pair = tuple[int, int]

# name -> (function, γ). γ keeps the output variance at 1 for a standard normal input; the values are the constants of
# the released code (nfnets/base.py), sampled estimates up to 1e-3 above the exact ones (docs/parity.md).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "identity": (torch.positive, 1.0),
    "celu": (F.celu, 1.270926833152771),
    "elu": (F.elu, 1.2716004848480225),
    "gelu": (functional.gelu, 1.7015043497085571),  # with the tanh
    "gelu_erf": (F.gelu, 1.7015043497085571),  # timm's
    "leaky_relu": (F.leaky_relu, 1.70590341091156),
    "log_sigmoid": (F.logsigmoid, 1.9193484783172607),
    "relu": (F.relu, 1.7139588594436646),
    "relu6": (F.relu6, 1.7131484746932983),
    "selu": (F.selu, 1.0008515119552612),
    "sigmoid": (torch.sigmoid, 4.803835391998291),
    "silu": (F.silu, 1.7881293296813965),
    "soft_sign": (F.softsign, 2.338853120803833),
    "softplus": (F.softplus, 1.9203323125839233),
    "tanh": (torch.tanh, 1.5939117670059204),
}


class Activation(nn.Module):
    """An activation function without its γ, which is the attribute `gamma` for whoever consumes the output.

    `scaled`: with its γ, where no convolution follows to take it over.
    """

    def __init__(self, name: str, scaled: bool = False):
        super().__init__()
        if name not in ACTIVATIONS:
            raise InputError(f"no activation {name!r}{nearest(name, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")
        self.name, self.scaled = name, scaled
        self.function, self.gamma = ACTIVATIONS[name]
        # for the backward pass; the others keep their output, as the convolution after them does
        self.keeps_input = name not in ("identity", "relu", "sigmoid", "tanh")

    def forward(self, x: Tensor) -> Tensor:
        out = self.function(x)
        return out * self.gamma if self.scaled else out

    def extra_repr(self) -> str:
        return f"{self.name}, gamma={self.gamma:.6g}{', scaled' if self.scaled else ''}"


def init_normal_(weight: Tensor, std: float, truncated: bool = False) -> None:
    """N(0, std²), cut at two deviations if `truncated`; nothing on "meta", whose kernel takes seconds to import."""
    if weight.is_meta:
        return
    if truncated:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=std)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one side of `size` pixels, as TensorFlow's 'SAME' places them: the odd one goes after."""
    total = (size - 1) // stride * stride + kernel - size
    if kernel < stride:  # asked of numbers alone, so that an exported network may leave the size open
        total = max(total, 0)
    return total // 2, total - total // 2


def _same_pads(x: Tensor, extent: Pair, stride: Pair) -> functional.Pads:
    rows, columns = (same_padding(*sizes) for sizes in zip(x.shape[-2:], extent, stride, strict=True))
    return *columns, *rows


def _extent(kernel: Sequence[int], dilation: Pair) -> Pair:
    """Sides of the window that a dilated kernel sees."""
    return (kernel[0] - 1) * dilation[0] + 1, (kernel[1] - 1) * dilation[1] + 1


def _pair(value: int | Iterable[int]) -> Pair:
    height, width = value if isinstance(value, Iterable) else (value, value)
    return height, width


def conv2d_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Pair,
    groups: int,
    before: Activation | None = None,
    dilation: int | Pair = 1,
) -> Tensor:
    """Convolution of `before(x)` with 'SAME' padding; output side = ceil(input side / stride)."""
    stride, dilation = _pair(stride), _pair(dilation)
    pads, (height, width) = None, _extent(weight.shape[-2:], dilation)
    if height == width == 1 or (stride == (1, 1) and height % 2 == width % 2 == 1):  # whatever the size of x
        padding = (height // 2, width // 2)
    else:
        left, right, top, bottom = _same_pads(x, (height, width), stride)
        padding = (top, left)
        # a compiled or exported network is for sizes even and odd, so it must not ask
        if torch.compiler.is_compiling() or top != bottom or left != right:
            pads, padding = (left, right, top, bottom), (0, 0)
    recompute = before is not None and before.keeps_input
    geometry = (stride, padding, dilation, groups)
    return functional.conv2d(x, weight, bias, *geometry, pads=pads, before=before, recompute=recompute)


fx.wrap("conv2d_same")  # torch.fx calls it as it is: it asks for sides

# what the convolutions use in the context of `reuse_weights`, which is one thread's, or one task's, alone
REUSED: ContextVar[Mapping[WSConv, Tensor]] = ContextVar("REUSED", default=MappingProxyType({}))


class WSConv(ConvNd):
    """Scaled weight standardization for the convolution that a subclass also inherits from.

        Ŵ_i = (W_i - mean(W_i)) / sqrt(max(fan_in * var(W_i), 1e-4)) * gain_i * input_scale

    `gain` and `bias` (out,). Mean and biased variance run over the fan-in extent of output channel i. `input_scale` is
    the scalar that the input would otherwise have been multiplied by. With `eps` the denominator is
    sqrt(fan_in * (var(W_i) + eps)), as in timm. Paper eq. 1; nfnets/base.py.
    """

    input_scale: float | Tensor
    eps: float | None
    gain: nn.Parameter
    initial_gain = 1.0

    def _add_gain(self, input_scale: float, eps: float | None) -> None:
        self.gain = nn.Parameter(self.weight.detach().new_ones(self.out_channels))
        self.input_scale, self.eps = input_scale, eps

    @property
    def filter_size(self) -> int:
        """Number of weights of one output channel."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def fan_in(self) -> float:
        """Number of inputs in the sum that makes one output."""
        return self.filter_size

    def reset_parameters(self) -> None:
        """LeCun normal over the fan-in; biases 0, gains 1, an `input_scale` that was traced (`convert_to_nf`) 1."""
        init_normal_(self.weight, self.fan_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(getattr(self, "gain", None), nn.Parameter):  # else PyTorch's constructor is the caller
            nn.init.constant_(self.gain, self.initial_gain)
        if isinstance(getattr(self, "input_scale", None), Tensor):
            nn.init.ones_(cast(Tensor, self.input_scale))

    def standardized_weight(self) -> Tensor:
        """Ŵ, the weight that the convolution uses, of the shape of `weight`."""
        return self._standardize(self.weight)

    def _scaled(self, output_scale: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to use."""
        reused, bias = REUSED.get().get(self), self.bias
        weight = self.standardized_weight() if reused is None else reused
        if output_scale is None:
            return weight, bias
        return weight * output_scale, bias if bias is None else bias * output_scale

    def _standardize(self, weight: Tensor) -> Tensor:
        """Ŵ for a weight with the output channels first."""
        return functional.standardize(weight, self.gain, *self._options())

    def _options(self) -> functional.Options:
        floor, extra = (1e-4, 0.0) if self.eps is None else (0.0, self.eps * self.fan_in)
        return cast(float, self.input_scale), self.fan_in / self.filter_size, floor, extra

    def extra_repr(self) -> str:
        eps = "" if self.eps is None else f", eps={self.eps:g}"
        return f"{super().extra_repr()}, input_scale={self.input_scale:.6g}{eps}"


@contextlib.contextmanager
def reuse_weights(model: nn.Module) -> Iterator[None]:
    """Standardizes the weights of `model` once for all that is computed within: micro-batches, an evaluation.

        with reuse_weights(model):
            for images, labels in micro_batches:
                (F.cross_entropy(model(images), labels) / len(micro_batches)).backward()
        optimizer.step()

    The gradients are those of standardizing in every pass; they reach weights and gains when the context is left, if
    not by an error. Weights may not change within. It holds for the thread, or the asyncio task, that enters it; others
    may use the model meanwhile. Not for models that DDP or FSDP wrap: these wait for gradients pass by pass.
    """
    convs = [module for module in model.modules() if isinstance(module, WSConv)]
    weights = _standardized_weights(convs)
    leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
    token = REUSED.set({**REUSED.get(), **dict(zip(convs, leaves, strict=True))})
    try:
        yield
        grads = [leaf.grad for leaf in leaves]
        used = [weight for weight, grad in zip(weights, grads, strict=True) if grad is not None]
        torch.autograd.backward(used, [grad for grad in grads if grad is not None])
    finally:
        REUSED.reset(token)


def _standardized_weights(convs: Sequence[WSConv]) -> list[Tensor]:
    """`standardized_weight` of each, in one pass for those that have not one of their own."""
    plain = [conv for conv in convs if type(conv).standardized_weight is WSConv.standardized_weight]
    together = functional.standardize_all(
        [conv.weight for conv in plain], [conv.gain for conv in plain], [conv._options() for conv in plain]
    )
    found = dict(zip(plain, together, strict=True))
    return [found[conv] if conv in found else conv.standardized_weight() for conv in convs]


class _Initialized(nn.Module):
    """Weights N(0, `std`²), cut at two deviations if `truncated`, bias 0, once there is a `std`."""

    weight: Any
    bias: Any
    std: float | None = None
    truncated = False

    def initialize(self, std: float, truncated: bool = False) -> None:
        self.std, self.truncated = std, truncated
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.std is None:  # PyTorch's constructor: a seed gives the random numbers that it has always given
            cast(Any, super()).reset_parameters()
            return
        init_normal_(self.weight, self.std, self.truncated)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Linear(_Initialized, nn.Linear):
    """`nn.Linear` with an initialisation of its owner's."""


class _Conv1d(_Initialized, nn.Conv1d):
    """`nn.Conv1d` with an initialisation of its owner's."""


class SqueezeExcite(nn.Module):
    """Gate in (0, 1) for every channel of every image: (N, C, H, W) -> (N, C, 1, 1).

    Hidden activation is plain ReLU without γ: the paper's formula says GELU, the released code and weights have ReLU.
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = Linear(channels, hidden_channels)
        self.fc2 = Linear(hidden_channels, channels)
        for fc in (self.fc1, self.fc2):
            fc.initialize(fc.in_features**-0.5, truncated=True)  # haiku's default for linear layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.relu(self.fc1(functional.spatial_mean(x)))))[:, :, None, None]

    def count_macs(self) -> int:
        return self.fc1.weight.numel() + self.fc2.weight.numel()


class EfficientChannelAttention(nn.Module):
    """Gate in (0, 1) for every channel of every image, from its neighbours: (N, C, H, W) -> (N, C, 1, 1).

    One 1-D convolution over the channels' means, as wide as log2(C) says: Wang et al. 2020, arXiv 1910.03151.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        width = int((math.log2(channels) + 1) / 2)
        width = max(width if width % 2 else width + 1, 3)
        self.conv = _Conv1d(1, 1, width, padding=width // 2, bias=False)
        self.conv.initialize(width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(functional.spatial_mean(x)[:, None])).transpose(1, 2)[..., None]

    def count_macs(self) -> int:
        return self.channels * self.conv.weight.numel()


class StochasticDepth(nn.Module):
    """Zeroes whole samples of a (N, ...) tensor with probability `rate` while training; survivors are not rescaled.

    Without the usual 1 / (1 - rate), and without a factor in evaluation: nfnets/base.py, StochDepth.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return _drop_samples(x, self.rate if self.training else 0.0)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


def _drop_samples(x: Tensor, rate: float) -> Tensor:
    if rate == 0:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * keep


fx.wrap("_drop_samples")  # torch.fx calls it as it is: it asks for dimensions


class _WSConvNd(WSConv):
    """The constructor of the layers below: PyTorch's, and two keywords."""

    def __init__(
        self, *args: Any, device: Any = None, input_scale: float = 1.0, eps: float | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs, **({} if device is None else {"device": device}))
        self._add_gain(input_scale, eps)


class WSConv2d(_WSConvNd, nn.Conv2d):
    """2-D convolution with scaled weight standardization (`WSConv`); `weight` (out, in / groups, kh, kw).

    `nn.Conv2d`'s arguments, and the keywords `input_scale` and `eps`. `padding` is pixels a side, "valid", or one of
    two that also go with strides, of which they make output side = ceil(input side / stride): "same" places the odd
    zero after, as TensorFlow does, and PyTorch where there is no stride; "symmetric" has
    (stride - 1 + dilation * (kernel - 1)) // 2 pixels on either side, as timm does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        input_scale: float = 1.0,
        eps: float | None = None,
    ):
        pixels = padding
        if padding == "symmetric":
            sizes = zip(*(_pair(size) for size in (kernel_size, stride, dilation)), strict=True)
            pixels = tuple((s - 1 + d * (k - 1)) // 2 for k, s, d in sizes)
        elif isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise InputError(f'padding {padding!r}: pixels, "same", "symmetric" or "valid"')
            pixels = 0
        rest = (stride, pixels, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *rest, input_scale=input_scale, eps=eps)
        if padding == "same":  # PyTorch's constructor takes it without strides only
            self.padding = "same"

    def forward(
        self,
        input: Tensor,
        output_scale: Tensor | float | None = None,
        before: Activation | None = None,
    ) -> Tensor:
        """The convolution of `before(input)`, which the backward pass computes once more if that saves memory.

        `output_scale`, a scalar, multiplies the output by way of weight and bias.
        """
        weight, bias = self._scaled(output_scale)
        stride, padding, dilation = (cast(Pair, n) for n in (self.stride, self.padding, self.dilation))
        if self.padding_mode != "zeros":
            pads = conv_pads(self)
            if self.padding == "same":
                pads = _same_pads(input, _extent(cast(Pair, self.kernel_size), dilation), stride)
            made = F.pad(before(input) if before else input, pads, self.padding_mode)
            return functional.conv2d(made, weight, bias, stride, (0, 0), dilation, self.groups)
        if self.padding == "same":
            return conv2d_same(input, weight, bias, stride, self.groups, before, dilation)
        recompute = before is not None and before.keeps_input
        geometry = (stride, padding, dilation, self.groups)
        return functional.conv2d(input, weight, bias, *geometry, before=before, recompute=recompute)


class _WSForward(_WSConvNd):
    """What `WSConv1d` and `WSConv3d` share."""

    def forward(self, input: Tensor, output_scale: Tensor | float | None = None) -> Tensor:
        """`output_scale`, a scalar, multiplies the output by way of weight and bias."""
        return conv_forward(self, input, *self._scaled(output_scale))


class WSConv1d(_WSForward, nn.Conv1d):
    """1-D convolution with scaled weight standardization (`WSConv`).

    `nn.Conv1d`'s arguments, and the keywords `input_scale` and `eps`. `weight` (out, in / groups, k).
    """


class WSConv3d(_WSForward, nn.Conv3d):
    """3-D convolution with scaled weight standardization (`WSConv`).

    `nn.Conv3d`'s arguments, and the keywords `input_scale` and `eps`. `weight` (out, in / groups, kt, kh, kw).
    """


class _WSConvTransposeNd(_WSConvNd, ConvTransposeNd):
    """What the transposed convolutions share: their `weight` is (in, out / groups, ...).

    Mean and variance run over the filter of an output channel, (in / groups, ...), of which, with strides, one output
    sees a part: on average 1 / prod(stride). The fan-in is that much smaller, so that an input of unit variance gives
    an output whose variance is 1 on average over places (it differs from place to place unless kernel sides are
    multiples of the strides).
    """

    _transpose: Callable[..., Tensor]

    @property
    def fan_in(self) -> float:
        return self.filter_size / math.prod(self.stride)

    def standardized_weight(self) -> Tensor:
        grouped = self.weight.unflatten(0, (self.groups, -1))  # (groups, in / groups, out / groups, ...)
        weight = self._standardize(grouped.transpose(1, 2).flatten(0, 1))  # (out, in / groups, ...)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def forward(
        self, input: Tensor, output_size: list[int] | None = None, output_scale: Tensor | float | None = None
    ) -> Tensor:
        """`output_size` as in PyTorch's layers; `output_scale`, a scalar, multiplies by way of weight and bias."""
        sizes = (self.stride, self.padding, self.dilation)
        stride, padding, dilation = (list(cast(tuple[int, ...], size)) for size in sizes)
        end = output_padding(self, input, output_size)
        return self._transpose(input, *self._scaled(output_scale), stride, padding, end, self.groups, dilation)


class WSConvTranspose1d(_WSConvTransposeNd, nn.ConvTranspose1d):
    """Transposed 1-D convolution with scaled weight standardization (`WSConv`), one filter an output channel.

    `nn.ConvTranspose1d`'s arguments, and the keywords `input_scale` and `eps`. `weight` (in, out / groups, k).
    """

    _transpose = staticmethod(F.conv_transpose1d)


class WSConvTranspose2d(_WSConvTransposeNd, nn.ConvTranspose2d):
    """Transposed 2-D convolution with scaled weight standardization (`WSConv`), one filter an output channel.

    `nn.ConvTranspose2d`'s arguments, and the keywords `input_scale` and `eps`. `weight` (in, out / groups, kh, kw).
    """

    _transpose = staticmethod(F.conv_transpose2d)


class WSConvTranspose3d(_WSConvTransposeNd, nn.ConvTranspose3d):
    """Transposed 3-D convolution with scaled weight standardization (`WSConv`), one filter an output channel.

    `nn.ConvTranspose3d`'s arguments, and the keywords `input_scale` and `eps`. `weight` (in, out / groups, kt, kh, kw).
    """

    _transpose = staticmethod(F.conv_transpose3d)


class BranchEnd(WSConv):
    """A convolution that ends a residual branch: weight and bias are multiplied by α * gain, two scalars."""

    skip_gain: nn.Parameter
    alpha: Tensor

    def __init__(self, *args, device=None, **kwargs):  # `device` by name, for torch.nn.utils.skip_init
        super().__init__(*args, device=device, **kwargs)
        self.skip_gain = nn.Parameter(self.weight.detach().new_ones(()))
        self.register_buffer("alpha", self.weight.detach().new_ones(()))

    def reset_parameters(self) -> None:
        """As `WSConv`'s; α and its gain 1."""
        super().reset_parameters()
        if isinstance(getattr(self, "skip_gain", None), nn.Parameter):
            nn.init.ones_(self.skip_gain)
            nn.init.ones_(self.alpha)

    def _scaled(self, output_scale: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        scale = self.skip_gain * self.alpha
        return super()._scaled(scale if output_scale is None else scale * output_scale)


class BranchEndConv1d(BranchEnd, WSConv1d):
    """`WSConv1d` at the end of a residual branch."""


class BranchEndConv2d(BranchEnd, WSConv2d):
    """`WSConv2d` at the end of a residual branch."""


class BranchEndConv3d(BranchEnd, WSConv3d):
    """`WSConv3d` at the end of a residual branch."""


class SkipInit(nn.Module):
    """x -> α * gain * x: the end of a residual branch where that is no convolution."""

    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.skip_gain = nn.Parameter(torch.ones(()))
        self.register_buffer("alpha", torch.ones(()))

    def reset_parameters(self) -> None:
        """α and its gain 1."""
        nn.init.ones_(self.skip_gain)
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.skip_gain * self.alpha)


class ChannelAffine(nn.Module):
    """x -> weight * x + bias, one number a channel: batch normalization by constants. (N, C, ...) -> the same."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))
