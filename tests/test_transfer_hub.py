"""Fine-tuning from published weights, end to end: timm's networks with random weights on a Hub on this machine."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import FakeHub, hub_environment
from golden import relative_error
from PIL import Image
from test_train import numbers

import normfree
from normfree import cli
from normfree.data.transforms import EvalTransform
from normfree.models import create_model, load, save
from normfree.tasks.classification import resume
from normfree.weights import hub as client

timm = pytest.importorskip("timm", reason="timm's networks are the reference: pip install timm")
NAMES = ("test_nfnet", "nfnet_l0", "eca_nfnet_l0", "nf_resnet50", "dm_nfnet_f0")

SCRIPT = """
import contextlib, io, json, sys, traceback
from pathlib import Path
import torch
from normfree import cli
from normfree.config import load_config, options_of
from normfree.engine.update import Update
from normfree.tasks.choice import choose_recipe
from normfree.tasks.classification import build

def command(args, stop=-1):  # stop: the step before which Ctrl-C is pressed
    step, out, err = Update.step, io.StringIO(), io.StringIO()
    def interrupted(self, number, *more):
        if number == stop:
            raise KeyboardInterrupt
        step(self, number, *more)
    Update.step = interrupted
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(args)
    except SystemExit as error:
        return error.code, out.getvalue(), err.getvalue()
    except Exception:
        return 1, out.getvalue(), traceback.format_exc()
    finally:
        Update.step = step
    return 0, out.getvalue(), err.getvalue()

def choose(given):
    run, reasons, _ = choose_recipe(None, given)
    return {name: str(value) for name, value in options_of(run).items()}, [reason.text for reason in reasons]

def before_the_first_step(folder, px, out):
    task = build(load_config(Path(folder) / "config.json")).task
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = task.model.eval().forward_features(images)
        torch.save([features, task.model.forward_head(features, pre_logits=True)], out)
    return task.info.mean, task.info.std

for line in sys.stdin:
    name, arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), flush=True)
"""


class Python:
    """Another Python, in which huggingface_hub has its own environment."""

    def __init__(self, site: str, cache: Path, folder: Path, **environment: str):
        pipe, environment = subprocess.PIPE, hub_environment(site, cache) | {"NORMFREE_DATA": str(cache)} | environment
        command = [sys.executable, "-c", SCRIPT]
        self.process = subprocess.Popen(command, env=environment, cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def call(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, *args: object, stop: int = -1) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        return self.call("command", [*map(str, args)], stop)

    def failure(self, *args: object) -> str:
        """The one line of a command that refuses its input."""
        code, out, err = self.run(*args)
        assert (code, out) == (2, ""), err
        (line,) = err.strip().splitlines()
        return line


@pytest.fixture(scope="module")
def hub():
    hub = FakeHub()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def pythons(hub, tmp_path_factory):
    """Starts Pythons that share one cache."""
    cache, folder, started = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("here"), []

    def start(**environment):
        started.append(Python(hub.site, cache, folder, **environment))
        return started[-1]

    yield start
    for python in started:
        python.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def python(pythons):
    return pythons()


@pytest.fixture(scope="module")
def offline(pythons):
    return pythons(HF_HUB_OFFLINE="1")


def publish(hub: FakeHub, repo: str, model: Any, folder: Path) -> str:
    """Puts a network of timm's on the Hub, as timm does; its address."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    names = "model.safetensors", "config.json"
    hub.repos[repo] = {"main": {name: (folder / name).read_bytes() for name in names}}
    return f"hf://{repo}"


