"""Weight-standardized convolutions against float64 references: geometry, precision, shared weights, resetting."""

import copy
import inspect
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from torch import Tensor, nn

from normfree import functional
from normfree.errors import InputError
from normfree.functional.standardize import _standardize
from normfree.layers import (
    REUSED,
    Activation,
    BranchEndConv1d,
    BranchEndConv2d,
    BranchEndConv3d,
    Conv2d,
    SkipInit,
    WSConv,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose1d,
    WSConvTranspose2d,
    WSConvTranspose3d,
    reuse_weights,
)
from normfree.models import create_model

PLAIN = {
    WSConv1d: nn.Conv1d,
    WSConv2d: nn.Conv2d,
    WSConv3d: nn.Conv3d,
    WSConvTranspose1d: nn.ConvTranspose1d,
    WSConvTranspose2d: nn.ConvTranspose2d,
    WSConvTranspose3d: nn.ConvTranspose3d,
}
TRANSPOSED = {WSConvTranspose1d: 1, WSConvTranspose2d: 2, WSConvTranspose3d: 3}


def draw(layer: WSConv) -> WSConv:
    """The same layer with random weights, gains and biases."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + 0.3)
    return layer


def reference_filter(weight: Tensor, gain: Tensor, floor_or_eps: tuple[str, float], fan_in: float) -> Tensor:
    """Paper eq. 1 for the filter of one output channel."""
    values = weight.double().flatten().tolist()
    mean = math.fsum(values) / len(values)
    var = math.fsum((v - mean) ** 2 for v in values) / len(values)
    kind, number = floor_or_eps
    scale = max(var * fan_in, number) if kind == "floor" else (var + number) * fan_in
    return (weight.double() - mean) / math.sqrt(scale) * gain.double()


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_output_is_that_of_the_plain_layer_with_the_reference_weight(cls, groups, eps):
    torch.manual_seed(0)
    options = dict(stride=2, padding=1, groups=groups)
    if cls in TRANSPOSED:
        options |= dict(output_padding=1, dilation=2)
    layer = draw(cls(4, 6, 3, **options, input_scale=1.7, eps=eps)).double()
    plain = PLAIN[cls](4, 6, 3, **options).double()
    scaling = ("floor", 1e-4) if eps is None else ("eps", eps)
    fan_in = 4 // groups * math.prod(layer.kernel_size) / (math.prod(layer.stride) if cls in TRANSPOSED else 1)
    with torch.no_grad():
        plain.bias.copy_(layer.bias)
        for out in range(6):
            group, place = divmod(out, 6 // groups)
            inputs = slice(group * 4 // groups, (group + 1) * 4 // groups)
            index = (inputs, place) if cls in TRANSPOSED else out  # (in, out / groups, ...) or (out, ...)
            plain.weight[index] = reference_filter(layer.weight[index], layer.gain[out], scaling, fan_in) * 1.7
    assert layer.standardized_weight().shape == layer.weight.shape
    x = torch.randn(2, 4, *[7] * (layer.weight.ndim - 2), dtype=torch.float64)
    expected = plain(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x, output_scale=0.3), 0.3 * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_the_floor_holds_for_constant_filters(cls):
    layer = cls(4, 6, 3)
    nn.init.constant_(layer.weight, 0.7)
    rounding = 0.7 * torch.finfo(torch.float32).eps / 1e-2  # of the mean, over the floor
    assert layer.standardized_weight().abs().max() <= 2 * rounding


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(4, 2, 1), (3, 2, 1), (2, 2, 2), (3, 1, 4), (2, 3, 1)])
@pytest.mark.parametrize("cls", TRANSPOSED, ids=lambda cls: cls.__name__)
def test_transposed_layers_keep_unit_variance_on_average_over_places(cls, kernel, stride, groups):
    torch.manual_seed(0)
    dims = TRANSPOSED[cls]
    layer = cls(48, 48, kernel, stride, groups=groups)
    side = {1: 60, 2: 12, 3: 6}[dims]
    x = torch.randn(160 // dims**2, 48, *[side] * dims)
    with torch.no_grad():
        out = layer(x)
    # whole periods of the strides, away from the borders, so that every phase is there as often as any other
    inside = [slice(stride * 2, stride * (side - 2))] * dims
    assert out[(slice(None), slice(None), *inside)].square().mean().item() == pytest.approx(1, rel=0.05)


def test_variance_differs_from_place_to_place_unless_the_kernel_is_a_multiple_of_the_stride():
    """3 taps at stride 2: places see 1 or 2 of them in turn; 4 taps: always 2."""
    torch.manual_seed(0)
    x = torch.randn(400, 64, 16)
    with torch.no_grad():
        uneven = WSConvTranspose1d(64, 64, 3, 2)(x)[..., 4:-4].var((0, 1))
        even = WSConvTranspose1d(64, 64, 4, 2)(x)[..., 4:-4].var((0, 1))
    assert uneven.max() / uneven.min() > 1.7
    assert even.max() / even.min() < 1.2


@pytest.mark.parametrize("cls", [WSConv1d, WSConv3d], ids=lambda cls: cls.__name__)
def test_unit_variance_and_no_mean_shift(cls):
    torch.manual_seed(0)
    dims = 1 if cls is WSConv1d else 3
    layer = cls(64, 64, 3)
    x = torch.relu(torch.randn(32, 64, *[{1: 200, 3: 6}[dims]] * dims)) * math.sqrt(2 / (1 - 1 / math.pi))
    with torch.no_grad():
        out = layer(x)
    every = [0, *range(2, out.ndim)]
    assert out.var(every).mean().item() == pytest.approx(1, rel=0.05)
    assert out.mean(every).abs().max() < 0.1  # the mean of x is 0.68


@pytest.mark.parametrize("cls", TRANSPOSED, ids=lambda cls: cls.__name__)
def test_output_size(cls):
    dims = TRANSPOSED[cls]
    layer = cls(2, 2, 3, stride=2, padding=1)
    x = torch.randn(1, 2, *[5] * dims)
    assert layer(x).shape[2:] == (9,) * dims
    assert layer(x, output_size=[10] * dims).shape[2:] == (10,) * dims
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[12] * dims)


@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_scale_of_the_weights_does_not_matter_and_every_parameter_has_a_gradient(cls):
    torch.manual_seed(0)
    layer = draw(cls(4, 4, 3, groups=2))
    x = torch.randn(2, 4, *[5] * (layer.weight.ndim - 2))
    out = layer(x)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in layer.parameters())
    # the gradient of a scale-invariant function is orthogonal to the weight, unit by unit: here, as a whole
    assert (layer.weight.grad * layer.weight).sum().abs() < 1e-3 * layer.weight.grad.norm() * layer.weight.norm()
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.5)
        torch.testing.assert_close(layer(x), out, rtol=1e-4, atol=1e-4)


def test_pytorch_arguments():
    for cls, (device, dtype) in itertools.product(PLAIN, [("cpu", torch.float64), ("meta", torch.float32)]):
        layer = cls(4, 4, 3, bias=False, device=device, dtype=dtype)
        assert layer.bias is None
        assert layer.gain.device.type == device
        assert layer.gain.dtype == layer.weight.dtype == dtype
    x = torch.randn(1, 2, 6)
    circular = WSConv1d(2, 2, 3, padding=1, padding_mode="circular")
    torch.testing.assert_close(circular(x).roll(2, -1), circular(x.roll(2, -1)))


GEOMETRIES = [
    dict(dilation=2),
    dict(stride=(2, 1)),
    dict(stride=(1, 2), dilation=(2, 1)),
    dict(stride=3, dilation=2, groups=2),
    dict(kernel_size=(1, 3)),
    dict(kernel_size=(5, 2), stride=(2, 3), dilation=(1, 2)),
    dict(kernel_size=(3, 1), stride=(1, 2), groups=4),
    dict(kernel_size=1, stride=(2, 1)),
    dict(kernel_size=1, dilation=3),
]


def reference_pads(side: int, kernel: int, stride: int, dilation: int, padding: str | int) -> tuple[int, int]:
    extent = (kernel - 1) * dilation + 1
    if padding == "same":
        total = max((math.ceil(side / stride) - 1) * stride + extent - side, 0)
        return total // 2, total - total // 2
    if padding == "symmetric":
        return ((stride - 1 + extent - 1) // 2,) * 2
    return (0 if padding == "valid" else int(padding),) * 2


@pytest.mark.parametrize("padding", [0, (1, 2), "valid", "same", "symmetric"], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry_is_that_of_the_plain_convolution(geometry, padding):
    """Values and gradients, odd and even sides, with an activation before it, in float32 by the kernels that fit."""
    torch.manual_seed(0)
    geometry = {"kernel_size": 3, **geometry}
    layer = draw(WSConv2d(16, 32, padding=padding, input_scale=1.7, **geometry)).to(memory_format=torch.channels_last)
    act = Activation("gelu")
    for height, width in ((12, 13), (11, 16)):
        x = torch.randn(2, 16, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
        sizes = list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
        sides = padding if isinstance(padding, tuple) else (padding, padding)
        (top, bottom), (left, right) = (
            reference_pads(side, *size, each) for side, size, each in zip((height, width), sizes, sides, strict=True)
        )
        padded = nn.functional.pad(act(x.double()), (left, right, top, bottom))
        weight, bias = layer.standardized_weight().double(), layer.bias.double()
        expected = nn.functional.conv2d(padded, weight, bias, layer.stride, 0, layer.dilation, layer.groups)
        ours = layer(x, before=act)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        parameters = [x, *layer.parameters()]
        grads, theirs = (torch.autograd.grad(out.square().sum(), parameters) for out in (ours, expected))
        for grad, their in zip(grads, theirs, strict=True):
            assert (grad - their).norm() <= 1e-5 * their.norm() + 1e-5
        torch.testing.assert_close(layer(x[0]), layer(x[:1])[0], rtol=1e-5, atol=1e-5)  # one image without a batch


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_padding_modes(mode, padding):
    torch.manual_seed(0)
    layer = draw(WSConv2d(4, 6, 3, (2, 1), padding, padding_mode=mode)).double()
    x = torch.randn(1, 4, 8, 9, dtype=torch.float64)
    pads = (2, 2, 1, 1) if padding == (1, 2) else (1, 1, 0, 1)
    padded = nn.functional.pad(torch.relu(x), pads, mode)
    expected = nn.functional.conv2d(padded, layer.standardized_weight(), layer.bias, (2, 1))
    torch.testing.assert_close(layer(x, before=Activation("relu")), expected)


def test_arguments_are_in_pytorchs_order():
    for cls, dims in ((WSConv1d, 1), (WSConv2d, 2), (WSConv3d, 3)):
        layer = cls(8, 16, 3, 2, 1, 2, 4, False, "replicate")
        plain = PLAIN[cls](8, 16, 3, 2, 1, 2, 4, False, "replicate")
        for name in ("stride", "padding", "dilation", "groups", "bias", "padding_mode"):
            assert getattr(layer, name) == getattr(plain, name), name
        x = torch.randn(1, 8, *[9] * dims)
        assert layer(x).shape == plain(x).shape
        assert cls(8, 16, 3)(x).shape == PLAIN[cls](8, 16, 3)(x).shape
        with pytest.raises(TypeError):
            cls(8, 16, 3, 1, 0, 1, 1, True, "zeros", "cpu", None, 1.7)  # input_scale goes by name
    ours, theirs = (inspect.signature(cls).parameters.values() for cls in (WSConv2d, nn.Conv2d))
    assert [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY] == [(p.name, p.default) for p in theirs]


def plain(conv: WSConv2d, cls: type[nn.Conv2d]) -> nn.Conv2d:
    """A plain convolution with the standardized weight and the bias."""
    strided_same = conv.padding == "same" and max(conv.stride) > 1
    padding = conv.padding
    if strided_same and max(conv.kernel_size) == 1:
        padding = 0
    elif strided_same:
        cls = Conv2d  # PyTorch's own has no such padding
    arguments = (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
    )
    new = cls(*arguments, dtype=conv.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(conv.standardized_weight())
        new.bias.copy_(conv.bias)
    return new


@pytest.mark.parametrize("cls", [nn.Conv2d, Conv2d], ids=["PyTorch's", "ours"])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("nfnet_nano", {}),
        ("nfnet_micro", dict(depth=(1, 1, 2, 1))),
        ("nfnet_l0", dict(depth=(1, 1, 1, 1))),  # symmetric padding, no SkipInit gain
        ("nf_resnet26", dict(skip_init=0.7)),  # scales the output of the last convolution
        ("nf_regnet_b0", dict(depth=(1, 1, 1, 1), skip_init=0.7)),
    ],
)
def test_plain_convolutions_stand_in_the_place_of_standardized_ones(name, overrides, cls):
    """The same outputs and, in float64, the same gradients of images and of standardized weights."""
    torch.manual_seed(0)
    model = create_model(name, 5, **overrides).eval()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        ours, theirs = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype)
        convs = {name: module for name, module in theirs.named_modules() if isinstance(module, WSConv2d)}
        for name, conv in convs.items():
            theirs.set_submodule(name, plain(conv, cls))
        assert not any(isinstance(module, WSConv2d) for module in theirs.modules())
        for sides in ((64, 64), (65, 70)):
            x = torch.randn(2, 3, *sides, dtype=dtype).requires_grad_()
            theirs.zero_grad()
            with reuse_weights(ours):
                standardized = {name: REUSED.get()[ours.get_submodule(name)] for name in convs}
                out, other = ours(x), theirs(x)
                assert (out - other).norm() <= tolerance * out.norm()
                if dtype == torch.float32:  # rounding moves activations across ReLU's kink, where gradients jump
                    continue
                (grad,), (other,) = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (out, other))
                assert (grad - other).norm() <= 10 * tolerance * grad.norm()
                out.square().sum().backward()
                grads = {name: weight.grad for name, weight in standardized.items()}
            theirs(x).square().sum().backward()
            for name, grad in grads.items():
                assert (theirs.get_submodule(name).weight.grad - grad).norm() <= 10 * tolerance * grad.norm(), name


def test_unknown_paddings():
    for cls in (WSConv2d, Conv2d):
        with pytest.raises(InputError, match="'full'"):
            cls(2, 2, 3, padding="full")
    with pytest.raises(ValueError, match="strided"):
        WSConv1d(2, 2, 3, 2, padding="same")
    assert "padding=same" in repr(WSConv2d(2, 2, 3, 2, padding="same"))


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALVES
@pytest.mark.parametrize("options", [(1.0, 1e-4, 0.0), (0.25, 1e-4, 0.0), (1.0, 0.0, 1e-2)], ids=str)
@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (300.0, 0.0), (2e-3, 0.0), (0.01, 0.3), (1e-4, 0.0)])
def test_half_precision_standardizes_as_float64_does(dtype, options, size, offset):
    """To one rounding of the result, for gradients too, one by one and all together, for any size of the weights."""
    torch.manual_seed(0)
    weight = (torch.randn(8, 48, 3, 3) * size + offset).to(dtype).requires_grad_()
    gain = torch.rand(8).add(0.5).to(dtype).requires_grad_()
    grad, options = torch.randn(8, 48, 3, 3).to(dtype), (1.7, *options)
    wide = [t.detach().double().requires_grad_() for t in (weight, gain)]
    expected = _standardize(*wide, *options)
    true = torch.autograd.grad(expected, wide, grad.double())
    unit = torch.finfo(dtype).eps
    (together,) = functional.standardize_all([weight], [gain], [options])
    for out, slack in ((functional.standardize(weight, gain, *options), 1), (together, 3)):
        assert out.dtype == dtype
        tiny = slack * torch.finfo(dtype).smallest_normal * unit  # a float16 that is subnormal
        torch.testing.assert_close(out.double(), expected, rtol=slack * unit, atol=tiny)
        for ours, theirs in zip(torch.autograd.grad(out, (weight, gain), grad), true, strict=True):
            if theirs.abs().max() < torch.finfo(dtype).max:
                assert ours.dtype == dtype
                assert (ours.double() - theirs).abs().max() <= 4 * unit * theirs.abs().max() + tiny


RESET = [*PLAIN, BranchEndConv1d, BranchEndConv2d, BranchEndConv3d]


@pytest.mark.parametrize("cls", RESET, ids=lambda cls: cls.__name__)
def test_reset_parameters_overwrites_uninitialised_memory(cls):
    torch.manual_seed(0)
    layer = torch.nn.utils.skip_init(cls, 32, 48, 3, groups=2)
    assert layer.weight.device.type == "cpu"
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(math.nan)
    layer.reset_parameters()
    assert layer.weight.std().item() == pytest.approx(layer.fan_in**-0.5, rel=0.05)
    assert (layer.bias == 0).all()
    rest = [t for name, t in layer.state_dict().items() if name not in ("weight", "bias")]
    assert len(rest) == (3 if "BranchEnd" in cls.__name__ else 1)
    assert all((t == 1).all() for t in rest)


def test_skip_init_module_is_reset():
    layer = SkipInit().to_empty(device="cpu")
    with torch.no_grad():
        layer.skip_gain.fill_(7), layer.alpha.fill_(7)
    layer.reset_parameters()
    assert layer.skip_gain == layer.alpha == 1


def test_threads_do_not_share_reused_weights():
    """One thread evaluates and one trains the same model; each gets the results that it would get alone."""
    torch.manual_seed(0)
    model = create_model("nfnet_nano", 5, depth=(1, 1, 1, 1), width=(16, 16, 16, 16), drop_rate=0.0).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    both, left = threading.Barrier(2, timeout=60), threading.Event()

    def evaluate() -> Tensor:
        with torch.inference_mode(), reuse_weights(model):
            both.wait()  # the other thread is in the context too
            out = model(x)
            both.wait()
        left.set()
        return out

    def train() -> bool:
        with reuse_weights(model):
            both.wait()
            both.wait()
            left.wait(60)
            reused = len(REUSED.get()) > 0
            model(x).square().sum().backward()
        return reused

    with ThreadPoolExecutor(2) as pool:
        evaluated, trained = pool.submit(evaluate), pool.submit(train)
        assert trained.result()
        torch.testing.assert_close(evaluated.result(), expected)
    for p, grad in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert not REUSED.get()


def test_nested_reuse_gives_the_outer_weights_back():
    """An evaluation inside a step, and a step inside an evaluation. Each asyncio task has its own context."""
    torch.manual_seed(0)
    layer, x = WSConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with reuse_weights(layer):
        outer = REUSED.get()[layer]
        layer(x[:1]).square().sum().backward()
        with torch.no_grad(), reuse_weights(layer):
            assert REUSED.get()[layer] is not outer
            layer(x)
        assert REUSED.get()[layer] is outer
        layer(x[1:]).square().sum().backward()
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
    layer.zero_grad()
    with torch.no_grad(), reuse_weights(layer), torch.enable_grad(), reuse_weights(layer):
        layer(x).square().sum().backward()
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
    one, other = copy_context(), copy_context()
    with_one = one.run(reuse_weights, layer)
    one.run(with_one.__enter__)
    assert not other.run(REUSED.get)
    one.run(with_one.__exit__, None, None, None)


def test_a_recomputation_in_another_thread_reuses_the_same_weights():
    """On a GPU, autograd's own thread recomputes checkpointed blocks; here the test starts one."""
    torch.manual_seed(0)
    model = create_model("nfnet_nano", 5, depth=(1, 1, 1, 1), width=(16, 16, 16, 16), drop_rate=0.0).double().eval()
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with reuse_weights(model):
        loss = model(x).square().sum()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("architecture", ["nfnet_nano", "nf_resnet26"])
