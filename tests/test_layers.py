"""The layers against float64 references, and their defining properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from normfree.errors import InputError
from normfree.layers import ACTIVATIONS, Activation, StochasticDepth, WSConv2d, conv2d_same, same_padding


def reference_standardized(conv: WSConv2d) -> torch.Tensor:
    """Paper eq. 1 with the released code's floor, filter by filter, in float64."""
    rows = []
    for w, gain in zip(conv.weight.double(), conv.gain.double(), strict=True):
        fan_in = w.numel()
        var = ((w - w.mean()) ** 2).mean()
        rows.append((w - w.mean()) / torch.sqrt(torch.clamp(var * fan_in, min=1e-4)) * gain * conv.input_scale)
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # the second one is below the floor of the variance
def test_standardized_weight(groups, scale):
    torch.manual_seed(0)
    conv = WSConv2d(16, 24, 3, groups=groups, input_scale=1.7)
    with torch.no_grad():
        conv.weight.mul_(scale).add_(0.3 * scale)
        conv.gain.normal_()
    expected = reference_standardized(conv)
    assert torch.allclose(
        conv.standardized_weight().double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )


def test_standardized_filters_have_mean_0_and_norm_1():
    torch.manual_seed(0)
    weight = WSConv2d(64, 32, 3).standardized_weight()
    assert weight.mean((1, 2, 3)).abs().max() < 1e-7
    assert torch.allclose(weight.square().sum((1, 2, 3)), torch.ones(32), atol=1e-5)


def test_input_scale_is_a_factor_of_the_input():
    torch.manual_seed(0)
    conv, scaled = WSConv2d(8, 8, 3), WSConv2d(8, 8, 3, input_scale=1.7)
    scaled.load_state_dict(conv.state_dict())
    torch.nn.init.normal_(conv.bias)
    torch.nn.init.normal_(scaled.bias)
    scaled.load_state_dict(conv.state_dict())
    x = torch.randn(2, 8, 9, 9)
    assert torch.allclose(scaled(x), conv(1.7 * x), atol=1e-5)


@given(size=st.integers(1, 70), kernel=st.integers(1, 7), stride=st.integers(1, 4))
def test_same_padding(size, kernel, stride):
    """TensorFlow's definition: ceil(size / stride) outputs, an odd zero goes after."""
    out = math.ceil(size / stride)
    total = max((out - 1) * stride + kernel - size, 0)
    assert same_padding(size, kernel, stride) == (total // 2, total - total // 2)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (8, 7)])
def test_conv2d_same_pads_after_at_even_sides(height, width):
    x = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    corner = torch.zeros(1, 1, 3, 3)
    corner[0, 0, 0, 0] = 1  # picks the upper left pixel of every window
    out = conv2d_same(x, corner, None, stride=2, groups=1)
    top, left = (0 if side % 2 == 0 else 1 for side in (height, width))
    padded = F.pad(x, (left, 1, top, 1))
    expected = padded[:, :, : 2 * math.ceil(height / 2) : 2, : 2 * math.ceil(width / 2) : 2]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"identity"}))
def test_gamma_restores_the_variance_of_a_standard_normal(name):
    """By quadrature in float64; the released constants are sampled estimates, up to 1e-3 off."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    weight /= weight.sum()
    y = ACTIVATIONS[name][0](x)
    var = (weight * y * y).sum() - (weight * y).sum() ** 2
    assert var.item() ** -0.5 == pytest.approx(ACTIVATIONS[name][1], rel=1.5e-3)


def test_unknown_activation_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'gelu'"):
        Activation("gellu")


def test_stochastic_depth_drops_whole_samples_without_rescaling():
    torch.manual_seed(0)
    layer = StochasticDepth(0.25)
    x = torch.full((4000, 3, 1, 1), 2.0)
    out = layer(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out.amin((1, 2, 3)) == out.amax((1, 2, 3))).all()
    assert (out[:, 0, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(layer.eval()(x), x)
