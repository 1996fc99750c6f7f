"""The layers of a normalizer-free network.

Scalars multiply weights, not feature maps: the gain γ of an activation and the β of a block multiply the standardized
weights of the next convolution (`WSConv2d.input_scale`), and α, the SkipInit gain and the stochastic-depth mask
multiply the squeeze-excite gate. No scalar costs a pass over a map.
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

# name -> (function, γ). γ keeps the output variance at 1 for a standard normal input. The values are those of the
# released code (nfnets/base.py): sampled estimates, up to 1e-3 above the exact constants (docs/parity.md).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "identity": (torch.positive, 1.0),
    "celu": (F.celu, 1.270926833152771),
    "elu": (F.elu, 1.2716004848480225),
    "gelu": (functional.gelu, 1.7015043497085571),  # in the tanh form
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
    """An activation function, one of `ACTIVATIONS`, without its γ: the next convolution's weights take `gamma`.

    With `scaled` the output is multiplied by γ, for an activation that no convolution follows. Raises `InputError` for
    an unknown name.
    """

    def __init__(self, name: str, scaled: bool = False):
        super().__init__()
        if name not in ACTIVATIONS:
            raise InputError(f"no activation {name!r}{nearest(name, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}")
        self.name, self.scaled = name, scaled
        self.function, self.gamma = ACTIVATIONS[name]
        # for the backward pass; the others save their output, which the next convolution saves too
        self.keeps_input = name not in ("identity", "relu", "sigmoid", "tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        out = self.function(x)
        return out * self.gamma if self.scaled else out

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.name}, gamma={self.gamma:.6g}{', scaled' if self.scaled else ''}"


def init_normal_(weight: Tensor, std: float, truncated: bool = False) -> None:
    """Draws from N(0, std²), truncated at two deviations if `truncated`; nothing on "meta", which is slow to import."""
    if weight.is_meta:
        return
    if truncated:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=std)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side of `size` pixels for TensorFlow's 'SAME' padding: an odd one goes after."""
    total = (size - 1) // stride * stride + kernel - size
    if kernel < stride:  # not a condition on `size`, which an exported network may leave open
        total = max(total, 0)
    return total // 2, total - total // 2


def _same_pads(x: Tensor, extent: Pair, stride: Pair) -> functional.Pads:
    rows, columns = (same_padding(*sizes) for sizes in zip(x.shape[-2:], extent, stride, strict=True))
    return *columns, *rows