def random_weights(name: str, **options: Any) -> Any:
    """A network of timm's whose every branch, gain and bias counts."""
    torch.manual_seed(1)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("skipinit_gain"):
                p.fill_(0.3)
            elif key.endswith(("gain", "bias")):
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_published_network_is_fine_tuned(name, hub, python, photos, tmp_path, monkeypatch):
    theirs = random_weights(name)
    cfg = theirs.pretrained_cfg
    uri = publish(hub, f"timm/{name}", theirs, tmp_path / "hub")

    # what is chosen
    options, reasons = python.call("choose", {"path": str(photos), "init": uri, "device": "cpu", "steps": 2})
    train_px, eval_px = cfg["input_size"][-1], cfg.get("test_input_size", cfg["input_size"])[-1]
    assert (options["train_px"], options["eval_px"]) == (str(train_px), str(eval_px))
    crop = "resize_crop" if cfg["crop_mode"] == "squash" else "center"
    share = 1.0 if crop == "resize_crop" else cfg.get("test_crop_pct", cfg["crop_pct"])
    assert (options["eval_crop"], options["crop_fraction"]) == (crop, str(share))
    assert any(f"{train_px} px in training, {eval_px} px in evaluation" in reason for reason in reasons)

    # a run, and the same one, interrupted
    large = name != "test_nfnet"
    px = 32 if large else train_px
    sizes = ("--batch-size", 2 if large else 8, "--train-px", px, "--eval-px", px)
    train = ("train", photos, "--init", uri, *sizes, "--steps", 2, "--device", "cpu", "--workers", 0)
    code, _, err = python.run(*train, "--out", tmp_path / "run")
    assert code == 0, err
    assert "parameters of the classifier are new" in err
    resumes = name != "dm_nfnet_f0"  # whose checkpoints have 0.9 GB
    if resumes:
        code, *_ = python.run(*train, "--checkpoint-minutes", 0, "--out", tmp_path / "stopped", stop=1)
        assert code == 130

    # its first features are timm's
    mean, std = python.call("before_the_first_step", str(tmp_path / "run"), px, str(tmp_path / "features"))
    assert (tuple(mean), tuple(std)) == (tuple(cfg["mean"]), tuple(cfg["std"]))
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = theirs.forward_features(images)
        expected = [features, theirs.forward_head(features, pre_logits=True)]
    for ours, value in zip(torch.load(tmp_path / "features"), expected, strict=True):
        assert relative_error(ours, value) < 1e-5

    # the weight file has them, and the run resumes without the Hub and its cache
    info = load(tmp_path / "run").info
    assert info is not None
    assert (info.mean, info.std, info.licence) == (tuple(cfg["mean"]), tuple(cfg["std"]), cfg["license"])
    assert (info.class_names, info.eval_crop) == (("blue", "green", "red"), crop)
    if resumes:
        monkeypatch.setattr(client, "fetch", lambda *_: pytest.fail("the Hub was asked"))
        resume(tmp_path / "stopped")
        assert numbers(tmp_path / "stopped", "train") == numbers(tmp_path / "run", "train")
        last = [(tmp_path / folder / "last.safetensors").read_bytes() for folder in ("run", "stopped")]
        assert last[0] == last[1]
    for folder in ("run", "stopped", "hub"):  # gigabytes of the larger networks
        shutil.rmtree(tmp_path / folder, ignore_errors=True)


def test_before_the_first_checkpoint_the_weights_are_read_again(hub, python, photos, tmp_path):
    uri = publish(hub, "timm/early", random_weights("test_nfnet"), tmp_path / "hub")
    train = ("train", photos, "--init", uri, "--steps", 1, "--train-px", 32, "--device", "cpu", "--workers", 0)
    for folder, stop in (("run", -1), ("stopped", 0)):
        python.run(*train, "--out", tmp_path / folder, stop=stop)
    assert not [*(tmp_path / "stopped").glob("checkpoints/*")]
    code, _, err = python.run("train", "--resume", tmp_path / "stopped")
    assert code == 0, err
    last = [(tmp_path / folder / "last.safetensors").read_bytes() for folder in ("run", "stopped")]
    assert last[0] == last[1]


def test_weights_that_cannot_be_used(hub, python, offline, photos, tmp_path):
    """One line each, with the remedy, and no run is left behind."""
    uri = publish(hub, "timm/good", random_weights("test_nfnet"), tmp_path / "hub")
    train = ("train", photos, "--device", "cpu", "--workers", 0, "--out", tmp_path / "run", "--init")
    said = offline.failure(*train, uri)
    assert "HF_HUB_OFFLINE is set and timm/good is not in the cache" in said
    assert said.endswith("unset it")
    assert "holds weights of test_nfnet, not of nfnet_f0" in python.failure(*train, uri, "--model", "nfnet_f0")
    code, _, err = offline.run(*train[:-3], "--out", tmp_path / "cached", "--init", uri, "--steps", 1)
    assert code == 0, err  # it is in the cache now

    none = "hf://timm/nowhere"
    for args in ((*train, none), ("embed", none, photos, "--out", "x.npy"), ("eval", none, photos, "--probe")):
        assert "has no repository timm/nowhere, or it is private: check the name" in python.failure(*args)
    publish(hub, "timm/resnet", timm.create_model("test_resnet"), tmp_path / "resnet")
    said = python.failure(*train, "hf://timm/resnet")
    assert "timm's normalizer-free networks; `normfree models` lists published weights" in said
    hub.repos["a/damaged"] = {"main": {"model.safetensors": b"weights"}}
    assert "model.safetensors is damaged" in python.failure(*train, "hf://a/damaged")

    detector = normfree.create_detector("nfnet_nano", num_classes=2, channels=8, min_px=64, class_names=("cat", "dog"))
    normfree.save(detector, tmp_path / "detector.safetensors")
    said = python.failure(*train, tmp_path / "detector.safetensors")
    assert "detector.safetensors is a detector: use the verbs of `normfree detect`" in said
    publish(hub, "timm/four", random_weights("test_nfnet", in_chans=4), tmp_path / "four")
    assert "takes images of 4 channels; --in-channels 3 adapts it" in python.failure(*train, "hf://timm/four")
    (tmp_path / "one").mkdir()
    (photos / "train" / "red").rename(tmp_path / "one" / "red")
    said = python.failure("train", tmp_path / "one", "--init", uri)
    assert "has one class only, 'red'; a classifier needs at least two" in said
    assert not (tmp_path / "run").exists()
    assert "--resume continues" in python.failure("train", "--resume", tmp_path / "cached", "--init", "hf://timm/four")


