"""Every network of the zoo: counts, gradients, shapes, timm's conventions, weight files."""

import inspect
import json

import pytest
import torch
from safetensors.torch import save
from torch.utils.flop_counter import FlopCounterMode

import normfree
from normfree.errors import InputError
from normfree.layers import StochasticDepth, WSConv2d
from normfree.models import TABLE, Network, create_model, find_variant, list_models
from normfree.optim import param_groups
from normfree.weights import read_weights, write_weights

# F0 to F6 at the test pixels: paper, Table 1 and 3. F7, F4+ and the training pixels: counted from the released code.
# name: (millions of parameters, GMACs at the test pixels, GMACs at the training pixels)
COUNTS = {
    "nfnet_f0": (71.49, 12.38, 6.98),
    "nfnet_f1": (132.63, 35.54, 17.44),
    "nfnet_f2": (193.78, 62.59, 33.14),
    "nfnet_f3": (254.92, 114.76, 67.94),
    "nfnet_f4": (316.07, 215.24, 121.12),
    "nfnet_f5": (377.21, 289.76, 169.50),
    "nfnet_f6": (438.36, 377.28, 228.29),
    "nfnet_f7": (499.50, 478.78, 298.48),
    "nfnet_f4_plus": (524.95, 333.39, None),
}
# The ablation ladder (Table 2) at the test pixels: (parameters, GMACs) of baseline, modified width, default width.
DEFAULT_WIDTH = (256, 512, 1024, 2048)
LADDER = {
    "nfnet_f0": [(60.81, 7.68), (62.77, 9.65), (68.64, 10.02)],
    "nfnet_f1": [(107.63, 20.70), (115.20, 26.99), (123.29, 28.01)],
    "nfnet_f2": [(154.45, 35.57), (167.63, 47.07), (177.93, 48.84)],
    "nfnet_f3": [(201.26, 64.36), (220.06, 85.86), (232.58, 89.08)],
}
# arXiv 2101.08692 and its released code at the test pixels. The code's own counter takes 272 / 32 and 456 / 32 for side
# lengths, which gives b2 1.10 and b5 10.56; the networks round up.
COUNTS_2101 = {
    "nf_resnet50": (25.56, 4.09),
    "nf_resnet101": (44.55, 7.80),
    "nf_resnet152": (60.19, 11.51),
    "nf_resnet200": (64.67, 15.01),
    "nf_resnet288": (146.46, 21.56),
    "nf_resnet600": (300.65, 44.27),
    "nf_regnet_b0": (8.60, 0.44),
    "nf_regnet_b1": (10.02, 0.73),
    "nf_regnet_b2": (13.79, 1.15),
    "nf_regnet_b3": (18.14, 2.00),
    "nf_regnet_b4": (29.32, 4.47),
    "nf_regnet_b5": (48.71, 11.10),
}


def small(name: str, **options):
    """A network at full depth and reduced width."""
    width = {"width": (16, 32, 48, 48)}
    if "group_width" in inspect.signature(TABLE[name][0].__init__).parameters:
        width["group_width"] = 8
    return create_model(name, **(width | options))


def on_meta(name: str, **overrides) -> Network:
    with torch.device("meta"):
        return create_model(name, **overrides)


def counts(model: Network, px: int) -> tuple[float, float]:
    params = sum(p.numel() for p in model.parameters())
    return round(params / 1e6, 2), round(model.count_macs(px) / 1e9, 2)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    params, test_macs, train_macs = COUNTS[name]
    model = on_meta(name)
    assert counts(model, find_variant(name).eval_px) == (params, test_macs)
    if train_macs is not None:
        assert counts(model, find_variant(name).train_px)[1] == train_macs


@pytest.mark.parametrize("name", COUNTS_2101)
def test_counts_of_the_older_families(name):
    assert counts(on_meta(name), find_variant(name).eval_px) == COUNTS_2101[name]


@pytest.mark.parametrize(("name", "gmacs"), [("nf_regnet_b2", 1.10), ("nf_regnet_b5", 10.56)])
def test_counts_with_the_released_codes_fractions(name, gmacs):
    """272 / 32 = 8.5 pixels and 456 / 32 = 14.25: with sides that are not rounded, the published figures."""
    model, px = on_meta(name), find_variant(name).eval_px
    small, large = model.count_macs(256), model.count_macs(512)
    by_area = (large - small) / (512**2 - 256**2)
    assert round((small + by_area * (px**2 - 256**2)) / 1e9, 2) == gmacs


