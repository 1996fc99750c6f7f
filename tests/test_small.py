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
from normfree.config import (
    ClassificationRun,
    ClassifierOptim,
    DataConfig,
    MachineConfig,
    ModelConfig,
    options_of,
    spell,
    with_options,
)
from normfree.engine.loop import Shard
from normfree.errors import InputError
from normfree.models import find_variant, list_models
from normfree.recipes import RECIPES
from normfree.recipes.small import Asked, Images, Machine, choose
from normfree.tasks.accuracy import Accuracy
from normfree.tasks.choice import choose_recipe, image_mib, images_per_second, network
from normfree.tasks.classification import build

CPU = Machine("cpu", 16)
COLOURS = ("blue", "green", "red")


PHOTOS = Images(3_000, COLOURS, 128, False, num_validation=300)


def cpu(images_per_s: float = 1e6, image_mib: float = 1) -> Machine:
    """A CPU with 16 GiB on which every run fares like this."""
    return replace(CPU, images_per_s=lambda run, enough: images_per_s, image_mib=lambda run: image_mib)


def asked(name: str) -> Asked:
    own = find_variant(name)
    return Asked(name, own.train_px, own.eval_px)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("num_train", [4, 40, 3_000, 50_000, 1_300_000])
@pytest.mark.parametrize("short_px", [8, 28, 32, 63, 64, 128, 500])
@pytest.mark.parametrize("grey", [True, False])
def test_every_choice_can_be_run(device, num_train, short_px, grey):
    run, reasons = choose({"path": "data"}, Images(num_train, COLOURS, short_px, grey), Machine(device, 16))
    run.check()
    assert run.data.path == "data"
    assert run.optim.batch_size <= num_train
    assert run.data.train_px <= run.data.eval_px
    assert run.model.in_channels == (1 if grey else 3)
    assert run.optim.balance == 0
    assert not any("because" in reason.text for reason in reasons)


def test_a_large_network_needs_many_large_images_and_a_gpu():
    many = Images(100_000, COLOURS, 300, False)
    assert choose({}, many, Machine("cuda", 80))[0].model.model == "nfnet_f0"
    for images, machine in (
        (many, CPU),
        (replace(many, num_train=10_000), Machine("cuda", 80)),
        (replace(many, short_px=128), Machine("cuda", 80)),
    ):
        assert choose({}, images, machine)[0].model.model == "nfnet_micro"
    assert choose({}, many, Machine("cuda", 80))[0].optim.micro_batch is None
    assert choose({}, many, Machine("cuda", 8))[0].optim.micro_batch == 64


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
    run, reasons = choose({}, Images(1000, tuple(names.split()), 28, True), CPU)
    assert run.data.flip == flip
    assert any("mirrored" in reason.text for reason in reasons) != flip


# --- what is given is an input of the choice ---

SETS = (
    PHOTOS,
    Images(50_000, COLOURS, 32, False, unevenness=40, num_validation=5_000),
    Images(40, ("0", "1"), 28, True, num_validation=4),
    Images(100_000, COLOURS, 300, False, num_validation=10_000),
)
GIVEN = (
    {"model": "nfnet_f0"},
    {"model": "nfnet_nano"},
    {"model": "nfnet_micro"},
    {"model": "bn_resnet50", "batch_size": 16},
    {"train_px": 48},
    {"eval_px": 48},
    {"model": "nf_resnet26", "train_px": 64},
    {"batch_size": 8},
    {"batch_size": 128, "lr": 0.01},
    {"epochs": 1.0},
    {"steps": 5},
    {"warmup_epochs": 3.0},
    {"crop_style": "pil"},
    {"crop_style": "shift"},
    {"min_area": 0.5},
    {"flip": True, "balance": 0.0, "eval_every": 1.0},
    {"lr": 0.3, "clipping": None, "in_channels": 3},
)


