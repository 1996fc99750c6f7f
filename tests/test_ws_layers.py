"""Weight-standardized convolutions in one and three dimensions, and transposed ones, against float64 references."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from normfree import functional
from normfree.layers import (
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
    WSConv3d: nn.Conv3d,
    WSConvTranspose1d: nn.ConvTranspose1d,
    WSConvTranspose2d: nn.ConvTranspose2d,
    WSConvTranspose3d: nn.ConvTranspose3d,
}
TRANSPOSED = {WSConvTranspose1d: 1, WSConvTranspose2d: 2, WSConvTranspose3d: 3}


def draw(layer: WSConv) -> WSConv:
    """The same layer with any weights, gains and biases."""
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


@pytest.mark.parametrize("architecture", ["nfnet_nano", "nf_resnet26"])
def test_reused_weights_give_the_gradients_of_all_passes(architecture, monkeypatch):
    """Micro-batches with one standardization equal the whole batch, whose mean loss is that of theirs."""
    torch.manual_seed(0)
    model = create_model(architecture, 5, stochastic_depth=0.0, drop_rate=0.0, skip_init=0.7).double()
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    nn.functional.cross_entropy(model(images), labels).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    calls: list[int] = []
    standardize = functional.standardize_all
    monkeypatch.setattr(functional, "standardize_all", lambda w, *args: calls.append(len(w)) or standardize(w, *args))
    monkeypatch.setattr(WSConv, "_standardize", None)  # not one by one
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
    """A network without our layers, a linear probe, and a frozen stem; only what is trained gets a gradient."""
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


def test_layers_with_weights_of_their_own_are_standardized_by_themselves():
    torch.manual_seed(0)
    layers = nn.ModuleList([WSConvTranspose2d(4, 6, 3, stride=2, groups=2), WSConv2d(4, 6, 3), WSConv1d(4, 6, 3)])
    for layer in layers.double():
        nn.init.normal_(layer.gain)
    with torch.no_grad(), reuse_weights(layers):
        for layer in layers:
            torch.testing.assert_close(layer._reused, layer.standardized_weight(), rtol=1e-12, atol=1e-15)


def test_reused_weights_are_forgotten_after_an_error():
    layer, images = WSConv3d(2, 3, 1), torch.randn(1, 2, 1, 1, 1)
    with pytest.raises(RuntimeError, match="implicitly"), reuse_weights(layer):
        layer(images).backward()
    assert layer._reused is None
    with torch.inference_mode(), reuse_weights(layer):
        torch.testing.assert_close(layer._reused, layer.standardized_weight())