@pytest.mark.parametrize("name", LADDER)
def test_ablation_ladder_by_overrides(name):
    px = find_variant(name).eval_px
    rungs = [
        {"width": DEFAULT_WIDTH, "second_conv": False},
        {"second_conv": False},
        {"width": DEFAULT_WIDTH},
    ]
    assert [counts(on_meta(name, **rung), px) for rung in rungs] == LADDER[name]


def test_the_papers_own_f4_plus_is_an_override():
    """Table 5: 527 M parameters and 367 G, with a first bottleneck of 192 channels that the code rounds to 128."""
    model = on_meta("nfnet_f4_plus", bottleneck_width=(192, 384, 1024, 1024))
    assert counts(model, 512) == (527.03, 367.41)


ONE_OF_EACH = ["nfnet_f0", "nfnet_micro", "nf_resnet26", "nf_regnet_b0", "bn_resnet50", "bn_nfnet_f0"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_count_macs_is_what_torch_counts(name):
    model = small(name, num_classes=10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 67, 67))
    assert counter.get_total_flops() == 2 * model.count_macs(67)


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_gets_a_gradient(name):
    """At full depth and reduced width; SkipInit gains at 1 and a classifier that is not 0, as both close paths."""
    torch.manual_seed(0)
    model = small(name, num_classes=7)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.rate = 0.0
    for key, p in model.named_parameters():
        if key.endswith(("skip_gain", "conv2.gain")):
            torch.nn.init.ones_(p)
    torch.nn.init.normal_(model.head.fc.weight)
    out = model(torch.randn(2, 3, 64, 64))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 7)
    out.square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "nfnet_f1_plus", "nfnet_nano"])
