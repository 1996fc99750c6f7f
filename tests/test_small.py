"""What `normfree train` chooses when nothing is said."""

import json
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from normfree.cli import main
from normfree.config import DataConfig, MachineConfig, ModelConfig, OptimConfig, RunConfig, validate
from normfree.engine.evaluate import Accuracy
from normfree.recipes.small import Images, Machine, choose, reasons_that_hold, shorten
from normfree.tasks.classification import build, images_per_second

CPU = Machine("cpu", 16)
COLOURS = ("blue", "green", "red")


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("num_train", [4, 40, 3_000, 50_000, 1_300_000])
@pytest.mark.parametrize("short_px", [8, 28, 32, 63, 64, 128, 500])
@pytest.mark.parametrize("grey", [True, False])
def test_every_choice_can_be_run(device, num_train, short_px, grey):
    run, reasons = choose("data", Images(num_train, COLOURS, short_px, grey), Machine(device, 16))
    validate(run)
    assert run.data.path == "data"
    assert run.optim.batch_size <= num_train
    assert run.data.train_px <= run.data.eval_px
    assert run.model.in_channels == (1 if grey else 3)
    assert run.optim.balance == 0
    assert [reason.text for reason in reasons] == reasons_that_hold(run, run, reasons)


def test_a_large_network_needs_many_large_images_and_a_gpu():
    many = Images(100_000, COLOURS, 300, False)
    assert choose("", many, Machine("cuda", 80))[0].model.model == "nfnet_f0"
    for images, machine in (
        (many, CPU),
        (replace(many, num_train=10_000), Machine("cuda", 80)),
        (replace(many, short_px=128), Machine("cuda", 80)),
    ):
        assert choose("", images, machine)[0].model.model == "nfnet_micro"
    assert choose("", many, Machine("cuda", 80))[0].optim.micro_batch is None
    assert choose("", many, Machine("cuda", 8))[0].optim.micro_batch == 64


@pytest.mark.parametrize(
    ("names", "flip"),
    [
        ("0 1 2 3", False),
        ("A B C", False),
        ("left right straight", False),
        ("cat dog", True),
        ("a cat dog", True),
        ("left cat", True),
    ],
)
def test_symbols_are_not_mirrored(names, flip):
    run, reasons = choose("", Images(1000, tuple(names.split()), 28, True), CPU)
    assert run.data.flip == flip
    assert any("mirrored" in reason.text for reason in reasons) != flip


def test_a_reason_is_given_only_for_what_stayed():
    run, reasons = choose("", Images(50_000, COLOURS, 32, False, unevenness=40), CPU)
    said = reasons_that_hold(run, run, reasons)
    assert len(said) == len(reasons) == 4
    other = replace(run, optim=replace(run.optim, lr=0.7))
    assert [line for line in said if line not in reasons_that_hold(run, other, reasons)] == [said[1]]
    assert "batches of" in said[1]


def test_a_slow_machine_takes_fewer_epochs_and_says_so():
    for grey, minutes, seen in ((False, 30, 50_000), (True, 10, 60_000)):
        images = Images(seen, COLOURS, 32, grey)
        run, reasons = choose("", images, CPU)
        assert shorten(run, reasons, images, 1e6) == (run, reasons)
        shorter, why = shorten(run, reasons, images, seen / 100)  # 100 s an epoch
        assert shorter.optim.epochs == int(0.72 * minutes * 60 / 100) < run.optim.epochs
        assert shorter.optim.warmup_epochs == min(1, shorter.optim.epochs / 10)
        assert replace(shorter, optim=run.optim) == run
        assert f"{shorter.optim.epochs} epochs: what {minutes} minutes allow" in why[-1].text
        assert len(why) == len(reasons)
        validate(shorten(run, reasons, images, 1)[0])


def test_speed_is_measured_without_a_trace():
    state = torch.get_rng_state()
    run, _ = choose("", Images(500, COLOURS, 32, False), CPU)
    assert 1 < images_per_second(run, 3, enough=0) < 1e6
    assert torch.equal(state, torch.get_rng_state())


def test_names_of_options_are_unique():
    """`Reason` and the command line tell them apart by their last names."""
    names = Counter(f.name for part in (ModelConfig, DataConfig, OptimConfig, MachineConfig) for f in fields(part))
    assert max(names.values()) == 1


def test_classes_count_alike_whatever_their_images():
    confusion = torch.tensor([[90, 10, 0], [3, 1, 0], [0, 0, 0]])
    assert Accuracy(confusion).balanced_percent == pytest.approx(100 * (0.9 + 0.25) / 2)
    assert Accuracy(confusion).top1_percent == pytest.approx(100 * 91 / 104)
    assert Accuracy(torch.zeros(3, 3, dtype=torch.int64)).balanced_percent == 0


@pytest.fixture
def uneven(tmp_path):
    """24 pictures of one class, 2 of the other, and a third that has none to validate on."""
    rng = np.random.default_rng(0)
    for name, count in (("many", 26), ("few", 2), ("one", 1)):
        for i in range(count):
            path = tmp_path / "uneven" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "uneven"


def test_training_adds_the_logarithm_of_each_class_share(uneven):
    run = RunConfig(
        ModelConfig(width=(16, 16, 16, 16), depth=(1, 1, 1, 1), group_width=8, stochastic_depth=0.0, drop_rate=0.0),
        DataConfig(str(uneven)),
        OptimConfig(batch_size=4, balance=0.5, label_smoothing=0.0),
        MachineConfig(device="cpu", workers=0),
    )
    task, _, _, plan = build(run)
    assert plan.metric == "balanced"
    batch = next(task.batches(0, 1))
    shares = torch.tensor(task.train_set.targets).bincount() / len(task.train_set)
    task.log_priors, priors = None, task.log_priors
    assert torch.equal(priors, 0.5 * shares.log())
    seen = []
    task.model.register_forward_hook(lambda module, args, out: seen.append(out))
    without = task.loss(batch)
    task.log_priors = priors
    loss = task.loss(batch)
    assert loss != without
    assert torch.allclose(loss, F.cross_entropy(seen[-1] + priors, batch.targets))


def test_uneven_and_tiny_sets_are_handled_and_said(uneven, tmp_path, capsys):
    small = "--width 16 16 16 16 --group-width 8 --epochs 1 --warmup-epochs 0 --device cpu --workers 0"
    main(["train", str(uneven), *small.split(), "--out", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    for said in (
        "chosen   nfnet_nano at 28 px: 26 images in colour, short side 20 px, on cpu",
        "chosen   classes count alike: the largest has 24 times the images of the smallest",
        "chosen   batches of 3, learning rate",
        "note     it has no validation images",
        "note     uneven classes",
        "note     1 of 3 classes have no validation images: 'one'",
        "note     few validation images",
        "time     about 0:",
    ):
        assert said in err
    assert "epochs: " not in err  # what the user has said needs no reason
    assert "validation mean over classes" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["optim"]["balance"], config["optim"]["batch_size"]) == (1.0, 3)
