"""What timm's own tests, torchvision's feature extractor and a segmentation library ask of a network."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import normfree
from normfree.errors import InputError
from normfree.layers import Activation, StochasticDepth
from normfree.models import Network, create_model
from normfree.optim import param_groups

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "nfnet_f0": dict(group_width=8),
    "eca_nfnet_l0": dict(group_width=8, bottleneck_width=(8, 16, 24, 24), final_width=40),
    "nf_resnet26": {},
    "nf_regnet_b0": dict(group_width=8),
    "bn_resnet50": {},
    "bn_nfnet_f0": dict(group_width=8),
}
WITH_FINAL_CONV = {"nfnet_f0", "eca_nfnet_l0", "nf_regnet_b0", "bn_nfnet_f0"}
every_family = pytest.mark.parametrize("name", FAMILIES)


def small(name: str, **options) -> Network:
    """Of every family: one block a stage, few channels, all branches open, a classifier that is not 0; float64."""
    torch.manual_seed(0)
    sizes = dict(num_classes=5, width=(16, 16, 24, 24), depth=(1, 1, 2, 1), drop_rate=0.0)
    model = create_model(name, **(sizes | FAMILIES[name] | options)).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 0 or key.endswith("conv2.gain"):
                p.fill_(0.7)
    if isinstance(model.head.fc, nn.Linear):
        nn.init.normal_(model.head.fc.weight)
    return model


def images(height: int = 64, width: int = 45, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


@every_family
def test_features_are_scaled_and_lead_to_the_logits(name):
    """γ of the last activation is in them, unless the convolution before it has it already, as in timm's networks."""
    model, x = small(name), images()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    last = model.forward_intermediates(x, [-1], intermediates_only=True)[0]
    if name.startswith(("nfnet", "nf_")):
        act = model.stages[0][0].act
        torch.testing.assert_close(features, act.function(last) * act.gamma)
    elif not name.startswith("bn"):
        assert isinstance(model.act, Activation)
        torch.testing.assert_close(features, model.act.function(last))


@every_family
def test_pooling_and_classifier_go_and_come(name):
    model, x = small(name), images()
    features, pooled = model.forward_features(x), model.forward_features(x).mean((2, 3))
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    with pytest.raises(InputError, match="num_classes 3"):
        model.reset_classifier(3)  # pixels have no classifier
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    assert model.head.fc.weight.dtype == torch.float64
    for wrong in (dict(num_classes=2, global_pool="max"), dict(num_classes=-1)):
        with pytest.raises(InputError):
            model.reset_classifier(**wrong)
    assert model.num_classes == 3
    assert torch.equal(small(name, num_classes=0, global_pool="")(x), features)
    with pytest.raises(InputError, match="global_pool"):
        small(name, global_pool="")


