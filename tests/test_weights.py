"""Weights in and out: timm's networks in both directions, conversion between all formats, hostile files."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error
from safetensors.torch import load_file, save_file
from torch import nn

import normfree
from normfree.cli import main
from normfree.deploy.convert import convert_weights
from normfree.errors import InputError
from normfree.models import create_model
from normfree.models.table import defaults
from normfree.weights import timm as names
from normfree.weights.deepmind import read_haiku
from normfree.weights.timm import ARCHITECTURES, from_timm, recognise, to_timm, with_epsilon

timm = pytest.importorskip("timm", reason="timm is the reference of these tests: pip install timm")

# Shrunken networks: options of timm's and of ours
F_SIZES = (
    dict(channels=(64, 80, 128, 128), stem_chs=32, group_size=16, num_features=256),
    dict(width=(64, 80, 128, 128), stem_channels=(4, 8, 16), group_width=16),
)
L_SIZES = (
    dict(channels=(64, 128, 128, 128), stem_chs=32, group_size=16, num_features=192),
    dict(
        width=(64, 128, 128, 128),
        stem_channels=(4, 8, 16),
        group_width=16,
        bottleneck_width=(16, 32, 32, 32),
        final_width=192,
    ),
)
R_SIZES = (dict(channels=(64, 96, 128, 160), stem_chs=16), dict(width=(64, 96, 128, 160)))
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dm_nfnet_f0": F_SIZES,
    "dm_nfnet_f1": F_SIZES,
    "nfnet_f0": F_SIZES,
    "nfnet_l0": L_SIZES,
    "eca_nfnet_l0": L_SIZES,
    "eca_nfnet_l1": L_SIZES,
    "nf_resnet26": R_SIZES,
    "nf_resnet50": ({}, {}),
    "nf_seresnet26": (R_SIZES[0] | dict(channels=(128, 128, 256, 256), stem_chs=32), dict(width=(128, 128, 256, 256))),
    "nf_ecaresnet26": R_SIZES,
    "nf_regnet_b0": ({}, {}),
    "nf_regnet_b2": ({}, {}),
}


def randomize_(model: nn.Module) -> None:
    """Every gain, bias and SkipInit gain counts, and the classifier too."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.squeeze().ndim <= 1:
                p.add_(torch.randn_like(p), alpha=0.3)
            elif "head.fc" in name:
                p.normal_()


def theirs_and_file(name, tmp_path, suffix=".safetensors", random=True, **more):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **CASES[name][0], **more).eval()
    if random:
        randomize_(model)
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model, path


# --- the same function ---


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("random", [False, True])
def test_timm_to_ours(name, random, tmp_path):
    """timm's network as it initialises it, and with every parameter counting: the same logits and feature maps."""
    theirs, path = theirs_and_file(name, tmp_path, random=random)
    ours = create_model(ARCHITECTURES[name][0], num_classes=7, weights=path, **CASES[name][1]).eval()
    for sides in [(64, 64), (61, 83)]:
        images = torch.randn(2, 3, *sides)
        with torch.no_grad():
            assert relative_error(ours(images), theirs(images)) < 1e-5
            for mine, yours in zip(
                ours.forward_intermediates(images)[1], theirs.forward_intermediates(images)[1], strict=True
            ):
                assert relative_error(mine, yours) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_ours_to_timm(name, tmp_path):
    """A network of ours with timm's options, written as timm's: the same logits."""
    torch.manual_seed(1)
    ours = create_model(ARCHITECTURES[name][0], num_classes=7, **{**ARCHITECTURES[name][1], **CASES[name][1]}).eval()
    randomize_(ours)
    theirs = timm.create_model(name, num_classes=7, **CASES[name][0]).eval()
    theirs.load_state_dict(to_timm(ours.state_dict(), name))
    images = torch.randn(2, 3, 61, 83)
    with torch.no_grad():
        assert relative_error(theirs(images), ours(images)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name, tmp_path):
    theirs, path = theirs_and_file(name, tmp_path)
    state = theirs.state_dict()
    ours = create_model(ARCHITECTURES[name][0], num_classes=7, weights=path, **CASES[name][1])
    back = to_timm(ours.state_dict(), name)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_recognised_and_fits(name):
    """At full size, without memory."""
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
        ours = create_model(ARCHITECTURES[name][0], **ARCHITECTURES[name][1])
    assert recognise(state) == (name, 1000, 3)
    translated = {names._timm_key(key, state): value for key, value in ours.state_dict().items()}
    assert translated.keys() == state.keys()
    assert all(translated[key].numel() == state[key].numel() for key in state)
    assert to_timm({k: v.new_empty(v.shape, device="cpu") for k, v in ours.head.state_dict().items()}, name).keys()