@pytest.mark.parametrize("images", SETS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("base", [None, RECIPES["mnist5k"]("mnist5k")])
def test_what_is_given_is_kept_and_what_follows_from_it_is_said(images, device, base):
    machine = Machine(device, 16)
    usual = options_of(choose({}, images, machine, None, base)[0])
    for given in GIVEN:
        run, reasons = choose(given, images, machine, asked(given["model"]) if "model" in given else None, base)
        run.check()
        options = options_of(run)
        assert {name: options[name] for name in given} == given
        assert not given.keys() & {name for reason in reasons for name in reason.options}
        if given.get("model") in ("nfnet_nano", "nfnet_micro"):
            continue  # follow the rules for smaller images or machines as a whole
        different = {name for name, value in options.items() if value != usual[name]} - given.keys()
        for name in different - {"drop_rate", "stochastic_depth", "eval_every", "micro_batch"}:
            if name == "min_area" and options["crop_style"] == "shift":
                continue  # which does not use it
            (text,) = (reason.text for reason in reasons if name in reason.options)
            assert text.startswith("because --"), (given, name)
            assert any(f"{spell(option, value)}" in text for option, value in given.items())


@pytest.mark.parametrize("images", SETS)
def test_giving_what_would_be_chosen_changes_nothing(images):
    for base in (None, RECIPES["mnist5k"]("mnist5k")):
        run, _ = choose({}, images, CPU, None, base)
        for name, value in options_of(run).items():
            if name in ("steps", "warmup_steps", "randaugment_magnitude", "randaugment_style", "sam_fraction"):
                continue  # None, and void without another
            if name == "min_area" and run.data.crop_style == "shift":
                continue  # asks for crops
            network = asked(value) if name == "model" else None
            assert choose({name: value}, images, CPU, network, base)[0] == run, name


@pytest.mark.parametrize("name", list_models())
def test_every_network_can_be_asked_for(name):
    own = find_variant(name)
    for images in (PHOTOS, replace(PHOTOS, short_px=1000), replace(PHOTOS, short_px=28)):
        run, _ = choose({"model": name}, images, CPU, asked(name))
        run.check()
        assert run.model.model == name
        assert run.data.train_px <= run.data.eval_px
        if images.short_px == 1000 and name != "nfnet_micro":
            assert (run.data.train_px, run.data.eval_px) == (own.train_px, own.eval_px)
        assert (run.optim.clipping is None) == name.startswith(("bn_", "nf_regnet"))
        if name not in ("nfnet_nano", "nfnet_micro"):
            assert run.optim.lr == pytest.approx(0.1 * run.optim.batch_size / 256)


def test_pixels_of_a_network_are_limited_by_the_images():
    run, reasons = choose({"model": "nfnet_f0"}, PHOTOS, CPU, asked("nfnet_f0"))
    assert (run.data.train_px, run.data.eval_px) == (96, 128)
    text = "because --model nfnet_f0: 96 px in training, 128 px in evaluation, as the images' short side is 128 px"
    assert reasons[0].text == text
    run, reasons = choose({"model": "nfnet_f0"}, replace(PHOTOS, short_px=400), CPU, asked("nfnet_f0"))
    assert reasons[0].text == "because --model nfnet_f0: 192 px in training, 256 px in evaluation"
    weights = Asked("nfnet_f0", 192, 256, in_channels=3)  # have learned what things look like at this size
    run, _ = choose({"init": "f0.safetensors"}, replace(PHOTOS, grey=True), CPU, weights)
    assert (run.model.model, run.data.train_px, run.data.eval_px, run.model.in_channels) == ("nfnet_f0", 192, 256, 3)


@pytest.mark.parametrize(
    ("given", "train_px", "eval_px"),
    [
        ({}, 80, 112),
        ({"train_px": 64}, 64, 96),
        ({"train_px": 128}, 128, 128),
        ({"eval_px": 64}, 48, 64),
        ({"train_px": 32, "eval_px": 64}, 32, 64),
    ],
)
def test_one_side_follows_the_other(given, train_px, eval_px):
    run, _ = choose(given, PHOTOS, CPU)
    assert (run.data.train_px, run.data.eval_px) == (train_px, eval_px)


def test_rate_and_clipping_follow_the_batch():
    def rates(size, images=PHOTOS, base=None):
        optim = choose({"batch_size": size}, images, CPU, None, base)[0].optim
        return optim.lr, optim.clipping

    assert [rates(size) for size in (8, 32, 64, 512)] == [(0.025, 0.04), (0.1, 0.04), (0.2, 0.1), (0.3, 0.1)]
    many = replace(PHOTOS, num_train=30_000)
    assert [rates(size, many) for size in (32, 64, 128)] == [(0.05, 0.04), (0.1, 0.1), (0.2, 0.1)]
    assert rates(256, base=RECIPES["nfnet_f0"]("x")) == (pytest.approx(0.1), 0.01)  # of a recipe λ stays
    assert rates(2048, base=RECIPES["nf_resnet50_256"]("x")) == (pytest.approx(0.8), 0.16)


def test_a_warm_up_that_is_not_given_shrinks():
    def warmup(given, images=PHOTOS, base=None):
        optim = choose(given, images, CPU, None, base)[0].optim
        steps = images.num_train / optim.batch_size * optim.warmup_epochs
        return steps if optim.warmup_steps is None else optim.warmup_steps

    whole = 3_000 / 32
    assert warmup({}) == warmup({"epochs": 30.0}) == whole
    assert warmup({"epochs": 1.0}) == pytest.approx(whole / 10)
    assert warmup({"steps": 5}) == pytest.approx(0.5)
    assert warmup({"steps": 5, "warmup_steps": 4}) == 4
    assert warmup({"epochs": 1.0, "warmup_epochs": 2.0}) == 2 * whole  # which is refused
    recipe = RECIPES["nfnet_f4_fine_tuning"]("x")  # 5,000 of 15,000 steps
    assert warmup({}, replace(PHOTOS, num_train=1_281_167), recipe) == 5000
    assert warmup({"steps": 300}, PHOTOS, recipe) == 100
    assert choose({"epochs": 3.0}, PHOTOS, CPU, None, recipe)[0].optim.steps is None
    assert warmup({}, PHOTOS, RECIPES["nf_resnet50_pretraining"]("x")) == 3  # a tenth of 29 steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 3.0, "steps": 4}, "--epochs 3 and --steps 4: give one of them"),
        ({"warmup_epochs": 3.0, "warmup_steps": 4}, "--warmup-epochs 3 and --warmup-steps 4"),
        ({"randaugment_magnitude": 9.0}, "--randaugment-magnitude 9 does nothing without --randaugment-layers"),
        ({"sam_fraction": 0.5}, "--sam-fraction 0.5 does nothing without --sam-rho"),
        ({"clipping": None, "clip_eps": 0.1}, "--clip-eps 0.1 does nothing without --clipping"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        choose(given, PHOTOS, CPU)


def test_a_slow_machine_takes_fewer_epochs_and_says_so():
    for grey, minutes, seen in ((False, 30, 50_000), (True, 10, 60_000)):
        images = Images(seen, COLOURS, 32, grey)
        run, reasons = choose({}, images, CPU)
        assert choose({}, images, cpu()) == (run, reasons)
        shorter, why = choose({}, images, cpu(seen / 100))  # 100 s an epoch
        assert shorter.optim.epochs == int(0.72 * minutes * 60 / 100) < run.optim.epochs
        assert shorter.optim.warmup_epochs == min(1, shorter.optim.epochs / 10)
        assert replace(shorter, optim=run.optim) == run
        assert any(f"{shorter.optim.epochs} epochs: what {minutes} minutes allow" in reason.text for reason in why)
        choose({}, images, cpu(1))[0].check()
    _, why = choose({"model": "nfnet_f0"}, PHOTOS, cpu(1), asked("nfnet_f0"))
    assert any("3 epochs, the fewest, take about 3.5 hours at 1 images/s" in reason.text for reason in why)


def test_what_does_not_fit_into_memory_goes_through_in_parts():
    for mib, batch, micro in ((10, 64, None), (200, 64, 32), (1e6, 64, 1), (200, 16, None)):
        run, _ = choose({"batch_size": batch}, PHOTOS, cpu(image_mib=mib))
        assert run.optim.micro_batch == micro
    run, _ = choose({"batch_size": 64, "micro_batch": 64}, PHOTOS, cpu(image_mib=1e6))
    assert run.optim.micro_batch == 64


def test_only_what_costs_is_measured():
    small = Images(50_000, COLOURS, 32, False)
    mnist = RECIPES["mnist5k"]("mnist5k")
    seen = []
    machine = replace(
        CPU,
        images_per_s=lambda run, enough: seen.append(("speed", run.data.train_px)) or 1e6,
        image_mib=lambda run: seen.append(("memory", run.data.train_px)) or 1,
    )
    for given, images, base, speed, memory in (
        ({}, PHOTOS, None, False, False),
        ({"path": "x", "seed": 3}, small, None, True, False),
        ({"epochs": 3.0}, small, None, False, False),
        ({"model": "nfnet_micro", "batch_size": 32}, PHOTOS, None, False, False),
        ({"model": "nfnet_f0"}, PHOTOS, None, True, True),
        ({"train_px": 128, "steps": 3}, PHOTOS, None, False, True),
        ({"batch_size": 64}, PHOTOS, None, False, True),
        ({}, Images(4_000, COLOURS, 28, True), mnist, False, False),
        ({"model": "nfnet_f0", "micro_batch": 2}, PHOTOS, mnist, True, False),
    ):
        seen.clear()
        network = asked(given["model"]) if "model" in given else None
        run, _ = choose({"path": "mnist5k"} | given, images, machine, network, base)
        expected = ["memory"] * memory + ["speed"] * speed
        assert seen == [(what, run.data.train_px) for what in expected], given


def test_evaluations_take_a_small_share_of_the_time():
    def evaluations(images, given=None):
        run, _ = choose(given or {}, images, CPU)
        assert run.machine.eval_every == int(run.machine.eval_every) >= 1
        return run.optim.epochs / run.machine.eval_every

    assert 8 <= evaluations(Images(108, COLOURS, 128, False, num_validation=12)) <= 15
    assert 3 <= evaluations(Images(108, COLOURS, 28, False, num_validation=12)) <= 7
    assert evaluations(PHOTOS) == 16.5
    assert evaluations(Images(45_000, COLOURS, 32, False, num_validation=5_000)) == 28  # every epoch
    assert evaluations(Images(3_000, COLOURS, 128, False, num_validation=10)) <= 30
    assert evaluations(PHOTOS, {"eval_every": 1.0}) == 33
    assert choose({"epochs": 0.2}, PHOTOS, CPU)[0].machine.eval_every == 1


def test_speed_and_memory_are_measured_without_a_trace():
    state = torch.get_rng_state()
    run, _ = choose({}, Images(500, COLOURS, 32, False), CPU)
    with torch.random.fork_rng(devices=[]):
        model = network(run, COLOURS)[0].train()
    assert 1 < images_per_second(model, run, enough=0) < 1e6
    kept = image_mib(model, run)
    assert 0.1 < kept < 10
    larger = image_mib(model, with_options(run, {"train_px": 64}))
    assert larger == pytest.approx(4 * kept, rel=0.2)
    assert torch.equal(state, torch.get_rng_state())


def test_the_network_that_is_given_is_measured(uneven, monkeypatch):
    """At its own pixels and batch; the packaged digits follow, too."""
    seen = []

    def speed(model, run, enough):
        seen.append((model.info.architecture, run.data.train_px, run.optim.batch_size))
        return 0.01

    monkeypatch.setattr("normfree.tasks.choice.images_per_second", speed)
    given = {"path": str(uneven), "model": "nf_resnet26", "train_px": 64, "device": "cpu"}
    run, reasons, _ = choose_recipe(None, given)
    assert seen == [("nf_resnet26", 64, 3)]
    assert run.optim.epochs == 3
    assert any("3 epochs, the fewest" in reason.text for reason in reasons)
    run, *_ = choose_recipe(None, {"path": "mnist5k", "model": "nfnet_micro", "device": "cpu"})
    assert seen[1:] == [("nfnet_micro", 48, 32)]
    assert (run.data.train_px, run.data.eval_px, run.optim.epochs, run.data.flip) == (48, 64, 3, False)


def test_names_of_options_are_unique():
    """`Reason` and the command line tell them apart by their last names."""
    names = Counter(f.name for part in (ModelConfig, DataConfig, ClassifierOptim, MachineConfig) for f in fields(part))
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"optimizer": "adamw"}, {"lr": 0.001 * 0.125**0.5, "weight_decay": 0.05, "clipping": 0.04}),
        ({"optimizer": "adamw", "lr": 0.002}, {"lr": 0.002, "weight_decay": 0.05}),
        ({"optimizer": "adamw", "batch_size": 64}, {"lr": 0.0005, "clipping": 0.1}),
        ({"clip": "norm"}, {"clipping": 1.0, "lr": 0.1}),
        ({"clip": "norm", "clipping": 3.0}, {"clipping": 3.0}),
        ({"clip": "none"}, {"clipping": None}),
        ({"clip": "agc", "model": "bn_resnet50"}, {"clipping": None}),
    ],
)
def test_optimizer_and_clipping_bring_what_goes_with_them(given, expected):
    network = asked(given["model"]) if "model" in given else None
    run, reasons = choose(given, Images(3000, ("a", "b"), 128, False), cpu(1000), network)
    run.check()
    options = options_of(run)
    assert {name: options[name] for name in expected} == pytest.approx(expected)
    if "optimizer" in given:
        text = next(reason.text for reason in reasons if "weight_decay" in reason.options)
        assert text.startswith("because --optimizer adamw")