@pytest.mark.parametrize(
    ("key", "value"), [("mean", []), ("std", [0, 0, 0]), ("crop_pct", 2), ("input_size", [3, 1.5])]
)
def test_a_config_that_is_not_timms(key, value, hub, python, photos, tmp_path):
    publish(hub, "timm/odd", random_weights("test_nfnet"), tmp_path / "hub")
    files = hub.repos["timm/odd"]["main"]
    config = json.loads(files["config.json"])
    config["pretrained_cfg"][key] = value
    files["config.json"] = json.dumps(config).encode()
    said = python.failure("embed", "hf://timm/odd", photos, "--out", tmp_path / "x.npy")
    assert said == "normfree: hf://timm/odd: its config.json is not one of timm's"


def test_other_numbers_of_channels_and_classes(hub, python, photos, tmp_path):
    """Mean and deviation fit the channels; a classifier of one class, or none, is replaced."""
    sizes = ("--steps", 1, "--train-px", 32, "--device", "cpu", "--workers", 0)
    repos = {"grey": {"in_chans": 1}, "one": {"num_classes": 1}, "none": {"num_classes": 0}}
    for repo, options in repos.items():
        publish(hub, f"timm/{repo}", random_weights("test_nfnet", **options), tmp_path / repo)
    files = hub.repos["timm/grey"]["main"]
    config = json.loads(files["config.json"])
    config["pretrained_cfg"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.5]}  # of the colours, as timm wrote once
    files["config.json"] = json.dumps(config).encode()
    for repo in repos:
        out = tmp_path / f"of_{repo}"
        code, _, err = python.run("train", photos, "--init", f"hf://timm/{repo}", *sizes, "--out", out)
        assert code == 0, err
        assert "the classifier is new: 3 classes, where the file has" in err
    info = load(tmp_path / "of_grey").info
    assert info is not None
    assert (info.in_channels, info.mean, info.std) == (1, pytest.approx((0.4,)), pytest.approx((0.3,)))


def test_features_of_published_weights(hub, python, photos, tmp_path):
    """`embed` and `eval --probe` read addresses and timm's files; the features are timm's."""
    theirs = random_weights("test_nfnet")
    uri = publish(hub, "timm/features", theirs, tmp_path / "hub")
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    features = []
    for i, source in enumerate((uri, tmp_path / "hub" / "model.safetensors", tmp_path / "timm.pth")):
        out = tmp_path / f"{i}.npy"
        code, _, err = python.run("embed", source, photos / "validation", "--out", out, "--device", "cpu")
        assert code == 0, err
        features.append(np.load(out))
        code, said, err = python.run("eval", source, photos, "--probe", "--device", "cpu", "--workers", 0)
        assert code == 0, err
        assert "top-1 on 18 images, 72 training images, 3 classes at 160 px" in said
    assert features[0].shape == (18, theirs.num_features)
    for other in features[1:]:
        assert np.array_equal(other, features[0])  # timm's files without config.json are prepared alike
    files = sorted((photos / "validation").glob("*/*.jpg"))
    pixels = torch.stack([EvalTransform(160, "center", 0.95)(Image.open(file)) for file in files])
    with torch.no_grad():
        maps = theirs.forward_features((pixels / 255 - 0.5) / 0.5)
        assert relative_error(torch.from_numpy(features[0]), theirs.forward_head(maps, pre_logits=True)) < 1e-5
    said = python.failure("eval", uri, photos)
    assert "has no class names" in said
    assert said.endswith("--probe needs none")


def test_evaluation_on_other_classes_points_to_the_probe(photos, tmp_path, capsys):
    model = create_model("nfnet_nano", 3, width=(16, 32, 32, 32), group_width=8)
    assert model.info is not None
    none = "none of the classes 'blue', 'green', 'red' is among the 3 of the weights; --probe measures"
    close = "class 'red' is not among the 3 of the weights; did you mean 'reed'?"
    for names, error in {("cat", "cow", "bleu"): none, ("blue", "green", "reed"): close}.items():
        save(model, tmp_path / "w.safetensors", replace(model.info, class_names=names))
        with pytest.raises(SystemExit):
            cli.main(["eval", str(tmp_path / "w.safetensors"), str(photos)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert error in line