def test_reused_weights_give_the_gradients_of_all_passes(architecture, monkeypatch):
    """Micro-batches with one standardization have the gradients of the whole batch."""
    torch.manual_seed(0)
    model = create_model(architecture, 5, stochastic_depth=0.0, drop_rate=0.0, skip_init=0.7).double()
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    nn.functional.cross_entropy(model(images), labels).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    calls: list[int] = []
    standardize = functional.standardize_all
    monkeypatch.setattr(functional, "standardize_all", lambda w, *args: calls.append(len(w)) or standardize(w, *args))
    monkeypatch.setattr(WSConv, "_standardize", None)  # would fail if called one by one
    with reuse_weights(model):
        for some in torch.arange(6).split(4):
            (nn.functional.cross_entropy(model(images[some]), labels[some]) * len(some) / 6).backward()
        assert all(p.grad is None for name, p in model.named_parameters() if "conv" in name and name.endswith("weight"))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-9, atol=1e-12, msg=name)
    assert calls == [sum(isinstance(conv, WSConv) for conv in model.modules())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "together"])
@pytest.mark.parametrize("frozen", ["none of ours", "all but the head", "stem"])
def test_weights_are_reused_whatever_is_trained(frozen, dtype):
    """A network without our layers, a linear probe and a frozen stem; only trained parameters get a gradient."""
    torch.manual_seed(0)
    model = create_model("bn_nfnet_nano" if frozen == "none of ours" else "nfnet_nano", 4).to(dtype)
    if frozen == "all but the head":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    elif frozen == "stem":
        model.stem.requires_grad_(False)
    with reuse_weights(model):
        nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32, dtype=dtype)), torch.arange(4)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_layers_that_override_standardized_weight_are_standardized_one_by_one():
    torch.manual_seed(0)
    layers = nn.ModuleList([WSConvTranspose2d(4, 6, 3, stride=2, groups=2), WSConv2d(4, 6, 3), WSConv1d(4, 6, 3)])
    for layer in layers.double():
        nn.init.normal_(layer.gain)
    with torch.no_grad(), reuse_weights(layers):
        for layer in layers:
            torch.testing.assert_close(REUSED.get()[layer], layer.standardized_weight(), rtol=1e-12, atol=1e-15)


def test_reused_weights_are_forgotten_after_an_error():
    layer, images = WSConv3d(2, 3, 1), torch.randn(1, 2, 1, 1, 1)
    with pytest.raises(RuntimeError, match="implicitly"), reuse_weights(layer):
        layer(images).backward()
    assert layer not in REUSED.get()
    with torch.inference_mode(), reuse_weights(layer):
        torch.testing.assert_close(REUSED.get()[layer], layer.standardized_weight())