def test_clip_options_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match=r"--clipping 0\.1 has no effect with --clip none"):
        choose_recipe(None, {"path": "mnist5k", "clip": "none", "clipping": 0.1})
    with pytest.raises(InputError, match=r"--clip-eps 0\.1 has no effect with --clip norm"):
        choose_recipe(None, {"path": "mnist5k", "clip": "norm", "clip_eps": 0.1})


def test_training_adds_the_logarithm_of_each_class_share(uneven):
    run = ClassificationRun(
        ModelConfig(width=(16, 16, 16, 16), depth=(1, 1, 1, 1), group_width=8, stochastic_depth=0.0, drop_rate=0.0),
        DataConfig(str(uneven)),
        ClassifierOptim(batch_size=4, balance=0.5, label_smoothing=0.0),
        MachineConfig(device="cpu", workers=0),
    )
    task = build(run).task
    assert task.metric == "balanced"
    batch = next(task.batches(range(1), Shard()))
    shares = torch.tensor(task.train_set.targets).bincount() / len(task.train_set)
    task.log_priors, priors = None, task.log_priors
    assert torch.equal(priors, 0.5 * shares.log())
    seen = []
    task.model.register_forward_hook(lambda module, args, out: seen.append(out))
    without = task.loss(task.model, batch)["loss"]
    task.log_priors = priors
    loss = task.loss(task.model, batch)["loss"]
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