def test_light_networks_are_timms():
    """Of their tables: parameters, and the pixels and crop that timm's configuration has."""
    for name in ("nfnet_l0", "eca_nfnet_l0", "eca_nfnet_l1", "eca_nfnet_l2"):
        with torch.device("meta"):
            theirs, ours = timm.create_model(name), create_model(name)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
        cfg = timm.get_pretrained_cfg(name)
        prepared = names.preparation(name, 3)
        assert (prepared["train_px"], prepared["eval_px"]) == (cfg.input_size[-1], cfg.test_input_size[-1])
        assert (prepared["crop_fraction"], prepared["eval_crop"]) == (cfg.test_crop_pct, "center")
        assert ours.info is not None
        assert (ours.info.train_px, ours.info.eval_px) == (cfg.input_size[-1], cfg.test_input_size[-1])


# --- files ---


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_load_keeps_the_function_in_our_own_file(suffix, tmp_path):
    """nf_regnet_b0 needs nearly every option: widths, rounding, padding, γ, epsilon, no SkipInit gain."""
    theirs, path = theirs_and_file("nf_regnet_b0", tmp_path, suffix)
    ours = normfree.load(path)
    normfree.save(ours, tmp_path / "ours.safetensors")
    again = normfree.load(tmp_path / "ours.safetensors")
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert relative_error(again(images), theirs(images)) < 1e-5
        assert torch.equal(again(images), ours(images))
    assert again.info is not None
    assert again.info.overrides["channel_divisor"] == 8
    assert "timm's nf_regnet_b0" in again.info.source


@pytest.mark.parametrize("old", [False, True])
def test_training_checkpoints(old, tmp_path):
    """timm's training script wraps the state dict, with the EMA beside it; torch.save's old format is read as well."""
    theirs, _ = theirs_and_file("nf_regnet_b0", tmp_path)
    state = theirs.state_dict()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    path = tmp_path / "checkpoint.pth.tar"
    content = {"state_dict": other, "state_dict_ema": {f"module.{key}": value for key, value in state.items()}}
    torch.save(content | {"epoch": 3}, path, _use_new_zipfile_serialization=not old)
    assert torch.equal(normfree.load(path).state_dict()["head.fc.weight"], state["head.fc.weight"])


def test_checkpoints_of_timms_own_saver(tmp_path):
    """With the options of its training script, which are an argparse.Namespace, and the average that it keeps."""
    theirs, _ = theirs_and_file("nf_regnet_b0", tmp_path)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    average = timm.utils.ModelEmaV3(theirs, decay=0.5)
    with torch.no_grad():
        theirs.head.fc.weight.zero_()
    options = argparse.Namespace(model="nf_regnet_b0", lr=0.1, output=Path("out"))
    for ema in (None, average):
        saver = timm.utils.CheckpointSaver(
            theirs, optimizer, options, ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
        )
        saver.save_checkpoint(0, metric=1.0)
        weight = normfree.load(tmp_path / "last.pth.tar").state_dict()["head.fc.weight"]
        assert torch.equal(weight, (theirs if ema is None else average.module).head.fc.weight)


def test_another_number_of_classes_and_features(tmp_path):
    _, path = theirs_and_file("nf_regnet_b0", tmp_path)
    model = create_model("nf_regnet_b0", num_classes=3, weights=path, drop_rate=0.4)
    assert model.head.fc.weight.shape[0] == 3
    assert model.head.drop.p == 0.4
    maps = create_model("nf_regnet_b0", weights=path, features_only=True, out_indices=(1, 3))(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [40, 160]
    with pytest.raises(InputError, match="holds weights of nf_regnet_b0, not of nf_regnet_b1"):
        create_model("nf_regnet_b1", weights=path)


class Bomb:
    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.trap),)


def test_hostile_and_damaged_files(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "x.pth"

    def refused(match):
        with pytest.raises(InputError, match=match) as caught:
            normfree.load(path)
        assert "\n" not in str(caught.value)
        assert not trap.exists()

    for old in (False, True):
        torch.save({"head.fc.weight": Bomb(trap)}, path, _use_new_zipfile_serialization=not old)
        refused(r"refused: a weight file has no business with \w+\.mkdir")
    path.write_bytes(pickle.dumps({"a": {"w": Bomb(trap)}}))  # passes for a haiku file
    refused("refused")
    torch.save({"a": torch.zeros(3)}, path)
    refused("nor are its tensors")
    torch.save({"stem.conv4.weight": torch.zeros(()), "stages.0.0.conv1.weight": torch.zeros(())}, path)
    refused("nor are its tensors")
    torch.save([1, 2], path)
    refused("no state dict")
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(3000)}, whole)
    path.write_bytes(whole.read_bytes()[:5000])
    refused("damaged")
    path.write_bytes(b"PK")
    refused("damaged")
    theirs, _ = theirs_and_file("nf_regnet_b0", tmp_path)
    state = theirs.state_dict()
    state["extra"] = state.pop("final_conv.gain")
    torch.save(state, path)
    refused(r"does not fit nf_regnet_b0 .* 1 missing \(final_conv.gain\), 1 unexpected \(extra\)")