@pytest.mark.parametrize("px", [(64, 64), (61, 67)])
def test_feature_maps_have_the_declared_shapes(name, px):
    model = small(name, features_only=True).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, *px))
    shapes = [tuple(m.shape[1:]) for m in maps]
    info = model.feature_info
    assert shapes == [
        (c, *(-(-side // r) for side in px)) for c, r in zip(info.channels(), info.reduction(), strict=True)
    ]
    modules = dict(model.named_modules())
    assert all(module in modules for module in info.module_name())


@pytest.mark.parametrize("indices", [(0,), (1, 3), (4,), (-1, 2)])
@pytest.mark.parametrize("name", ["nfnet_nano", "nf_resnet26", "bn_nfnet_f0"])
def test_out_indices(name, indices):
    torch.manual_seed(0)
    everything = small(name, features_only=True).eval()
    some = small(name, features_only=True, out_indices=indices).eval()
    some.load_state_dict({k: v for k, v in everything.state_dict().items() if k in some.state_dict()})
    x = torch.randn(1, 3, 33, 33)
    expected = everything(x)
    maps = some(x)
    wanted = sorted({i % 5 for i in indices})
    assert len(maps) == len(wanted)
    assert all(torch.equal(a, expected[i]) for a, i in zip(maps, wanted, strict=True))
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in some.parameters())
    with pytest.raises(InputError, match="out_indices"):
        create_model("nfnet_nano", features_only=True, out_indices=(5,))


def test_head_follows_timm():
    model = create_model("nfnet_nano", num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert create_model("nfnet_nano", num_classes=0)(x).shape == (2, model.num_features)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = create_model("nfnet_micro", num_classes=5, drop_rate=0.0)
    for p in model.parameters():
        if p.ndim == 0:
            torch.nn.init.ones_(p)
    x = torch.randn(4, 3, 40, 40)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)  # stochastic depth draws the same samples, in the recomputation too
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_beta_follows_the_expected_variance():
    """One over the deviation of each block's input, which grows by α² a block and starts anew after a transition."""
    model = on_meta("nfnet_f0")
    betas = [block.conv0.input_scale / block.act.gamma for stage in model.stages for block in stage.children()]
    published = [1.0, 0.9806, 0.9806, 0.9623, 0.9806, 0.9623, 0.9449, 0.9285, 0.9129, 0.8980, 0.9806, 0.9623]
    assert betas == pytest.approx(published, abs=5e-5)


def test_initialisation():
    """LeCun normal convolutions, N(0, 0.01²) classifier, zero SkipInit: every non-transition block is the identity."""
    torch.manual_seed(0)
    model = create_model("nfnet_f0", num_classes=100, depth=(1, 2, 1, 1), width=(256, 512, 512, 512)).eval()
    for name, module in model.named_modules():
        if isinstance(module, WSConv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1), name
            assert (module.gain == 1).all()
            assert module.bias is not None
            assert (module.bias == 0).all()
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    x = torch.randn(1, 512, 8, 8)
    assert torch.equal(model.stages[1][1](x), x)
    gains = {name: p.item() for name, p in create_model("nfnet_nano").named_parameters() if p.ndim == 0}
    assert set(gains.values()) == {1.0}  # the small networks start with open branches
    assert create_model("nfnet_nano", skip_init=0.5).stages[0][0].skip_gain.item() == 0.5
    rates = [b.stochastic_depth.rate for stage in model.stages for b in stage.children()]
    assert rates == pytest.approx([0.25 * i / 5 for i in range(5)])


@pytest.mark.parametrize("name", list_models())
def test_state_dict_round_trip(name):
    model, other = small(name, num_classes=4), small(name, num_classes=4)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert sum(len(g["params"]) for g in param_groups(model)) == len(list(model.parameters()))


def test_names_are_the_fields():
    names = set(small("nfnet_f0", num_classes=4).state_dict())
    for expected in ("stem.conv0.weight", "stages.1.0.conv0.weight", "stages.3.2.se.fc2.bias", "head.fc.weight"):
        assert expected in names


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    model = create_model("nfnet_nano", num_classes=3, in_channels=1, depth=(1, 1, 1, 1)).eval()
    path = tmp_path / "deep" / "weights.safetensors"
    normfree.save(model, path)
    again = normfree.load(path)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(model(x), again(x))
    assert again.info == model.info
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert [p.name for p in path.parent.iterdir()] == ["weights.safetensors"]


def test_create_model_takes_weights_over(tmp_path):
    torch.manual_seed(0)
    model = create_model("nfnet_nano", num_classes=3).eval()
    path = tmp_path / "w.safetensors"
    normfree.save(model, path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(create_model("nfnet_nano", num_classes=3, weights=path).eval()(x), model(x))
    other = create_model("nfnet_nano", num_classes=8, weights=path).eval()
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    assert other(x).shape == (1, 8)
    features = create_model("nfnet_nano", features_only=True, out_indices=(1, 2), weights=path).eval()
    assert torch.equal(features(x)[1], model.stages[1](model.stages[0](model.stem(x))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_model("nfnet_f00"), "no model 'nfnet_f00'; did you mean 'nfnet_f0'"),
        (lambda: create_model("nfnet_f0", depht=(1, 1, 1, 1)), "no option 'depht'; did you mean 'depth'"),
        (lambda: create_model("nfnet_f0", width=(1, 2)), "four positive numbers"),
        (lambda: create_model("nfnet_f0", drop_rate=1.5), "drop_rate"),
    ],
)
def test_wrong_models_are_refused(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_bad_weight_files(tmp_path):
    good = tmp_path / "good.safetensors"
    model = create_model("nfnet_nano", num_classes=3)
    normfree.save(model, good)
    state, info = read_weights(good)
    data = good.read_bytes()

    def refuse(content: bytes, message: str) -> None:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            normfree.load(path)
        assert "\n" not in str(caught.value)

    refuse(b"", "damaged")
    refuse(data[: len(data) // 2], "damaged")
    refuse(b"PK\x03\x04" + data, "damaged")
    refuse(save({"x": torch.zeros(1)}), "normfree did not write this file")

    def edited(**values) -> bytes:
        header = json.loads(info.to_metadata()["normfree"]) | values
        return save(state, {"normfree": json.dumps(header)})

    assert edited() == data  # the same weights are the same bytes
    refuse(edited(format=2), "newer version")
    refuse(edited(architecture="nfnet_nope"), "no model 'nfnet_nope'")
    refuse(edited(num_classes=4), "does not fit")
    refuse(edited(train_px=-2), "impossible pixels")
    refuse(edited(eval_crop="some"), "impossible eval_crop")
    refuse(edited(overrides={"widht": [1]}), "no option 'widht'")
    refuse(edited(surprise=1), "surprise")
    refuse(save(state, {"normfree": "[]"}), "header that cannot be used")
    with pytest.raises(InputError, match="no weight file"):
        normfree.load(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="folder"):
        normfree.load(tmp_path)
    with pytest.raises(InputError, match="weights of nfnet_nano, not of nfnet_micro"):
        create_model("nfnet_micro", num_classes=3, weights=good)
    with pytest.raises(InputError, match="does not fit"):
        create_model("nfnet_nano", num_classes=3, depth=(1, 1, 1, 1), weights=good)
    del state["stem.conv0.gain"]
    write_weights(tmp_path / "less.safetensors", state, info)
    with pytest.raises(InputError, match=r"tensor 'stem\.conv0\.gain'"):
        normfree.load(tmp_path / "less.safetensors")
    assert info.mean == (0.485, 0.456, 0.406)