def test_what_is_said_of_a_network_follows_its_classifier(tmp_path):
    model = create_model("nfnet_nano", num_classes=2)
    model.info = replace(model.info, class_names=("cat", "dog"))
    model.reset_classifier(2)  # other classes, for all that is known
    assert (model.info.num_classes, model.info.class_names) == (2, ())
    model.reset_classifier(0, "")
    assert (model.info.num_classes, model.info.overrides) == (0, {"global_pool": ""})
    normfree.save(model, tmp_path / "maps.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(normfree.load(tmp_path / "maps.safetensors")(x), model.eval()(x))
    tuned = create_model("nfnet_nano", num_classes=4, weights=tmp_path / "maps.safetensors")
    assert tuned(x).shape == (1, 4)
    model.reset_classifier(3, "avg")
    assert model.info.overrides == {}


@every_family
def test_forward_intermediates(name):
    model, x = small(name), images()
    features, maps = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    info = model.feature_info
    assert [m.shape[1] for m in maps] == info.channels() == [row["num_chs"] for row in info]
    assert [-(-64 // m.shape[2]) for m in maps] == info.reduction() == [2, 4, 8, 16, 32]
    for indices, taken in ((2, [3, 4]), ([-1, 0], [0, 4]), ((1,), [1]), (None, range(5)), (5, range(5))):
        for stop_early in (False, True):
            end, some = model.forward_intermediates(x, indices, stop_early=stop_early)
            assert len(some) == len(taken)
            assert all(torch.equal(a, maps[i]) for a, i in zip(some, taken, strict=True))
            stage = taken[-1] if stop_early else 4
            assert torch.equal(end, features if stage == 4 else maps[stage])
        only = model.forward_intermediates(x, indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(only, some, strict=True))
    assert torch.equal(model.forward_intermediates(x, [0], stop_early=True)[0], model.stem(x))
    (normed,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    assert torch.equal(normed, features if name.startswith("bn_") else maps[4])
    for wrong in (0, 6, [5], [-6], []):
        with pytest.raises(InputError, match="feature maps 0 to 4"):
            model.forward_intermediates(x, wrong)
    with pytest.raises(InputError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@every_family
@pytest.mark.parametrize("indices", [1, (0,), [1, 2], (-2,)])
def test_pruning(name, indices):
    model, x = small(name), images()
    whole = model.forward_intermediates(x, indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices)
    maps = model.forward_intermediates(x, taken, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, whole, strict=True))
    assert model(x).shape == (2, model.num_features, *([2, 2] if indices == 1 else maps[-1].shape[2:]))
    assert (model.info is None) == (indices != 1)
    if indices != 1:
        with pytest.raises(InputError, match="feature maps"):
            model.forward_intermediates(x, [4])
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)


def test_feature_info():
    model = create_model("nfnet_nano", features_only=True, out_indices=2)
    info = model.feature_info
    assert info.out_indices == model.out_indices == (3, 4)
    assert info.channels() == [256, 512]
    assert info.channels(0) == info.info[0]["num_chs"] == 16
    assert info.reduction([1, 4]) == [2, 16]
    assert info.module_name() == ["stages.2", "final_conv"]
    assert info.get_dicts(["num_chs", "index"]) == [dict(num_chs=256, index=3), dict(num_chs=512, index=4)]
    assert [m.shape[1] for m in model(torch.zeros(1, 3, 32, 32))] == [256, 512]
    with pytest.raises(InputError, match="features_only"):
        model.reset_classifier(3)
    with pytest.raises(InputError, match="out_indices"):
        create_model("nfnet_nano", features_only=True, out_indices=6)


@every_family
def test_default_cfg(name):
    model = small(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg == model.pretrained_cfg
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == 3
    assert len(state[f"{cfg['classifier']}.weight"]) == cfg["num_classes"] == 5
    assert cfg["architecture"] == name
    side, reduction = cfg["input_size"][-1], model.feature_info.reduction()[-1]
    assert cfg["pool_size"] == (-(-side // reduction),) * 2
    direct = type(model)((16, 16, 24, 24), (1, 1, 1, 1))
    assert direct.default_cfg["classifier"] == "head.fc"


def test_timm_prepares_images_by_it():
    timm_data = pytest.importorskip("timm.data", reason="timm is asked here: pip install timm")
    config = timm_data.resolve_model_data_config(
        create_model("nfnet_f0", width=(16, 16, 16, 16), group_width=8), use_test_size=True
    )
    assert config["input_size"] == (3, 256, 256)
    assert config["crop_mode"] == "squash"
    assert config["crop_pct"] == pytest.approx(256 / 288)
    assert config["mean"] == normfree.create_model("nfnet_nano").info.mean


@every_family
def test_groups_of_parameters(name):
    optim = pytest.importorskip("timm.optim", reason="timm is asked here: pip install timm")
    model = small(name)
    groups = optim.param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    order = [model.stem, *(block for stage in model.stages for block in stage), model.head]
    each = [{scales[p] for p in module.parameters()} for module in order]
    assert all(len(found) == 1 for found in each)
    numbers = [found.pop() for found in each]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 1
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for group in param_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    coarse = optim.param_groups_layer_decay(model, layer_decay=0.5, verbose=False)
    assert sum(len(group["params"]) for group in coarse) == len(list(model.parameters()))


def test_timms_feature_getter_takes_ours():
    timm_features = pytest.importorskip("timm.models._features", reason="timm is asked here: pip install timm")
    model, x = small("nfnet_f0"), images()
    expected = model.forward_intermediates(x, [1, 3], intermediates_only=True)
    getter = timm_features.FeatureGetterNet(model, out_indices=(1, -2))
    assert getter.feature_info.channels() == [16, 24]
    assert all(torch.equal(a, b) for a, b in zip(getter(x), expected, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_family
def test_torchvision_extracts_features(name, training):
    """torch.fx traces the network; features, logits and gradients are its own, for any size of the images."""
    model = small(name)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.rate = 0.5 if training else module.rate
    extractor = create_feature_extractor(model, {"stages.1": "two", "act": "features", "head": "logits"}).train(
        training
    )
    model.train(training)
    for sides in ((64, 45), (33, 70)):
        x = images(*sides)
        torch.manual_seed(2)
        found = extractor(x)
        torch.manual_seed(2)
        features, (two,) = model.forward_intermediates(x, [2])
        logits = model.forward_head(features)
        for ours, theirs in ((found["two"], two), (found["features"], features), (found["logits"], logits)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        parameters = list(model.parameters())
        loss = (y.square().mean() for y in (found["two"], found["logits"]))
        grads = torch.autograd.grad(sum(loss), list(extractor.parameters()))
        theirs = torch.autograd.grad(two.square().mean() + logits.square().mean(), parameters)
        assert len(grads) == len(theirs)
        by_name = dict(zip((n for n, _ in extractor.named_parameters()), grads, strict=True))
        for (key, _), their in zip(model.named_parameters(), theirs, strict=True):
            torch.testing.assert_close(by_name[key], their, rtol=1e-7, atol=1e-9)


def test_timms_names_of_options():
    model = create_model("nfnet_nano", num_classes=3, in_chans=1, drop_path_rate=0.125, width=(16,) * 4)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    assert (model.info.in_channels, model.info.overrides["stochastic_depth"]) == (1, 0.125)
    rates = [m.rate for m in model.modules() if isinstance(m, StochasticDepth)]
    assert rates == [0.125 * i / 7 for i in range(7)]
    assert create_model("nfnet_nano", in_channels=1, in_chans=1, width=(16,) * 4).in_channels == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(in_chans=1, in_channels=2), "in_channels is given twice"),
        (dict(drop_path_rate=0.1, stochastic_depth=0.2), "stochastic_depth is given twice"),
        (dict(drop_path_rate=1.5), "stochastic_depth 1.5"),
        (dict(in_chan=1), "did you mean 'in_channels'"),
        (dict(act_layer="relu"), "it is 'activation' here"),
        (dict(depths=(1, 1, 1, 1)), "it is 'depth' here"),
        (dict(pretrained=True), "it is 'weights' here"),
        (dict(output_stride=16), "its strides are fixed"),
        (dict(global_pool="max"), "global_pool 'max'"),
    ],
)
def test_hints_name_our_words(options, message):
    with pytest.raises(InputError, match=message) as caught:
        create_model("nfnet_nano", **options)
    assert "\n" not in str(caught.value)


@every_family
def test_every_module_resets_itself(name):
    """From no memory ("meta") by way of any memory to a fresh network, module by module, in any order: as FSDP does."""
    torch.manual_seed(0)
    sizes = dict(num_classes=7, width=(32, 64, 64, 64), depth=(1, 1, 1, 1)) | FAMILIES[name]
    fresh = create_model(name, **sizes)
    with torch.device("meta"):
        model = create_model(name, **sizes)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
    for module in reversed(list(model.modules())):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            module.reset_parameters()
    for (key, ours), theirs in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        if theirs.ndim < 2 or not theirs.any():
            assert torch.equal(ours, theirs), key
        else:
            spread = 4 * theirs.numel() ** -0.5
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=spread), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", [{}, dict(se_ratio=0.25), dict(eca=True)], ids=str)
def test_large_images_in_half_precision(gate, dtype):
    """Maps of 128 x 128 with a mean of 5 and more have sums beyond float16's 65504, which are taken in float32."""
    model = small("nf_resnet26", **gate).float()
    for block in model.stages[0]:
        nn.init.constant_(block.conv2.bias, 8)
    nn.init.normal_(model.head.fc.weight, std=0.1)
    x = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        expected = model(x)
        logits = model.to(dtype)(x.to(dtype)).float()
    assert (logits - expected).norm() < 60 * torch.finfo(dtype).eps * expected.norm()


# --- a segmentation library takes one as its encoder ---


def test_unet_with_our_encoder_trains_on_a_picture():
    """The page's own encoder, in training mode, on the lines of a plot."""
    reason = "pip install segmentation-models-pytorch: it takes our networks here"
    smp = pytest.importorskip("segmentation_models_pytorch", reason=reason)
    page = (ROOT / "docs/features.md").read_text(encoding="utf-8")
    names: dict = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, names)
    del smp.encoders.encoders["nfnet_micro"]
    unet = names["unet"]
    assert unet.encoder.out_channels == [3, 32, 64, 128, 256, 768]
    for module in unet.modules():
        if isinstance(module, StochasticDepth):
            module.rate = 0.0  # one image: a block that is skipped gets no gradient
    with Image.open(ROOT / "docs/images/convert-loss.png") as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB").resize((96, 64)))).float().permute(2, 0, 1)[None]
    x, lines = pixels / 255 - 0.5, (pixels.mean(1, keepdim=True) < 128).float()
    assert [x.shape[2] // m.shape[2] for m in unet.encoder(x)] == [1, 2, 4, 8, 16, 32]
    optimizer, losses = torch.optim.SGD(unet.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(4):
        logits = unet(x)
        assert logits.shape == (1, 1, 64, 96)
        loss = F.binary_cross_entropy_with_logits(logits, lines)
        optimizer.zero_grad()
        loss.backward()
        for key, p in unet.named_parameters():
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key
            assert p.grad.any() or not key.startswith("encoder"), key
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
