"""timm as an oracle: what agrees exactly, and the size of every difference that docs/parity.md lists."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden, relative_error, to_state
from torch import Tensor, nn

from normfree.layers import ACTIVATIONS, SqueezeExcite, WSConv2d
from normfree.models import NFNet, create_model
from normfree.models.nfnet import NFBlock
from normfree.optim import EMA, adaptive_clip_grad_, param_groups
from normfree.weights.timm import timm_name, to_timm

REASON = "timm is the reference of these tests: pip install timm"
timm = pytest.importorskip("timm", reason=REASON)
timm_nfnet = pytest.importorskip("timm.models.nfnet", reason=REASON)
timm_layers = pytest.importorskip("timm.layers", reason=REASON)
timm_utils = pytest.importorskip("timm.utils", reason=REASON)
timm_agc = pytest.importorskip("timm.utils.agc", reason=REASON)
timm_optim = pytest.importorskip("timm.optim", reason=REASON)

WIDTH, DEPTH, STEM = (64, 80, 128, 128), (1, 2, 2, 1), (4, 8, 16, 32)  # 80 / 2 is rounded down to a multiple of 16
SIDES = [(64, 64), (61, 67), (33, 96)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomize_(model: NFNet) -> None:
    """As initialised, but with every branch, gain and bias counting."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("skip_gain"):
                p.fill_(0.5)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)


def set_numerics(model: nn.Module, tanh_gelu: bool, no_epsilon: bool) -> None:
    """timm's two departures in arithmetic, each on (False) or taken out (True)."""
    layers: list[Any] = list(model.modules())
    for module in layers:
        if isinstance(module, timm_nfnet.GammaAct):
            module.act_fn = lambda x, inplace=False: F.gelu(x, approximate="tanh" if tanh_gelu else "none")
        elif isinstance(module, timm_layers.ScaledStdConv2dSame):
            module.eps = 1e-20 if no_epsilon else 1e-5


def small_options(**more: Any) -> dict[str, Any]:
    options = dict(channels=WIDTH, depths=DEPTH, stem_chs=STEM[-1], group_size=16, num_features=2 * WIDTH[-1])
    return options | more


def small_pair(dtype: torch.dtype = torch.float64) -> tuple[NFNet, Any]:
    ours = NFNet(WIDTH, DEPTH, 10, group_width=16, stem_channels=STEM[:3], stochastic_depth=0.0)
    randomize_(ours)
    theirs = timm.create_model("dm_nfnet_f0", num_classes=10, **small_options())
    theirs.load_state_dict(to_timm(ours.state_dict(), "dm_nfnet_f0"))
    set_numerics(theirs, tanh_gelu=True, no_epsilon=True)
    return ours.to(dtype), theirs.to(dtype)


# --- the same network ---