def test_report_names_what_differs():
    with torch.device("meta"):
        ours = create_model("nf_resnet26", **ARCHITECTURES["nf_resnet26"][1]).state_dict()
        theirs = timm.create_model("nf_resnet26").state_dict()
    theirs["head.fc.weight"] = torch.zeros(3, 2048)
    theirs["stem.other"] = theirs.pop("stem.conv.bias")
    _, report = from_timm(theirs, ours)
    assert report.reshaped == ["head.fc.weight (3, 2048) for (1000, 2048)"]
    assert (report.missing, report.unexpected) == (["stem.conv.bias"], ["stem.other"])
    assert not report.complete
    assert len(report.matched) == len(ours) - 2


# --- conversion ---


def logits(path, images):
    with torch.no_grad():
        return normfree.load(path)(images)


def test_convert_timm_ours_and_back(tmp_path, capsys):
    theirs, path = theirs_and_file("nf_regnet_b0", tmp_path)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    main(["convert", str(path), str(ours)])
    said = capsys.readouterr().out
    assert "nf_regnet_b0, 7 classes" in said
    assert "0 missing, 0 unexpected, 0 of another shape" in said
    assert "timm's arithmetic is kept" in said
    main(["convert", str(ours), str(back), "--format", "timm"])
    assert "it is timm's nf_regnet_b0" in capsys.readouterr().out
    state = load_file(back)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())


def test_convert_ours_to_timm_keeps_the_function(tmp_path):
    """The epsilon goes into the gains: with ReLU nothing is left to differ; the GELU's 1e-3 is said."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 61, 67)
    for activation, bound, note in [("relu", 1e-5, 'act_layer="relu"'), ("gelu", 2e-3, "1e-4 to 1e-3")]:
        model = create_model("nfnet_f0", num_classes=5, activation=activation, stochastic_depth=0.0).eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("skip_gain"):
                    p.fill_(0.5)
        source, out = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
        normfree.save(model, source)
        done = convert_weights(str(source), str(out))
        assert any(note in line for line in done.notes)
        theirs = timm.create_model("dm_nfnet_f0", num_classes=5, act_layer=activation).eval()
        theirs.load_state_dict(torch.load(out))
        with torch.no_grad():
            assert relative_error(theirs(images), model(images)) < bound


def test_epsilon_goes_into_the_gains():
    from normfree.layers import WSConv2d

    torch.manual_seed(0)
    for scale in (1.0, 0.01):  # the second is below the released code's floor
        old, new = WSConv2d(64, 8, 3), WSConv2d(64, 8, 3, eps=1e-5)
        with torch.no_grad():
            old.weight.mul_(scale)
            old.gain.normal_()
        there = with_epsilon(nn.ModuleDict({"conv": old}).state_dict(), None, 1e-5)
        new.load_state_dict({key.removeprefix("conv."): value for key, value in there.items()})
        assert relative_error(new.standardized_weight(), old.standardized_weight()) < 1e-6
        back = with_epsilon(there, 1e-5, None)
        assert relative_error(back["conv.gain"], old.gain) < 1e-6
        assert not torch.equal(there["conv.gain"], old.gain)


def test_convert_to_the_authors_format_and_back(tmp_path):
    torch.manual_seed(0)
    model = create_model("nf_resnet26", num_classes=5).eval()
    randomize_(model)
    images = torch.randn(1, 3, 64, 64)
    ours, theirs, again = (tmp_path / name for name in ("ours.safetensors", "R26_haiku.npz", "again.safetensors"))
    normfree.save(model, ours)
    convert_weights(str(ours), str(theirs))
    assert "NF_ResNet/~/initial_conv" in read_haiku(theirs)
    with torch.no_grad():
        assert torch.equal(logits(theirs, images), model(images))  # recognised without being named
    done = convert_weights(str(theirs), str(again), name="nf_resnet26")
    assert done.info.eval_crop == "crop_resize"
    assert torch.equal(logits(again, images), model(images))


def test_conversions_that_would_change_the_function_are_refused(tmp_path):
    def refused(name, target, match, **overrides):
        path = tmp_path / "x.safetensors"
        normfree.save(create_model(name, num_classes=3, **overrides), path)
        with pytest.raises(InputError, match=match):
            convert_weights(str(path), str(tmp_path / target))
        assert not (tmp_path / target).exists()

    refused("nf_resnet26", "x.pth", "timm has no network that computes the same as this nf_resnet26: .*pool_shortcut")
    refused("nfnet_nano", "x.pth", "timm has no counterpart of nfnet_nano")
    refused("bn_resnet50", "x.npz", "the released code has no bn_resnet50")
    refused("nf_resnet26", "x.npz", "no network that computes the same: padding", padding="symmetric")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "out.pth"], "no weight file 'nowhere.pth'"),
        (["{file}", "out.pth", "--format", "onnx"], "onnx"),
        (["{file}", "hf://owner/name", "--format", "timm"], "only our own format can be pushed to the Hub"),
        (["{file}"], "OUT"),
    ],
)
def test_bad_arguments_of_convert(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, path = theirs_and_file("nf_regnet_b0", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["convert", *(argument.format(file=path) for argument in arguments)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()


def test_defaults_are_what_the_builder_uses():
    assert defaults("nfnet_f0")["drop_rate"] == 0.2
    assert defaults("nfnet_l0")["padding"] == "symmetric"
    assert defaults("nf_resnet50")["activation"] == "relu"