def _extent(kernel: Sequence[int], dilation: Pair) -> Pair:
    """Height and width of the window of a dilated kernel."""
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
    """Convolution of `before(x)` with TensorFlow's 'SAME' padding: output side = ceil(input side / stride).

    `x` (N, in, H, W), `weight` (out, in / groups, kh, kw), `bias` (out,).
    """
    stride, dilation = _pair(stride), _pair(dilation)
    pads, (height, width) = None, _extent(weight.shape[-2:], dilation)
    if height == width == 1 or (stride == (1, 1) and height % 2 == width % 2 == 1):  # whatever the size of x
        padding = (height // 2, width // 2)
    else:
        left, right, top, bottom = _same_pads(x, (height, width), stride)
        padding = (top, left)
        # a compiled or exported network takes even and odd sizes, so it must not branch on them
        if torch.compiler.is_compiling() or top != bottom or left != right:
            pads, padding = (left, right, top, bottom), (0, 0)
    recompute = before is not None and before.keeps_input
    geometry = (stride, padding, dilation, groups)
    return functional.conv2d(x, weight, bias, *geometry, pads=pads, before=before, recompute=recompute)


fx.wrap("conv2d_same")  # a leaf for torch.fx, since it branches on sizes

# the weights to use in the context of `reuse_weights`, for the thread or asyncio task that entered it
REUSED: ContextVar[Mapping[WSConv, Tensor]] = ContextVar("REUSED", default=MappingProxyType({}))


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that takes over the activation before it and a factor after it, as `WSConv2d` does.

    `padding` is a number of pixels, "valid", "same" or "symmetric". The last two also work with strides: output side =
    ceil(input side / stride). "same" pads an odd zero after, as TensorFlow does; "symmetric" pads
    (stride - 1 + dilation * (kernel - 1)) // 2 on either side, as timm does. Raises `InputError` for any other string.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        *args: Any,
        **kwargs: Any,
    ):
        pixels = padding
        if padding == "symmetric":
            sizes = zip(*(_pair(size) for size in (kernel_size, stride, dilation)), strict=True)
            pixels = tuple((s - 1 + d * (k - 1)) // 2 for k, s, d in sizes)
        elif isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise InputError(f'padding {padding!r}: pixels, "same", "symmetric" or "valid"')
            pixels = 0
        super().__init__(in_channels, out_channels, kernel_size, stride, pixels, dilation, *args, **kwargs)
        if padding == "same":  # PyTorch's constructor refuses it with strides
            self.padding = "same"

    def _scaled(self, output_scale: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to use."""
        return _times(self.weight, self.bias, output_scale)

    def forward(
        self,
        input: Tensor,
        output_scale: Tensor | float | None = None,
        before: Activation | None = None,
    ) -> Tensor:
        """Convolution of `before(input)`, which the backward pass computes again if that saves memory.

        (N, in, H, W) -> (N, out, H', W'). `output_scale`, a scalar, multiplies the output by way of weight and bias.
        """
        weight, bias = self._scaled(output_scale)
        stride, padding, dilation = (cast(Pair, n) for n in (self.stride, self.padding, self.dilation))
        if self.padding_mode != "zeros":
            pads = conv_pads(self)
            if self.padding == "same":
                pads = _same_pads(input, _extent(cast(Pair, self.kernel_size), dilation), stride)
            padded = F.pad(before(input) if before else input, pads, self.padding_mode)
            return functional.conv2d(padded, weight, bias, stride, (0, 0), dilation, self.groups)
        if self.padding == "same":
            return conv2d_same(input, weight, bias, stride, self.groups, before, dilation)
        recompute = before is not None and before.keeps_input
        geometry = (stride, padding, dilation, self.groups)
        return functional.conv2d(input, weight, bias, *geometry, before=before, recompute=recompute)


def convolve(
    conv: nn.Module, x: Tensor, before: Activation | None = None, output_scale: Tensor | float | None = None
) -> Tensor:
    """conv(before(x)) * output_scale. `Conv2d` and `WSConv2d` do all of it, any other convolution its own part."""
    if isinstance(conv, Conv2d):
        return conv(x, output_scale=output_scale, before=before)
    out = conv(before(x) if before else x)
    return out if output_scale is None else out * output_scale


def _times(weight: Tensor, bias: Tensor | None, scale: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
    return (weight, bias) if scale is None else (weight * scale, bias if bias is None else bias * scale)


class WSConv(ConvNd):
    """Scaled weight standardization, for subclasses that also inherit from one of PyTorch's convolutions.

    They take PyTorch's arguments, and the keywords `input_scale` and `eps`.

        Ŵ_i = (W_i - mean(W_i)) / sqrt(max(fan_in * var(W_i), 1e-4)) * gain_i * input_scale

    `gain` and `bias` (out,). Mean and biased variance are over the filter of output channel i. `input_scale` is the
    scalar that the input would otherwise be multiplied by. With `eps` the denominator is
    sqrt(fan_in * (var(W_i) + eps)), as in timm. Paper eq. 1; nfnets/base.py.
    """

    input_scale: float | Tensor
    eps: float | None
    gain: nn.Parameter
    initial_gain = 1.0

    def __init__(  # `device` by name, for torch.nn.utils.skip_init
        self, *args: Any, device: Any = None, input_scale: float = 1.0, eps: float | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs, **({} if device is None else {"device": device}))
        self.gain = nn.Parameter(self.weight.detach().new_ones(self.out_channels))
        self.input_scale, self.eps = input_scale, eps

    @property
    def filter_size(self) -> int:
        """Number of weights of one output channel."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def fan_in(self) -> float:
        """Number of terms in the sum of one output."""
        return self.filter_size

    def reset_parameters(self) -> None:
        """LeCun normal weights over the fan-in, biases 0, gains 1; `input_scale` 1 if `convert_to_nf` traced it."""
        init_normal_(self.weight, self.fan_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(getattr(self, "gain", None), nn.Parameter):  # else PyTorch's constructor is the caller
            nn.init.constant_(self.gain, self.initial_gain)
        if isinstance(getattr(self, "input_scale", None), Tensor):
            nn.init.ones_(cast(Tensor, self.input_scale))

    def standardized_weight(self) -> Tensor:
        """Ŵ, the weight that the convolution uses, in the shape of `weight`."""
        return self._standardize(self.weight)

    def _scaled(self, output_scale: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to use."""
        reused = REUSED.get().get(self)
        return _times(self.standardized_weight() if reused is None else reused, self.bias, output_scale)

    def _standardize(self, weight: Tensor) -> Tensor:
        """Ŵ for a weight with the output channels first."""
        return functional.standardize(weight, self.gain, *self._options())

    def _options(self) -> functional.Options:
        floor, eps = (1e-4, 0.0) if self.eps is None else (0.0, self.eps * self.fan_in)
        return cast(float, self.input_scale), self.fan_in / self.filter_size, floor, eps

    def extra_repr(self) -> str:
        """For print(model)."""
        eps = "" if self.eps is None else f", eps={self.eps:g}"
        return f"{super().extra_repr()}, input_scale={self.input_scale:.6g}{eps}"


@contextlib.contextmanager
def reuse_weights(model: nn.Module) -> Iterator[None]:
    """Standardizes the weights of `model` once for all passes in the context: of micro-batches, or of an evaluation.

        with reuse_weights(model):
            for images, labels in micro_batches:
                (F.cross_entropy(model(images), labels) / len(micro_batches)).backward()
        optimizer.step()

    The gradients equal those of standardizing in every pass. They reach weights and gains when the context ends without
    an error. Weights must not change in it. Other threads and asyncio tasks may use the model at the same time; the
    context has no effect on them. Not for models that DDP or FSDP wrap, which wait for the gradients of each pass.
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
    """`standardized_weight` of each, in one pass for all convolutions that do not override it."""
    plain = [conv for conv in convs if type(conv).standardized_weight is WSConv.standardized_weight]
    together = functional.standardize_all(
        [conv.weight for conv in plain], [conv.gain for conv in plain], [conv._options() for conv in plain]
    )
    weights = dict(zip(plain, together, strict=True))
    return [weights[conv] if conv in weights else conv.standardized_weight() for conv in convs]


class _Initialized(nn.Module):
    """After `initialize`: weights from N(0, `std`²), truncated at two deviations if `truncated`, and bias 0."""

    weight: Any
    bias: Any
    std: float | None = None
    truncated = False

    def initialize(self, std: float, truncated: bool = False) -> None:
        """Draws new weights, and remembers how for `reset_parameters`."""
        self.std, self.truncated = std, truncated
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `initialize` did; before that, as PyTorch does, whose draws keep a seed's random numbers as they were."""
        if self.std is None:
            cast(Any, super()).reset_parameters()
            return
        init_normal_(self.weight, self.std, self.truncated)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Linear(_Initialized, nn.Linear):
    """`nn.Linear` whose owner sets the initialisation."""


class _Conv1d(_Initialized, nn.Conv1d):
    """`nn.Conv1d` whose owner sets the initialisation."""


class SqueezeExcite(nn.Module):
    """Gate in (0, 1) for every channel of every image: (N, C, H, W) -> (N, C, 1, 1).

    The hidden activation is ReLU without γ, as in the released code and weights; the paper's formula has GELU.
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = Linear(channels, hidden_channels)
        self.fc2 = Linear(hidden_channels, channels)
        for fc in (self.fc1, self.fc2):
            fc.initialize(fc.in_features**-0.5, truncated=True)  # haiku's default for linear layers

    def forward(self, x: Tensor) -> Tensor:
        """The gate; it does not multiply x."""
        return torch.sigmoid(self.fc2(F.relu(self.fc1(functional.spatial_mean(x)))))[:, :, None, None]

    def count_macs(self) -> int:
        """Multiply-adds for one image."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()


class EfficientChannelAttention(nn.Module):
    """Gate in (0, 1) for every channel of every image: (N, C, H, W) -> (N, C, 1, 1).

    One 1-D convolution over the means of neighbouring channels; its width grows with log2(C). Wang et al. 2020, arXiv
    1910.03151.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        width = int((math.log2(channels) + 1) / 2)
        width = max(width if width % 2 else width + 1, 3)
        self.conv = _Conv1d(1, 1, width, padding=width // 2, bias=False)
        self.conv.initialize(width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The gate; it does not multiply x."""
        return torch.sigmoid(self.conv(functional.spatial_mean(x)[:, None])).transpose(1, 2)[..., None]

    def count_macs(self) -> int:
        """Multiply-adds for one image."""
        return self.channels * self.conv.weight.numel()


class StochasticDepth(nn.Module):
    """In training, zeroes whole samples of a (N, ...) tensor with probability `rate`.

    Survivors are not multiplied by the usual 1 / (1 - rate), and evaluation has no factor either: StochDepth of
    nfnets/base.py.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> the same shape."""
        return _drop_samples(x, self.rate if self.training else 0.0)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"rate={self.rate:.4g}"


def _drop_samples(x: Tensor, rate: float) -> Tensor:
    if rate == 0:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * keep


fx.wrap("_drop_samples")  # a leaf for torch.fx, since it branches on the number of dimensions


class WSConv2d(WSConv, Conv2d):
    """`Conv2d` with scaled weight standardization (`WSConv`); `weight` (out, in / groups, kh, kw).

    The arguments are those of `nn.Conv2d`, with the paddings of `Conv2d`, and the keywords `input_scale` and `eps`.
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
        rest = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *rest, input_scale=input_scale, eps=eps)


class _WSForward(WSConv):
    """The forward pass of `WSConv1d` and `WSConv3d`."""

    def forward(self, input: Tensor, output_scale: Tensor | float | None = None) -> Tensor:
        """(N, in, ...) -> (N, out, ...). `output_scale`, a scalar, multiplies the output by way of weight and bias."""
        return conv_forward(self, input, *self._scaled(output_scale))


class WSConv1d(_WSForward, nn.Conv1d):
    """`nn.Conv1d` with scaled weight standardization (`WSConv`); `weight` (out, in / groups, k)."""


class WSConv3d(_WSForward, nn.Conv3d):
    """`nn.Conv3d` with scaled weight standardization (`WSConv`); `weight` (out, in / groups, kt, kh, kw)."""


class _WSConvTransposeNd(WSConv, ConvTransposeNd):
    """Weight standardization for transposed convolutions, whose `weight` is (in, out / groups, ...).

    Mean and variance are over the filter of an output channel, (in / groups, ...). With strides, one output sees only
    1 / prod(stride) of that filter on average. The fan-in is smaller by this factor, so that unit variance of the input
    gives unit variance of the output on average over places. (The variance differs from place to place unless the
    kernel sides are multiples of the strides.)
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
        """(N, in, ...) -> (N, out, ...). `output_size` is that of PyTorch's layers.

        `output_scale`, a scalar, multiplies the output by way of weight and bias.
        """
        sizes = (self.stride, self.padding, self.dilation)
        stride, padding, dilation = (list(cast(tuple[int, ...], size)) for size in sizes)
        end = output_padding(self, input, output_size)
        return self._transpose(input, *self._scaled(output_scale), stride, padding, end, self.groups, dilation)


class WSConvTranspose1d(_WSConvTransposeNd, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with scaled weight standardization (`WSConv`); `weight` (in, out / groups, k)."""

    _transpose = staticmethod(F.conv_transpose1d)


class WSConvTranspose2d(_WSConvTransposeNd, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with scaled weight standardization (`WSConv`); `weight` (in, out / groups, kh, kw)."""

    _transpose = staticmethod(F.conv_transpose2d)


class WSConvTranspose3d(_WSConvTransposeNd, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with scaled weight standardization (`WSConv`); `weight` (in, out / groups, kt, kh, kw)."""

    _transpose = staticmethod(F.conv_transpose3d)


class BranchEnd(WSConv):
    """A convolution at the end of a residual branch: the scalars α and SkipInit gain multiply weight and bias."""

    skip_gain: nn.Parameter
    alpha: Tensor

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any):
        super().__init__(*args, device=device, **kwargs)
        self.skip_gain = nn.Parameter(self.weight.detach().new_ones(()))
        self.register_buffer("alpha", self.weight.detach().new_ones(()))

    def reset_parameters(self) -> None:
        """Like `WSConv`; α and the SkipInit gain are set to 1."""
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
    """x -> α * gain * x, for a residual branch that does not end in a convolution. Any shape."""

    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.skip_gain = nn.Parameter(torch.ones(()))
        self.register_buffer("alpha", torch.ones(()))

    def reset_parameters(self) -> None:
        """Sets α and the gain to 1."""
        nn.init.ones_(self.skip_gain)
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return x * (self.skip_gain * self.alpha)


class ChannelAffine(nn.Module):
    """weight * x + bias with one weight and one bias a channel: batch normalization with fixed statistics."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))