@pytest.mark.parametrize("sides", SIDES)
def test_outputs_and_maps(sides):
    """In float64, where nothing but rounding at 1e-16 is left to differ: logits, features, and all five maps."""
    ours, theirs = small_pair()
    images = torch.randn(2, 3, *sides, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-12
        assert relative_error(ours.forward_features(images), theirs.forward_features(images)) < 1e-12
        maps, expected = (model.forward_intermediates(images)[1] for model in (ours, theirs))
    assert len(maps) == len(expected) == 5
    for a, b in zip(maps, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-12


def test_outputs_float32():
    ours, theirs = small_pair(torch.float32)
    images = torch.randn(2, 3, 61, 67)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-5


def test_gradients():
    ours, theirs = small_pair()
    images, labels = torch.randn(3, 3, 45, 64, dtype=torch.float64), torch.tensor([1, 0, 7])
    for model in (ours, theirs):
        F.cross_entropy(model(images), labels).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    seen = set()
    for name, p in ours.named_parameters():
        grad = expected[timm_name(name)]
        assert p.grad is not None
        assert p.grad.abs().max() > 0, name
        assert relative_error(p.grad, grad.view_as(p)) < 1e-10, name
        seen.add(timm_name(name))
    assert seen == expected.keys()


def test_f0_differences_are_all_listed():
    """docs/parity.md, "End to end": F0 itself, with timm's two departures in arithmetic in and out."""
    ours = create_model("nfnet_f0", stochastic_depth=0.0, drop_rate=0.0).eval()
    randomize_(ours)
    with torch.device("meta"):
        theirs = timm.create_model("dm_nfnet_f0").eval()
    theirs.load_state_dict(to_timm(ours.state_dict(), "dm_nfnet_f0"), assign=True)
    images = torch.randn(2, 3, 64, 64)
    errors = {}
    with torch.no_grad():
        expected = ours(images)
        for tanh_gelu in (False, True):
            for no_epsilon in (False, True):
                set_numerics(theirs, tanh_gelu, no_epsilon)
                errors[tanh_gelu, no_epsilon] = relative_error(theirs(images), expected)
    assert 0.01 < errors[False, False] < 0.03  # as timm is
    assert 0.01 < errors[True, False] < 0.03  # the weight-standardization epsilon alone
    assert 1e-4 < errors[False, True] < 4e-4  # the GELU alone
    assert errors[True, True] < 5e-6  # neither


def test_f0_parameter_and_feature_tables():
    with torch.device("meta"):
        ours, theirs = create_model("nfnet_f0"), timm.create_model("dm_nfnet_f0")
        our_maps = create_model("nfnet_f0", features_only=True)
        their_maps = timm.create_model("dm_nfnet_f0", features_only=True)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 71_489_284
    counts = {timm_name(name): p.numel() for name, p in ours.named_parameters()}
    assert counts == {name: p.numel() for name, p in theirs.named_parameters()}
    assert our_maps.feature_info.channels() == their_maps.feature_info.channels() == [64, 256, 512, 1536, 3072]
    assert our_maps.feature_info.reduction() == their_maps.feature_info.reduction() == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("indices", [None, (0,), (1, 3), (2, 4)])
def test_features_only(indices):
    ours = NFNet(
        WIDTH, DEPTH, group_width=16, stem_channels=STEM[:3], features_only=True, out_indices=indices, drop_rate=0.0
    )
    options = small_options(features_only=True) | ({} if indices is None else {"out_indices": indices})
    theirs = timm.create_model("dm_nfnet_f0", **options)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    for sides in [*SIDES, (32, 47)]:
        images = torch.zeros(1, 3, *sides)
        with torch.no_grad():
            assert [m.shape for m in ours(images)] == [m.shape for m in theirs(images)], sides


# --- adaptive gradient clipping ---

# shapes of which both take the same units
SHAPES = [(8, 4, 3, 3), (6, 5, 1, 1), (16, 3, 7, 7), (10, 7), (1, 9), (5,), (1,), ()]


@pytest.mark.parametrize("scale", [0.003, 0.03, 3.0])
def test_agc(scale):
    generator = torch.Generator().manual_seed(1)
    mine, yours = [], []
    for shape in SHAPES:
        for start in (0.0, 1.0):  # zero-initialised parameters meet ε
            value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
            grad *= scale * torch.rand((*shape[:1], *[1] * (len(shape) - 1)), generator=generator, dtype=torch.float64)
            for params in (mine, yours):
                params.append(nn.Parameter(start * value))
                params[-1].grad = grad.clone()
    before = [p.grad.clone() for p in mine]
    stats = adaptive_clip_grad_(mine, clipping=0.01)
    timm_agc.adaptive_clip_grad(yours, clip_factor=0.01)
    for shape, a, b in zip([s for s in SHAPES for _ in range(2)], mine, yours, strict=True):
        assert relative_error(a.grad, b.grad) < 1e-12, shape
    changed = sum(not torch.equal(p.grad, old) for p, old in zip(mine, before, strict=True))
    assert changed > len(SHAPES) / 2
    if scale == 0.003:
        assert 0 < stats.clipped_fraction < 1


def test_agc_of_gains():
    """timm stores a gain as (C, 1, 1, 1) and clips each number by itself; ours, however stored, the whole of it."""
    arrays, _ = load_golden("train_nfnet_tiny")
    depth = load_golden("nfnet_tiny_gelu")[1]["depth"]
    values, grads = to_state(arrays, "params_initial/", depth), to_state(arrays, "grads_step0/", depth)
    names = [name for name in values if name.endswith(".gain")]

    def clip(function, shape) -> list[Tensor]:
        params = [nn.Parameter(values[name].clone().view(shape)) for name in names]
        for p, name in zip(params, names, strict=True):
            p.grad = grads[name].clone().view(shape)
        function(params, 0.01)
        return [p.grad.flatten() for p in params if p.grad is not None]

    ours, ours_4d = clip(adaptive_clip_grad_, (-1,)), clip(adaptive_clip_grad_, (-1, 1, 1, 1))
    theirs, theirs_1d = clip(timm_agc.adaptive_clip_grad, (-1, 1, 1, 1)), clip(timm_agc.adaptive_clip_grad, (-1,))
    changed_ours = sum(not torch.equal(a, grads[name]) for a, name in zip(ours, names, strict=True))
    changed_theirs = sum(int((b != grads[name]).sum()) for b, name in zip(theirs, names, strict=True))
    for a, b, c in zip(ours, ours_4d, theirs_1d, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c)
    assert (len(names), changed_ours) == (33, 6)
    assert (sum(len(a) for a in ours), changed_theirs) == (1216, 97)
    # the row of docs/parity.md
    i = names.index("stages.2.0.conv_shortcut.gain")
    assert torch.equal(ours[i], grads[names[i]])
    assert (theirs[i].norm() / ours[i].norm()).item() == pytest.approx(0.646, abs=2e-3)
    assert torch.cosine_similarity(theirs[i], ours[i], dim=0).item() == pytest.approx(0.881, abs=2e-3)


# --- sizes of the other differences in docs/parity.md ---


def test_size_of_gelu():
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    function, gamma = ACTIVATIONS["gelu"]
    scaled = timm_nfnet.act_with_gamma("gelu", timm_nfnet._nonlin_gamma["gelu"])()(x)
    assert (scaled - gamma * function(x)).abs().max().item() == pytest.approx(8.05e-4, rel=1e-2)


@pytest.mark.parametrize(
    ("shape", "percent"),
    [((16, 3, 3), 0.0163), ((256, 256, 1), 0.129), ((768, 128, 3), 0.574), ((768, 1536, 1), 0.762)],
)
def test_size_of_weight_standardization_epsilon(shape, percent):
    """How much smaller timm's standardized rows are at initialisation, on average; it grows with the fan-in."""
    out, fan, kernel = shape
    ours = WSConv2d(fan, out, kernel, padding="same")
    theirs = timm_layers.ScaledStdConv2dSame(fan, out, kernel, eps=timm_nfnet.NfCfg((1,) * 4, (8,) * 4).std_conv_eps)
    theirs.load_state_dict({**ours.state_dict(), "gain": ours.gain.detach().view(-1, 1, 1, 1)})
    # the response to a single 1 in each channel in turn is the kernel itself
    ones = F.pad(torch.eye(fan)[:, :, None, None], (kernel // 2,) * 4)
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(conv(ones), dim=(0, 2, 3)) for conv in (ours, theirs)]
    assert norms[0].numpy() == pytest.approx(1.0, abs=1e-4)
    assert 100 * (1 - norms[1] / norms[0]).mean().item() == pytest.approx(percent, rel=0.05)


def test_weight_decay_on_gains():
    """timm's grouping decays all 57 gains of its F0, for their four dimensions; ours none, in timm's network too."""
    with torch.device("meta"):
        model = timm.create_model("dm_nfnet_f0")
    names = {p: name for name, p in model.named_parameters()}
    gains = {p for p, name in names.items() if name.endswith(".gain")}
    assert len(gains) == 57

    def decayed(groups: list[dict]) -> set[nn.Parameter]:
        return {p for group in groups if group["weight_decay"] for p in group["params"]}

    theirs = decayed(timm_optim.param_groups_weight_decay(model, 2e-5))
    ours = decayed(param_groups(model, weight_decay=2e-5))
    assert theirs - ours == gains
    assert not ours - theirs


def test_head_exemption():
    """timm leaves out the last two parameters: the classifier, bias included, or with no classifier something else."""
    with torch.device("meta"):
        whole, headless = timm.create_model("dm_nfnet_f0"), timm.create_model("dm_nfnet_f0", num_classes=0)

    def exempt(model: nn.Module) -> list[str]:
        clipped = set(timm.models.model_parameters(model, exclude_head=True))
        return [name for name, p in model.named_parameters() if p not in clipped]

    assert exempt(whole) == ["head.fc.weight", "head.fc.bias"]
    assert exempt(headless) == ["final_conv.bias", "final_conv.gain"]
    groups = param_groups(whole, clipping=0.01)
    unclipped = {p for group in groups if group["clipping"] is None for p in group["params"]}
    assert [name for name, p in whole.named_parameters() if p in unclipped] == ["head.fc.weight"]
    assert all(group["clipping"] is not None for group in param_groups(headless, clipping=0.01))


def test_stochastic_depth():
    """timm: rates up to r itself, survivors divided by 1 - rate. Ours: r * i / n, survivors as they are."""
    rates = [
        rate for stage in timm_layers.calculate_drop_path_rates(0.25, [1, 2, 6, 3], stagewise=True) for rate in stage
    ]
    with torch.device("meta"):
        model = create_model("nfnet_f0", stochastic_depth=0.25)
    ours = [block.stochastic_depth for block in model.modules() if isinstance(block, NFBlock)]
    assert rates == pytest.approx([0.25 * i / 11 for i in range(12)])
    assert [drop.rate for drop in ours] == pytest.approx([0.25 * i / 12 for i in range(12)])
    ones = torch.ones(64, 1, 1, 1)
    assert sorted(set(timm_layers.DropPath(0.25)(ones).flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert sorted(set(ours[-1](ones).flatten().tolist())) == [0, 1]


def test_squeeze_excite_initialisation():
    ours, theirs = SqueezeExcite(512, 256), timm.create_model("dm_nfnet_f0", **small_options(channels=(512,) * 4))
    for layer, expected in ((ours.fc1, 0.88), (theirs.stages[0][0].attn_last.fc1, 1.0)):
        weight = layer.weight.detach()
        assert weight.shape[:2] == (256, 512)
        assert weight.std().item() * 512**0.5 == pytest.approx(expected, abs=0.01)


def test_ema_decay():
    """timm's warm-up is another curve, and without it the decay is constant from the second update on."""
    layer = nn.Linear(1, 1)
    ours = EMA(layer, decay=0.99999)
    warm = timm_utils.ModelEmaV3(layer, decay=0.99999, use_warmup=True)
    plain = timm_utils.ModelEmaV3(layer, decay=0.99999)
    # timm counts updates from 1
    table = [(t, ours.decay_at(t), warm.get_decay(t + 1), plain.get_decay(t + 1)) for t in (0, 89, 9_999, 112_601)]
    expected = [
        (0, 0.1, 0, 0),
        (89, 0.909091, 0.950207, 0.99999),
        (9_999, 0.999101, 0.997846, 0.99999),
        (112_601, 0.999920, 0.999571, 0.99999),
    ]
    for row, numbers in zip(table, expected, strict=True):
        assert row == pytest.approx(numbers, abs=1e-6)
