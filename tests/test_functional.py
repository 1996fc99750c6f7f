"""normfree.functional with and without kernels, against float64 references by PyTorch's operations and autograd.

Tolerances are multiples of U, the largest relative error of one float32 rounding.
"""

import contextlib
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import normfree.native
from normfree import functional
from normfree.functional import dispatch
from normfree.functional.pointwise import _GatedSum
from normfree.functional.standardize import _standardize
from normfree.layers import Activation
from normfree.models import create_model
from normfree.native import library, status

U = 2.0**-24
LAST, FIRST = torch.channels_last, torch.contiguous_format
FORMATS = pytest.mark.parametrize("memory_format", [FIRST, LAST], ids=["nchw", "nhwc"])
needs_kernels = pytest.mark.skipif(library() is None, reason=f"kernels {status()}")


@contextlib.contextmanager
def kernels(on: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not on:
            patch.setattr("normfree.native.library", lambda: None)
        yield


@pytest.fixture(params=[pytest.param(True, marks=needs_kernels), False], ids=["native", "plain"])
def kernels_on_and_off(request):
    with kernels(request.param):
        yield


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the calls of convolution kernels: "winograd forward", "... input", "... filters", "conv1x1 ..."."""
    calls, run = Counter(), dispatch.run

    def count(kernel: str, *args: object) -> None:
        name, _, gradient = kernel.partition("_")
        if name in ("winograd", "conv1x1"):
            calls[f"{name} {'filters' if gradient else 'input' if args[-1] else 'forward'}"] += 1
        run(kernel, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "run", count)
        yield calls


def draw(*shape: int, seed: int = 0, memory_format: torch.memory_format = FIRST) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=memory_format) if len(shape) == 4 else x


def leaves(*tensors: Tensor, double: bool = False) -> list[Tensor]:
    """Copies in the same memory format that require a gradient."""
    return [(t.double() if double else t.clone()).requires_grad_() for t in tensors]


def derived(function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor, double: bool = False) -> list[Tensor]:
    """The output, and the gradients of all inputs for `grad` at the output; with `double` in float64."""
    inputs = leaves(*inputs, double=double)
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def saved_storages(function: Callable[[], Tensor]) -> dict[int, int]:
    """Address -> bytes of every storage that is saved for the backward pass."""
    saved = {}
    with saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), id
    ):
        function()
    return saved


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# --- weight standardization ---


def standardized(w: Tensor, gain: Tensor, scale: float, share: float, floor: float, eps: float) -> Tensor:
    """The definition, row by row."""
    rows = w.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    square = share * centred.square().sum(1, keepdim=True)
    return (centred / (square.clamp(min=floor) + eps).sqrt() * (gain * scale)[:, None]).view_as(w)


def rounding(w: Tensor, gain: Tensor, grad: Tensor, scale: float, share: float, floor: float, eps: float):
    """Limits of the rounding errors of standardized weights and of both gradients, row by row.

    Subtracting the mean rounds at the size of the largest weight, however small the difference is. The error of a sum
    is bounded by the sum of magnitudes. 16 U allow for a few roundings in sequence. A sum of equal numbers, up to 256
    in a lane, is rounded in the same direction each time.
    """
    w, grad, gain = w.double().flatten(1), grad.double().flatten(1), (gain.double() * scale).abs()
    square = share * (w - w.mean(1, keepdim=True)).square().sum(1)
    r = (square.clamp(min=floor) + eps).rsqrt()
    slope = torch.where(square < floor, 0, share * r**3)
    largest, total = w.abs().amax(1), grad.abs().sum(1)
    step, step_grad = (U * torch.where(x.std(1, correction=0) < 1e-6 * x.abs().amax(1), 256, 16) for x in (w, grad))
    weights = step * gain * r * largest
    by_mean, by_norm = step_grad * gain * r * grad.abs().amax(1), step * gain * slope * total * largest**2
    return weights, by_mean + by_norm, step * scale * r * total * largest


SHAPES = [
    (4, 1),
    (5, 3),
    (3, 2, 3, 3),
    (6, 16, 1, 1),
    (3, 1025),
    (20, 1025),
    (40, 48, 3, 3),
    (2, 3, 2, 3, 3),
    (2, 3, 7),
]


@settings(max_examples=40)
@given(
    shape=st.sampled_from(SHAPES),
    size=st.sampled_from([1.0, 1e-5]),  # the second one is below the floor
    offset=st.sampled_from([0.0, 0.3, 30.0]),
    options=st.sampled_from([(1.0, 1e-4, 0.0), (0.25, 1e-4, 0.0), (1.0, 0.0, 1e-3), (0.25, 0.0, 1e-3)]),
    order=st.sampled_from(["first", "last", "transposed"]),
    grad_order=st.sampled_from(["first", "last", "expanded"]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("on", [pytest.param(True, marks=needs_kernels), False], ids=["native", "plain"])
def test_standardized_weights_and_their_gradients(on, shape, size, offset, options, order, grad_order, seed):
    w, gain, grad = (draw(*s, seed=seed + i) for i, s in enumerate((shape, shape[:1], shape)))
    w = w * size + offset
    w[0] = 0.7  # the floor, or eps, holds
    if order == "transposed":
        w = w.transpose(0, 1).clone(memory_format=FIRST).transpose(0, 1)
    elif order == "last" and w.ndim == 4:
        w = w.contiguous(memory_format=LAST)
    if grad_order == "expanded":
        grad = grad[:, :1].expand(shape)
    elif grad_order == "last" and w.ndim == 4:
        grad = grad.contiguous(memory_format=LAST)
    options = (1.7, *options)
    with kernels(on):
        ours = derived(lambda *inputs: functional.standardize(*inputs, *options), w, gain, grad=grad)
    truth = derived(lambda *inputs: standardized(*inputs, *options), w, gain, grad=grad, double=True)
    assert ours[0].stride() == w.stride() or order == "transposed"
    for a, b, limit in zip(ours, truth, rounding(w, gain, grad, *options), strict=True):
        error = (a.double() - b).abs().flatten(1).amax(1) if a.ndim > 1 else (a.double() - b).abs()
        assert (error <= limit).all(), (error / limit).max()


def test_standardization_can_be_differentiated_twice():
    weight, gain = leaves(draw(4, 3, 2, 2), draw(4), double=True)
    with torch.no_grad():
        weight[0] = 0.3
        weight[1] *= 1e-4
    for options in [(1.7, 0.25, 1e-4, 0.0), (1.7, 0.5, 0.0, 1e-3)]:
        assert gradcheck(lambda *x, o=options: functional.standardize(*x, *o), (weight[1:], gain[1:]))
        assert gradgradcheck(lambda *x, o=options: functional.standardize(*x, *o), (weight[1:], gain[1:]))
    assert gradcheck(functional.standardize, (weight, gain))
    assert gradgradcheck(functional.standardize, (weight, gain))


STACK = [((4, 6, 3, 3), FIRST), ((8, 6, 3, 3), LAST), ((5, 54), FIRST), ((3, 6, 1, 1), LAST), ((2, 1, 54), FIRST)]


@pytest.mark.parametrize("unused", [(), (1,), (0, 3)])
def test_standardizing_all_weights_is_standardizing_each(unused):
    """In shape and memory format too. Weights whose output is not used get no gradient."""
    weights = leaves(
        *(draw(*shape, seed=i).contiguous(memory_format=f) for i, (shape, f) in enumerate(STACK)), double=True
    )
    gains = leaves(*(draw(len(w), seed=9) for w in weights), double=True)
    options = [
        (1.7, 1.0, 1e-4, 0.0),
        (0.3, 1.0, 1e-4, 0.0),
        (1.7, 1.0, 1e-4, 0.0),
        (1.7, 1.0, 0.0, 1e-3),
        (1.0, 1.0, 0.0, 1e-3),
    ]
    grads = [draw(*w.shape, seed=20).double() for w in weights]
    found = []
    together = functional.standardize_all(weights, gains, options)
    apart = [functional.standardize(w, g, *o) for w, g, o in zip(weights, gains, options, strict=True)]
    for outs in (together, apart):
        used = [i for i in range(len(STACK)) if i not in unused]
        wanted = [*weights, *gains]
        found.append(torch.autograd.grad([outs[i] for i in used], wanted, [grads[i] for i in used], allow_unused=True))
    assert [grad is None for grad in found[0]] == 2 * [i in unused for i in range(len(STACK))]
    assert [w.stride() for w in together] == [w.stride() for w in weights]
    for a, b in zip((*together, *found[0]), (*apart, *found[1]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_standardizing_all_weights_can_be_differentiated_twice():
    weights = leaves(draw(2, 3, 1, 2), draw(3, 6, seed=1), draw(2, 2, seed=2), double=True)
    gains = leaves(draw(2), draw(3), draw(2), double=True)
    options = [(1.7, 1.0, 1e-4, 0.0), (0.3, 1.0, 1e-4, 0.0), (1.0, 1.0, 0.0, 1e-3)]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return functional.standardize_all(inputs[:3], inputs[3:], options)

    assert gradcheck(function, (*weights, *gains))
    assert gradgradcheck(function, (*weights, *gains))


def second(function: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor) -> Tensor:
    """Gradient of the gradient's product with `directions`."""
    (x,) = leaves(x)
    (grad,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad((grad * directions).sum(), x)[0]


@needs_kernels
@FORMATS
def test_second_derivatives_after_the_kernels(memory_format):
    """The kernels compute the forward pass, PyTorch the gradients that are differentiated again."""
    x, directions = draw(2, 16, 5, 6, memory_format=memory_format), draw(2, 16, 5, 6, seed=1)
    weight = draw(32, 16, 3, 3, seed=2, memory_format=memory_format) / 12
    gain, before = torch.ones(2), Activation("gelu")
    functions = {
        functional.gelu: lambda x: F.gelu(x, approximate="tanh"),
        lambda x: functional.standardize(x, gain): lambda x: standardized(x, gain.double(), 1, 1, 1e-4, 0),
        functional.avg_pool2x2: lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
        lambda x: functional.gated_sum(x, x, directions[..., :1, :1]): lambda x: (
            x + x * directions[..., :1, :1].double()
        ),
        lambda x: functional.conv2d(x, weight, padding=(1, 1), before=before): lambda x: F.conv2d(
            before(x), weight.double(), padding=1
        ),
    }
    for ours, plain in functions.items():
        truth = second(plain, x.double(), directions.double())
        assert (second(ours, x, directions) - truth).abs().max() <= 100 * U * truth.abs().max()


@pytest.mark.usefixtures("kernels_on_and_off")
@FORMATS
def test_not_a_number_stays_in_its_filter(memory_format):
    weight, gain, grad = draw(4, 6, 3, 3, memory_format=memory_format), draw(4), draw(4, 6, 3, 3)
    whole = derived(functional.standardize, weight, gain, grad=grad)
    weight[1, 2, 0, 1] = torch.nan
    for a, b in zip(derived(functional.standardize, weight, gain, grad=grad), whole, strict=True):
        assert a[1].isnan().all()
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


# --- activations and means ---


def gelu_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For float64 x: exponent, gate = 1 / (1 + e^exponent), 1 - gate, and the derivative of -exponent."""
    factor = (8 / torch.pi) ** 0.5
    exponent = -factor * (x + 0.044715 * x**3)
    return exponent, torch.sigmoid(-exponent), torch.sigmoid(exponent), factor * (1 + 3 * 0.044715 * x**2)


@needs_kernels
@pytest.mark.parametrize("size", [1, 7, 15, 16, 17, 4095, 4113, 50_001])
def test_gelu(size):
    """The exponent is right to 5 U of itself, which is an error of e^exponent; 1 - gate to 2 U of 1, or of itself.

    Below x = -10, where the exponent is cut at 88, both are below the smallest floats that matter.
    """
    x = torch.linspace(-40, 40, size) if size > 100 else draw(size) * 4
    grad = draw(size, seed=1)
    y, dx = derived(functional.gelu, x, grad=grad)
    x, grad = x.double(), grad.double()
    exponent, gate, rest, slope = gelu_parts(x)
    step = U * (8 + 5 * exponent.abs())
    assert ((y - x * gate).abs() <= step * (x * gate).abs() + 1e-36).all()
    truth = gate * (1 + x * rest * slope)
    limit = step * gate * (1 + (x * rest * slope).abs()) + gate * (x * slope).abs() * (2 * rest).clamp(max=2 * U)
    assert ((dx - grad * truth).abs() <= grad.abs() * limit + 1e-33).all()


@pytest.mark.usefixtures("kernels_on_and_off")
@pytest.mark.parametrize("filler", [0, 16, 30])
def test_gelu_of_special_values(filler):
    """At any place in a vector, and in the rest at the end."""
    special = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-40, -1e-40, -torch.inf, 30.0, -30.0])
    y, dx = derived(functional.gelu, torch.cat([torch.ones(filler), special]), grad=torch.ones(filler + 9))
    y, dx = y[filler:], dx[filler:]
    assert y[:2].signbit().tolist() == [False, True]
    assert (y[:2] == 0).all()
    assert (dx[:2] == 0.5).all()
    assert y[2] == torch.inf
    assert y[3].isnan()
    assert dx[3].isnan()
    assert (y[4:6] - 0.5 * special[4:6]).abs().max() <= 2.0**-149  # the smallest float
    assert not y[6].isfinite()
    assert (y[7], dx[7]) == (30, 1)
    assert max(y[8].abs(), dx[8].abs()) < 1e-30


@needs_kernels
def test_gelu_in_any_memory_format():
    dense = {"nchw": draw(3, 5, 7, 4), "nhwc": draw(3, 5, 7, 4, memory_format=LAST), "5d": draw(2, 3, 5, 7, 4)}
    loose = {"transposed": draw(3, 5, 7, 4).transpose(1, 2), "part": draw(3, 5, 7, 9)[..., :4], "2d": draw(5, 6).t()}
    for x in (dense | loose).values():
        leaf = x.requires_grad_()  # a copy would be dense
        y = functional.gelu(leaf)
        assert ("_Gelu" in type(y.grad_fn).__name__) == any(x is d for d in dense.values())
        for grad in (draw(*x.shape, seed=1), draw(*x.shape, seed=1).transpose(0, 1).contiguous().transpose(0, 1)):
            ours = [y, *torch.autograd.grad(y, leaf, grad, retain_graph=True)]
            truth = derived(lambda x: F.gelu(x, approximate="tanh"), x.detach(), grad=grad, double=True)
            for a, b in zip(ours, truth, strict=True):
                assert (a - b).abs().max() <= 64 * U
            assert ours[0].stride() == truth[0].stride()
    assert functional.gelu(torch.zeros(0, 3)).shape == (0, 3)


@FORMATS
@pytest.mark.parametrize("sides", [(6, 8), (7, 8), (5, 9), (1, 1)])
def test_mean_of_2x2(sides, memory_format):
    x = draw(2, 5, *sides, memory_format=memory_format)
    grad = draw(2, 5, *(-(-side // 2) for side in sides), seed=1)

    def plain(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, 2, ceil_mode=True)

    for a, b in zip(*(derived(f, x, grad=grad) for f in (functional.avg_pool2x2, plain)), strict=True):
        assert torch.equal(a, b)
        assert all(a.is_contiguous(memory_format=f) == b.is_contiguous(memory_format=f) for f in (FIRST, LAST))
    (leaf,) = leaves(x[:1, :2], double=True)
    assert gradcheck(functional.avg_pool2x2, leaf)
    assert gradgradcheck(functional.avg_pool2x2, leaf)
    assert saved_storages(lambda: plain(leaf))
    assert not saved_storages(lambda: functional.avg_pool2x2(leaf))


@FORMATS
def test_mean_of_a_map(memory_format):
    x = draw(3, 5, 7, 6, memory_format=memory_format) + 1
    mean, dx = derived(functional.spatial_mean, x, grad=draw(3, 5))
    assert (mean - x.double().mean((2, 3))).abs().max() <= 16 * U
    assert (dx - draw(3, 5)[..., None, None].double() / 42).abs().max() <= 4 * U
    assert dx.untyped_storage().nbytes() == 4 * 3 * 5
    assert gradgradcheck(functional.spatial_mean, leaves(x[:1], double=True))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mean_of_a_map_in_half_precision(dtype, memory_format):
    """To one rounding, even if the sum overflows float16. The gradient is a view there too."""
    assert functional.spatial_mean(torch.ones(1, 1, 256, 256, dtype=dtype)) == 1
    x = (draw(2, 3, 64, 70, memory_format=memory_format) + 30).to(dtype)
    mean, dx = derived(functional.spatial_mean, x, grad=draw(2, 3))
    unit = torch.finfo(dtype).eps
    assert mean.dtype == dx.dtype == dtype
    torch.testing.assert_close(mean.double(), x.double().mean((2, 3)), rtol=unit, atol=0)
    true = draw(2, 3).to(dtype).double()[..., None, None].expand(x.shape) / (64 * 70)
    torch.testing.assert_close(dx.double(), true, rtol=unit, atol=torch.finfo(dtype).smallest_normal * unit)
    assert dx.untyped_storage().nbytes() == 2 * 2 * 3
    large = torch.full((1, 16, 4, 4), 6e4, dtype=dtype)
    assert torch.equal(functional.avg_pool2x2(large), large[:, :, :2, :2])


@FORMATS
@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (2, 300, 9, 11), (1, 16, 1, 1), (2, 4, 0, 3)])
@pytest.mark.usefixtures("kernels_on_and_off")
def test_gated_sum(shape, memory_format):
    inputs = [draw(*shape, memory_format=memory_format, seed=1), draw(*shape, memory_format=memory_format)]
    inputs.append(draw(*shape[:2], 1, 1, seed=2))
    for grad in (draw(*shape, seed=3), draw(*shape, seed=3, memory_format=LAST), draw(1, seed=4).expand(shape)):
        truth = derived(torch.addcmul, *inputs, grad=grad, double=True)
        for ours, true in zip(derived(functional.gated_sum, *inputs, grad=grad), truth, strict=True):
            assert (ours.shape, ours.dtype) == (true.shape, torch.float32)
            assert not ours.numel() or (ours - true).abs().max() <= 16 * U * max(1, true.abs().max())


@needs_kernels
def test_gated_sum_uses_the_kernel_if_it_fits():
    x, gate = draw(2, 16, 5, 6, memory_format=LAST), draw(2, 16, 1, 1)
    (leaf,) = leaves(x)
    for other, fits in ((gate, True), (gate[:, :1], False), (gate[:1], False), (gate.expand(2, 16, 5, 6), False)):
        y = functional.gated_sum(x, leaf, other)
        assert ("_GatedSum" in type(y.grad_fn).__name__) == fits
        assert torch.equal(y, torch.addcmul(x, x, other))
    assert "Addcmul" in type(functional.gated_sum(x.contiguous(), leaf.contiguous(), gate).grad_fn).__name__
    inputs = leaves(x, x, gate, double=True)
    assert gradgradcheck(_GatedSum.apply, [t[:1, :2] for t in inputs])


# --- convolution ---


def plain_conv2d(x, weight, bias, *geometry, pads=None, before=None, recompute=True):
    x = before(x) if before else x
    return F.conv2d(F.pad(x, pads) if pads else x, weight, bias, *geometry)


def check_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *geometry, grad_format=LAST, units=3, **options
) -> Counter[str]:
    """Checks that values and gradients are as accurate as PyTorch's; returns which kernels were called.

    The transforms may add an error of 3 U of the true values, or of a sum of as many random numbers, where PyTorch has
    short sums. `units`: products that add n pixels in sequence may add U sqrt(n / 6).
    """
    inputs = [x, weight] + ([] if bias is None else [bias])

    def by(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias=None: conv(x, weight, bias, *geometry, **options)

    out = by(plain_conv2d)(*inputs)
    grad = draw(*out.shape, seed=100, memory_format=grad_format)
    with counted() as calls:
        ours = derived(by(functional.conv2d), *inputs, grad=grad)
    theirs = derived(by(plain_conv2d), *inputs, grad=grad)
    truths = derived(by(plain_conv2d), *inputs, grad=grad, double=True)
    for mine, yours, truth in zip(ours, theirs, truths, strict=True):
        assert (mine.shape, mine.dtype) == (truth.shape, torch.float32)
        size = rms(truth) if truth.ndim > 1 else rms(grad) * (grad.numel() / len(truth)) ** 0.5
        assert rms(mine - truth) <= 1.5 * rms(yours - truth) + units * U * size
    return calls


def activation(name: str | None) -> dict:
    return dict(before=Activation(name), recompute=Activation(name).keeps_input) if name else {}


ONE = (1, 1)
WINOGRAD = {"winograd forward": 1, "winograd input": 1, "winograd filters": 1}
PRODUCTS = {"conv1x1 forward": 1, "conv1x1 input": 1, "conv1x1 filters": 1}
CHANNELS = st.sampled_from([16, 32, 48, 80])  # 1, 2, 3 and 5 vectors of 16
SIDES = st.tuples(st.integers(1, 13), st.integers(1, 13))
BEFORE = st.sampled_from([None, "gelu", "relu", "silu"])


@needs_kernels
@settings(max_examples=120)
@given(
    groups=st.integers(1, 4),
    size=CHANNELS,
    out=CHANNELS,
    batch=st.integers(1, 3),
    sides=SIDES,
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([(1, 1), (1, 1), (0, 0), (2, 1)]),
    pads=st.sampled_from([None, None, (0, 1, 0, 1), (1, 2, 3, 0)]),
    biased=st.booleans(),
    before=BEFORE,
    grad_format=st.sampled_from([FIRST, LAST]),
    seed=st.integers(0, 99),
)
def test_winograd(groups, size, out, batch, sides, stride, padding, pads, biased, before, grad_format, seed):
    x = draw(batch, groups * size, *sides, seed=seed, memory_format=LAST)
    weight = draw(groups * out, size, 3, 3, seed=seed + 1, memory_format=LAST)
    bias = draw(groups * out, seed=seed + 2) if biased else None
    left, right, top, bottom = pads or (0, 0, 0, 0)
    assume(sides[0] + 2 * padding[0] + top + bottom >= 3)
    assume(sides[1] + 2 * padding[1] + left + right >= 3)
    geometry = ((stride, stride), padding, ONE)
    # zeros around small maps shorten PyTorch's sums, but not those of the transforms
    num_taps = (
        plain_conv2d(torch.ones(1, 1, *sides), torch.ones(1, 1, 3, 3), None, *geometry, 1, pads=pads).mean().item()
    )
    assume(num_taps)
    options = dict(grad_format=grad_format, units=3 * (9 / num_taps) ** 0.5, pads=pads, **activation(before))
    assert check_conv2d(x, weight, bias, *geometry, groups, **options) == WINOGRAD


@needs_kernels
@settings(max_examples=90)
@given(
    size=st.sampled_from([32, 48, 80, 304]),
    out=st.sampled_from([32, 48, 112, 448]),
    batch=st.integers(1, 7),
    sides=SIDES,
    biased=st.booleans(),
    before=BEFORE,
    grad_format=st.sampled_from([FIRST, LAST]),
    seed=st.integers(0, 99),
)
def test_1x1_convolutions(size, out, batch, sides, biased, before, grad_format, seed):
    x = draw(batch, size, *sides, seed=seed, memory_format=LAST)
    weight = draw(out, size, 1, 1, seed=seed + 1, memory_format=LAST)
    bias = draw(out, seed=seed + 2) if biased else None
    options = dict(
        grad_format=grad_format, units=(max(256, batch * sides[0] * sides[1]) / 6) ** 0.5, **activation(before)
    )
    assert check_conv2d(x, weight, bias, ONE, (0, 0), ONE, 1, **options) == PRODUCTS


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "out", "calls", "passes"),
    [
        (1, 48, PRODUCTS, []),
        (
            3,
            48,
            WINOGRAD,
            ["gelu", "gelu"],
        ),  # before the convolution and before the filter gradient; the input gradient applies the derivative
        (1, 40, {}, ["gelu", "gelu", "gelu_gradient"]),  # channels do not fill vectors
    ],
)
def test_gelu_within_convolutions(kernel, out, calls, passes, monkeypatch):
    """GELU and its derivative have no pass over the map of their own."""
    x, weight = draw(2, 32, 9, 7, memory_format=LAST), draw(out, 32, kernel, kernel, seed=1, memory_format=LAST)
    found, run = [], dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda name, *args: found.append(name) or run(name, *args))
    args, geometry = (x, weight, draw(out, seed=2)), (ONE, (kernel // 2, kernel // 2), ONE, 1)
    truth = plain_conv2d(*args, *geometry, **activation("gelu"))
    found.clear()
    ours = derived(lambda *args: functional.conv2d(*args, *geometry, before=Activation("gelu")), *args, grad=truth)
    assert [name for name in found if "gelu" in name] == passes
    assert rms(ours[0] - truth) <= 8 * U * rms(truth)
    assert check_conv2d(*args, *geometry, grad_format=LAST, **activation("gelu")) == calls


@needs_kernels
def test_gelu_with_hooks_is_called_as_a_module():
    act, outputs = Activation("gelu"), []
    x, weight = draw(2, 32, 9, 7, memory_format=LAST), draw(48, 32, 1, 1, seed=1, memory_format=LAST)
    expected = functional.conv2d(x, weight, before=act)
    act.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    found = functional.conv2d(x, weight, before=act)
    assert len(outputs) == 1
    assert torch.equal(outputs[0], functional.gelu(x))
    assert rms(found - expected) <= U * rms(expected)


@needs_kernels
@settings(max_examples=60)
@given(
    groups=st.integers(1, 4),
    size=st.sampled_from([3, 8, 16]),
    out=st.sampled_from([3, 8, 16]),
    sides=SIDES,
    biased=st.booleans(),
    before=BEFORE,
    kernel=st.sampled_from([1, 3, 3, 3]),
    stride=st.sampled_from([1, 2, 3]),
    padding=st.sampled_from([(0, 0), (1, 1), (1, 1), (2, 1)]),
    pads=st.sampled_from([None, None, (0, 1, 0, 1), (2, 1, 0, 2)]),
    dilation=st.sampled_from([1, 1, 2]),
    formats=st.lists(st.sampled_from([LAST, LAST, FIRST]), min_size=3, max_size=3),
)
def test_other_convolutions_are_pytorchs(
    groups, size, out, sides, biased, before, kernel, stride, padding, pads, dilation, formats
):
    """All but 3x3 ones of stride 1 or 2, in multiples of 16 channels, channels-last."""
    x = draw(2, groups * size, sides[0] + 4, sides[1] + 4, memory_format=formats[0])
    weight = draw(groups * out, size, kernel, kernel, seed=1, memory_format=formats[1])
    geometry = ((stride, stride), padding, (dilation, dilation))
    options = dict(pads=pads, grad_format=formats[2], **activation(before))
    calls = check_conv2d(x, weight, draw(groups * out) if biased else None, *geometry, groups, **options)
    last = formats[0] == formats[1] == LAST
    fits = (kernel, dilation, size, out, last) == (3, 1, 16, 16, True) and stride < 3
    assert calls == (WINOGRAD if fits else {})


def layer(*sides: int, groups: int = 2, size: int = 16, out: int = 32) -> list[Tensor]:
    """Input, weight and bias of a convolution that Winograd's kernels take."""
    x = draw(2, groups * size, *(sides or (7, 6)), memory_format=LAST)
    return [x, draw(groups * out, size, 3, 3, seed=1, memory_format=LAST), draw(groups * out, seed=2)]


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: str | None = "gelu") -> Tensor:
    """The convolution of `layer`."""
    return functional.conv2d(x, weight, bias, ONE, ONE, groups=x.shape[-3] // weight.shape[1], **activation(before))


def same(*results: list[Tensor]) -> bool:
    """Whether all are equal bit for bit."""
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_compilers_transforms_and_dispatch_modes_see_pytorchs_operations(monkeypatch):
    """test_graphs.py compiles whole networks, which takes seconds to start."""
    x, weight, bias = layer()
    with counted() as calls:
        conv(x, weight)
        assert calls.pop("winograd forward") == 1
        (leaf,) = leaves(x)
        with FlopCounterMode(display=False) as counter:
            conv(leaf, weight, bias).sum().backward()
        assert counter.get_total_flops() == 2 * 2 * (2 * 7 * 6 * 64 * 16 * 9)  # forward, and of the input
        functional.conv2d(x.double(), weight.double(), None, ONE, ONE, groups=2)
        loop = torch.stack([torch.func.grad(lambda w, x: conv(x[None], w).sum())(weight, x) for x in x])
        batch = torch.func.vmap(torch.func.grad(lambda w, x: conv(x[None], w).sum()), (None, 0))(weight, x)
        assert torch.allclose(batch, loop, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        gate = draw(2, 32, 1, 1)
        for function in (
            functional.gelu,
            functional.avg_pool2x2,
            lambda x: conv(x, weight),
            lambda x: functional.gated_sum(x, x, gate),
        ):
            assert not type(function(leaf).grad_fn).__name__.startswith("_")  # of normfree
        assert not calls


@pytest.mark.usefixtures("kernels_on_and_off")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # PyTorch's own use
def test_gradients_of_batches_forward_mode_and_traces():
    """Ways to differentiate that do not call the backward pass of an autograd.Function."""
    x, weight, bias = leaves(*layer())
    gain, grads = torch.ones(64), draw(3, 2, 64, 7, 6)

    def whole(x: Tensor, weight: Tensor = weight) -> Tensor:
        return functional.gelu(conv(x, functional.standardize(weight, gain), bias))

    batched = torch.autograd.grad(whole(x), (x, weight, bias), grads, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for all_of_them, one in zip(batched, torch.autograd.grad(whole(x), (x, weight, bias), grad), strict=True):
            assert (all_of_them[i] - one).abs().max() <= 64 * U * one.abs().max()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, draw(*x.shape))
        tangent = forward_ad.unpack_dual(whole(functional.avg_pool2x2(dual))).tangent
    _, expected = torch.func.jvp(lambda x: whole(functional.avg_pool2x2(x)), (x,), (draw(*x.shape),))
    assert (tangent - expected).abs().max() <= 64 * U * expected.abs().max()


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_trace_is_of_operations():
    """A trace that had called kernels would hold their outputs as constants."""
    x, weight, bias = layer()

    def whole(x: Tensor) -> Tensor:
        return functional.gelu(conv(x, functional.standardize(weight, torch.ones(64)), bias))

    traced = torch.jit.trace(whole, torch.zeros_like(x), check_trace=False)
    assert (traced(x) - whole(x)).abs().max() <= 64 * U * whole(x).abs().max()


@needs_kernels
def test_what_pytorch_refuses_is_refused():
    x, weight, bias = layer()
    wrong = [
        (x[:, :16].contiguous(memory_format=LAST), weight, bias, 2),
        (x, weight, bias, 1),
        (x, weight[:33].contiguous(memory_format=LAST), None, 2),
        (x, weight, bias[:5], 2),
        (x, weight, bias.double(), 2),
    ]
    for x, weight, bias, groups in wrong:
        with pytest.raises(RuntimeError):
            functional.conv2d(x, weight, bias, ONE, ONE, ONE, groups)
    with pytest.raises(RuntimeError):
        functional.standardize(weight, torch.ones(3))


@needs_kernels
def test_strided_vectors_single_images_and_defaults():
    """Inputs that do not fit the kernels, and buffers that must not take PyTorch's default dtype and device."""
    x, weight, _ = layer()
    strided = draw(64, 2)[:, 0]
    expected = plain_conv2d(x, weight, strided, ONE, ONE, ONE, 2)
    assert torch.allclose(conv(x, weight, strided, None), expected, atol=1e-4)
    assert torch.equal(functional.standardize(weight, strided), _standardize(weight, strided, 1, 1, 1e-4, 0))
    assert torch.allclose(derived(conv, x[0], weight, grad=expected[0])[0], conv(x, weight)[0], atol=1e-4)
    usual = [conv(x, weight), *derived(functional.standardize, weight, strided.clone(), grad=weight)]
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = [conv(x, weight), functional.standardize(weight, strided.clone()), functional.gelu(x)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(again, [*usual[:2], functional.gelu(x)])
    assert conv(x.to("meta"), weight.to("meta")).shape == expected.shape


@pytest.mark.usefixtures("kernels_on_and_off")
def test_results_may_be_changed_in_place():
    """They are no views, and are not saved for the backward pass."""
    x, weight, _ = layer()
    functions = [
        functional.gelu,
        functional.avg_pool2x2,
        lambda x: functional.gated_sum(x, x, draw(2, 32, 1, 1)),
        lambda x: functional.standardize(x, torch.ones(2)),
        lambda x: conv(x, weight),
    ]
    for function in functions:
        (a,), (b,) = leaves(x), leaves(x)
        function(a).mul_(2).sum().backward()
        (function(b) * 2).sum().backward()
        assert torch.equal(a.grad, b.grad)


@needs_kernels
def test_not_a_number_stays_in_its_image_and_group():
    x, weight, bias = layer(9, 9)
    clean = conv(x, weight, bias)
    x[1, 3, 4, 4] = torch.nan
    marked = conv(x, weight, bias)
    assert same([marked[0], marked[1, 32:]], [clean[0], clean[1, 32:]])
    assert marked[1, :32, 3:6, 3:6].isnan().all()
    assert torch.equal(marked[1, :32, :2], clean[1, :32, :2])  # further than one tile away
    assert torch.equal(marked[1, :32, 6:], clean[1, :32, 6:])


@pytest.mark.usefixtures("kernels_on_and_off")
@FORMATS
@pytest.mark.parametrize("before", [None, "gelu", "relu"])
def test_autocast(before, memory_format):
    """As in PyTorch: bfloat16 inside, float64 unchanged. The tensor before the cast is saved, not the cast one."""
    x, weight, bias = (t.contiguous(memory_format=memory_format) if t.ndim == 4 else t for t in layer())
    grad = draw(2, 64, 7, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        results = [
            derived(lambda *inputs, f=f: f(*inputs, ONE, ONE, ONE, 2, **activation(before)), x, weight, bias, grad=grad)
            for f in (functional.conv2d, plain_conv2d)
        ]
        assert conv(x.double(), weight.double()).dtype == torch.float64
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert rms(ours - theirs) <= 2**-9 * rms(theirs)  # one rounding of bfloat16


@needs_kernels
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_that_are_not_needed_are_not_computed(needed):
    inputs, grad = layer(), draw(2, 64, 7, 6)
    everything = derived(conv, *inputs, grad=grad)[1:]
    some = [leaf.requires_grad_(i in needed) for i, leaf in enumerate(leaves(*inputs))]
    with counted() as calls:
        found = torch.autograd.grad(conv(*some), [some[i] for i in needed], grad)
    for i, one in zip(needed, found, strict=True):
        by_itself = i == 2 and 1 not in needed  # else the bias gradient comes with that of the filters
        assert rms(one - everything[i]) <= (4 * U * rms(everything[i]) if by_itself else 0)
    assert calls == Counter({"winograd forward": 1, "winograd input": 0 in needed, "winograd filters": 1 in needed})


@needs_kernels
def test_passing_back_twice_gives_the_same():
    inputs = leaves(*layer())
    out, grad = conv(*inputs), draw(2, 64, 7, 6)
    first, then = (torch.autograd.grad(out, inputs, grad, retain_graph=True) for _ in range(2))
    assert same(first, then)


@pytest.mark.parametrize("before", [None, "gelu", "relu", "silu"])
@pytest.mark.parametrize("pads", [None, (0, 1, 2, 1)])
def test_convolutions_can_be_differentiated_twice(before, pads):
    inputs = leaves(draw(2, 4, 3, 4), draw(4, 2, 3, 3, seed=1), draw(4, seed=2), double=True)
    options = dict(groups=2, pads=pads, **activation(before))

    def function(*inputs: Tensor) -> Tensor:
        return functional.conv2d(*inputs, ONE, ONE, **options)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.usefixtures("kernels_on_and_off")
@pytest.mark.parametrize("pads", [None, (0, 1, 2, 1)])
@pytest.mark.parametrize("before", [None, "gelu", "relu", "silu"])
def test_what_is_saved_for_the_backward_pass(before, pads):
    """One map without padding: the input if the activation's gradient needs it, else the activation's output."""
    x, weight, bias = leaves(*layer())
    options = dict(groups=2, pads=pads, **activation(before))
    saved = saved_storages(lambda: functional.conv2d(x, weight, bias, ONE, ONE, **options))
    assert saved.pop(weight.data_ptr()) == weight.nbytes
    assert list(saved.values()) == [x.nbytes]
    assert (saved.keys() == {x.data_ptr()}) == (before != "relu")


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    """For sizes that are split among threads: sums over tiles have a fixed number of parts."""
    x, weight, bias = layer(41, 40)
    wide, gain, weight1 = draw(40, 48, 3, 3), draw(40), draw(112, 32, 1, 1, memory_format=LAST)

    def everything(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        return [
            *derived(conv, x, weight, bias, grad=draw(2, 64, 41, 40, seed=3)),
            *derived(functional.conv2d, x, weight1, grad=draw(2, 112, 41, 40, seed=6)),
            *derived(functional.standardize, wide, gain, grad=draw(40, 48, 3, 3, seed=4)),
            *derived(functional.gelu, x, grad=draw(*x.shape, seed=5)),
            *derived(functional.gated_sum, x, x, draw(2, 32, 1, 1), grad=draw(*x.shape, seed=5)),
        ]

    before = torch.get_num_threads()
    try:
        assert same(*(everything(threads) for threads in (1, 2, 3, 1)))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_a_network_with_and_without_kernels(monkeypatch, fresh_kernels):
    """The loss and every gradient of nfnet_nano are as accurate as without kernels."""
    torch.manual_seed(0)
    model = create_model("nfnet_nano", num_classes=5, stochastic_depth=0.0, drop_rate=0.0).to(memory_format=LAST)
    for name, p in model.named_parameters():
        if name.endswith("skip_gain"):
            torch.nn.init.constant_(p, 0.7)
    x, labels = draw(2, 3, 40, 48, memory_format=LAST), torch.tensor([1, 3])

    def run() -> list[Tensor]:
        network = model.to(x.dtype)
        loss = F.cross_entropy(network(x), labels)
        return [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]

    with counted() as calls:
        ours = run()
        used = calls.total()
        assert used > 0
        monkeypatch.setenv("NORMFREE_NATIVE", "0")
        fresh_kernels()
        assert library() is None
        theirs = run()
        assert calls.total() == used
        x = x.double()
        truths = run()
    sizes = {truth.ndim: max(rms(t) for t in truths if t.ndim == truth.ndim) for truth in truths}
    for mine, yours, truth in zip(ours, theirs, truths, strict=True):
        assert rms(mine - truth) <= 3 * rms(yours - truth) + 16 * U * sizes[truth.ndim]


PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <vector>

#include "kernels.h"

struct Floats {  // exactly n numbers; the allocator fills uninitialised memory with NaN
    float *at;
    int64_t n;
    explicit Floats(int64_t n) : at(new float[n]), n(n) {}
    ~Floats() { delete[] at; }
    operator float *() { return at; }
    Floats &drawn() {
        for (int64_t i = 0; i < n; ++i) at[i] = std::sin(static_cast<float>(i));
        return *this;
    }
};
static int faults = 0;
static void written(Floats &x) {
    for (int64_t i = 0; i < x.n; ++i) faults += !std::isfinite(x.at[i]);
}

int main() {
    Floats fresh(3000);
    if (!std::isnan(fresh[0]) || !std::isnan(fresh[2999])) return 2;
    for (int32_t threads : {1, 2}) for (int32_t apply_gelu : {0, 1}) {
        for (int64_t n : {1, 15, 16, 33, 4097, 20000}) {
            Floats x(n), dy(n), y(n), dx(n);
            normfree_gelu(x.drawn(), y, n, threads);
            normfree_gelu_gradient(x, dy.drawn(), dx, n, threads);
            written(y), written(dx);
            Floats gain(3), w(3 * n), out(3 * n), mean(3), r(3), slope(3), d(3 * n), dw(3 * n), dgain(3);
            normfree_standardize(w.drawn(), gain.drawn(), 1, 1, 1e-4f, 0, 3, n, out, mean, r, slope, threads);
            normfree_standardize_gradient(w, gain, 1, mean, r, slope, d.drawn(), 3, n, dw, dgain, threads);
            written(out), written(dw), written(dgain);
        }
        for (int64_t pixels : {1, 130}) for (int64_t channels : {1, 256, 300}) {
            Floats dy(2 * pixels * channels), x(2 * pixels * channels), dx(2 * pixels * channels);
            Floats gate(2 * channels), dgate(2 * channels);
            normfree_gate_gradient(dy.drawn(), x.drawn(), gate.drawn(), dx, dgate, 2, pixels, channels, threads);
            written(dx), written(dgate);
        }
        for (int64_t pixels : {1, 130, 701}) for (int64_t in : {16, 304}) for (int64_t out : {32, 448}) {
            Floats x(pixels * in), dy(pixels * out), w(out * in), dw(out * in), bias(out), y(dy.n), dx(x.n);
            const float *pre_activation = apply_gelu ? x.drawn().at : nullptr;
            normfree_conv1x1(x.drawn(), w.drawn(), bias.drawn(), nullptr, y, pixels, in, out, apply_gelu, 0, threads);
            normfree_conv1x1(dy.drawn(), w, nullptr, pre_activation, dx, pixels, out, in, 0, 1, threads);
            for (float *biases : {bias.at, static_cast<float *>(nullptr)})
                normfree_conv1x1_filter_gradient(x, dy, dw, biases, pixels, in, out, apply_gelu, threads);
            written(y), written(dx), written(dw), written(bias);
        }
        for (int64_t groups : {1, 3}) for (int64_t in : {16, 48}) for (int64_t out : {16, 80})
        for (int64_t apart : {1, 2})
        for (auto s : std::vector<std::vector<int64_t>>{{1, 1, 1, 1}, {2, 9, 7, 0}, {3, 1, 24, 2}, {3, 24, 13, 1}}) {
            const int64_t n = s[0], h = s[1], w = s[2], pad = s[3];
            const int64_t oh = (h + 2 * pad - 3) / apart + 1, ow = (w + 2 * pad - 3) / apart + 1;
            Floats x(n * h * w * groups * in), dx(x.n), filters(groups * out * in * 9), dw(filters.n);
            Floats bias(groups * out), dbias(groups * out), y(n * oh * ow * groups * out);
            const float *pre_activation = apply_gelu ? x.drawn().at : nullptr;
            normfree_winograd(x.drawn(), filters.drawn(), bias.drawn(), nullptr, y, n, h, w, oh, ow, groups, in, out,
                              apart, pad, pad, 0, threads);
            normfree_winograd(dx, filters, nullptr, pre_activation, y, n, h, w, oh, ow, groups, in, out, apart, pad,
                              pad, 1, threads);
            for (float *biases : {dbias.at, static_cast<float *>(nullptr)})
                normfree_winograd_filter_gradient(x, y, dw, biases, n, h, w, oh, ow, groups, in, out, apart, pad, pad,
                                                  threads);
            written(y), written(dx), written(dw), written(dbias);
        }
    }
    return faults ? 1 : 0;
}
"""


@needs_kernels
def test_kernels_stay_within_their_memory_and_read_nothing_unset(tmp_path, compiler):
    """In a program under the address sanitizer, where uninitialised memory is NaN."""
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    folder = Path(normfree.native.__file__).parent
    sources = [folder / name for name in ("pointwise.cpp", "winograd.cpp", "conv1x1.cpp")]
    flags = [f"-I{folder}", "-O1", "-std=c++17", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    built = subprocess.run([*compiler, *flags, source, *sources, "-o", program], capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    options = "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    ran = subprocess.run([program], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": options})
    assert ran.returncode == 0, ran.stderr[-2000:]


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors without AVX are x86's")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(processor, monkeypatch, fresh_kernels):
    """4 and 8 lanes, if the machine has them: equal up to rounding, on some machines in every bit."""
    if processor == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("a processor without AVX2")
    inputs = layer(9, 7, size=80, out=48)

    def everything() -> list[Tensor]:
        return [
            *derived(conv, *inputs, grad=draw(2, 96, 9, 7, seed=3)),
            *derived(functional.conv2d, inputs[0], draw(50, 160, 1, 1), grad=draw(2, 50, 9, 7, seed=6)),
            *derived(functional.standardize, *inputs[1:], grad=draw(96, 80, 3, 3, seed=5)),
            *derived(functional.gelu, inputs[0], grad=draw(2, 160, 9, 7, seed=4)),
        ]

    expected = everything()
    monkeypatch.setenv("NORMFREE_MARCH", processor)
    fresh_kernels()
    assert library() is not None
    with counted() as calls:
        found = everything()
    assert calls.total() > 0
    for a, b in zip(found, expected, strict=True):
        assert rms(a - b) <= 16 * U * rms(b)
