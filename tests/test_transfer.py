"""Fine-tuning: what is trained, when, how fast, and what is chosen for it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_train import numbers, records, small_run

from normfree import cli
from normfree.config import ClassifierOptim, options_of
from normfree.engine.update import LayerRates, Update
from normfree.errors import InputError
from normfree.models import create_model, load, save
from normfree.recipes.small import Asked, Images, Machine, choose
from normfree.recipes.transfer import rule
from normfree.tasks.choice import choose_recipe
from normfree.tasks.classification import build, resume, start

SMALL = dict(width=(16, 32, 32, 32), depth=(1, 2, 1, 1), group_width=8)
SIZES = {"nfnet_nano": SMALL, "nf_resnet50": SMALL | {"group_width": None}, "nf_regnet_b0": {}, "bn_nfnet_f0": SMALL}


def small(name: str, num_classes: int = 3, **options):
    sizes = {key: value for key, value in (SIZES[name] | options).items() if value is not None}
    if "resnet" in name:
        sizes.pop("group_width", None)
    return create_model(name, num_classes, **sizes)


@pytest.fixture
def weights(tmp_path) -> Path:
    """Weights of the network of `small_run`, with other classes."""
    model = create_model("nfnet_nano", 3, width=(16, 32, 32, 32), group_width=8)
    assert model.info is not None
    path = tmp_path / "pretrained.safetensors"
    save(model, path, replace(model.info, class_names=("cat", "cow", "dog"), train_px=16, eval_px=24))
    return path


def tuned(photos: Path, weights: Path, epochs: float = 2, model: dict | None = None, **options):
    """A run of 9 steps an epoch from weights."""
    run = small_run(photos, epochs=epochs)
    run = replace(run, model=replace(run.model, init=str(weights), **(model or {})))
    return replace(run, optim=replace(run.optim, warmup_epochs=0.0, **options))


@pytest.mark.parametrize("name", SIZES)
def test_layers_are_timms(name):
    """With decay d, timm multiplies the rate of every parameter by the same power of d."""
    factory = pytest.importorskip("timm.optim._param_groups")
    model = small(name)
    theirs = {}
    for group in factory.param_groups_layer_decay(model, layer_decay=0.5):
        theirs |= {id(p): group["lr_scale"] for p in group["params"]}
    rates = LayerRates({p: model.layer_of(key) for key, p in model.named_parameters()}, decay=0.5)
    ours = {key: rates.factor(model.layer_of(key), 0) for key, _ in model.named_parameters()}
    assert ours == {key: theirs[id(p)] for key, p in model.named_parameters()}
    assert sorted(set(ours.values())) == [0.5**k for k in range(sum(len(s) for s in model.stages) + 1, -1, -1)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_by_layer(optimizer):
    """The first step of a parameter is its step at one rate for all, times the factor of its layer."""
    o = ClassifierOptim(optimizer=optimizer, clip="none", clipping=None, weight_decay=0.0)
    steps = []
    for decay in (None, 0.7):
        torch.manual_seed(0)
        model = small("nfnet_nano").double()
        layers = {p: model.layer_of(name) for name, p in model.named_parameters()}
        update = Update(model, o, None if decay is None else LayerRates(layers, decay))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        update.prepare(0)
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        update.step(0, 0.01, torch.zeros((), dtype=torch.bool))
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    last = model.layer_of("head.fc.weight")
    for name, step in steps[0].items():
        assert step.abs().max() > 0, name
        torch.testing.assert_close(steps[1][name], step * 0.7 ** (last - model.layer_of(name)), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["nfnet_nano", "bn_nfnet_f0"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_head_changes_the_head_alone(photos, tmp_path, name, optimizer):
    """Running averages stay as they are, too; the features are those of evaluation."""
    model = small(name, stochastic_depth=0.5)
    assert model.info is not None
    save(model, tmp_path / "w.safetensors", replace(model.info, class_names=("red", "green", "x")))
    sizes = dict(model=name, width=SMALL["width"], depth=SMALL["depth"], group_width=8, stochastic_depth=0.5)
    options: dict = {"clip": "none", "clipping": None} if name.startswith("bn_") else {}
    run = tuned(photos, tmp_path / "w.safetensors", model=sizes, tune="head", optimizer=optimizer, **options)
    run = replace(run, data=replace(run.data, train_px=32, eval_px=32))
    start(run, tmp_path / "run")
    before, after = load(tmp_path / "w.safetensors").state_dict(), load(tmp_path / "run").state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"head.fc.weight", "head.fc.bias"}

    task = build(run).task
    x = torch.randn(2, 3, 32, 32)
    task.model.train()
    assert task.model.head.training
    with torch.no_grad():
        first, again = task.model.forward_features(x), task.model.forward_features(x)
    assert torch.equal(first, again)


def test_gradual_trains_the_head_first(photos, weights, tmp_path):
    """Nothing else moves for `head_epochs`; then its rate rises over as many; a resumed run is the same."""
    run = tuned(photos, weights, epochs=3, tune="gradual", head_epochs=1.0, ema_decay=0.0)
    run = replace(run, machine=replace(run.machine, checkpoint_minutes=0.0))
    job = build(run)
    seen: list[dict[str, torch.Tensor]] = []
    step = job.update.step

    def watched(*args):
        step(*args)
        seen.append({name: p.detach().clone() for name, p in job.task.model.named_parameters()})

    job.update.step = watched  # type: ignore[method-assign]
    from normfree.engine.run import start as start_job

    start_job(job, tmp_path / "run")
    first = load(weights).state_dict()
    body = [name for name in seen[0] if not name.startswith("head.")]
    for state in seen[:9]:
        assert all(torch.equal(state[name], first[name]) for name in body)
    assert not torch.equal(seen[8]["head.fc.weight"], seen[0]["head.fc.weight"])
    moved = {name for name in body if not torch.equal(seen[9][name], first[name])}
    assert "stages.1.0.conv1.weight" in moved
    assert moved >= {name for name in body if name.endswith("weight")}

    rates = job.update.rates
    assert rates is not None
    assert [rates.factor(0, step) for step in (0, 8, 9, 13, 17, 30)] == pytest.approx([0, 0, 1 / 9, 5 / 9, 1, 1])
    assert {rates.factor(rates.head, step) for step in range(27)} == {1.0}

    for stop in (5, 12):  # in each of the two parts
        folder = tmp_path / f"stopped{stop}"
        job = build(run)
        held = job.update.step

        def failing(number, *args, held=held, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            held(number, *args)

        job.update.step = failing  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            start_job(job, folder)
        assert len(records(folder, "train")) == stop
        resume(folder)
        assert (folder / "last.safetensors").read_bytes() == (tmp_path / "run" / "last.safetensors").read_bytes()
        assert numbers(folder, "train") == numbers(tmp_path / "run", "train")


def test_a_run_has_the_rates_of_its_options(photos, weights):
    assert build(tuned(photos, weights)).update.rates is None
    for decay in (0.5, 0.8):
        rates = build(tuned(photos, weights, layer_decay=decay)).update.rates
        assert rates is not None
        assert [rates.factor(layer, 0) for layer in (rates.head, rates.head - 1, 0)] == [1, decay, decay**rates.head]


def test_a_new_head_is_not_clipped(photos, weights):
    groups = build(tuned(photos, weights)).update.optimizer.param_groups
    unclipped = [p.shape for group in groups for p in group["params"] if group["clipping"] is None]
    assert sorted(map(tuple, unclipped)) == [(3,), (3, 64)]


IMAGES = Images(3000, ("shirt", "hat"), 300, grey=False, num_validation=300)
CPU = Machine("cpu", 16.0)
F0 = Asked("nfnet_f0", 192, 256, 3, "resize_crop", 1.0)
MICRO = Asked("nfnet_micro", 56, 64, 3, "center", 0.9)


def chosen(asked: Asked, images: Images = IMAGES, **given):
    given = {"path": "photos", "init": "w"} | given
    run, reasons = choose(given, images, CPU, asked, None, partial(rule, tune=given.get("tune", "all")))
    run.check()
    return options_of(run), [reason.text for reason in reasons]


def test_the_weights_decide_pixels_and_crop():
    options, reasons = chosen(MICRO)
    assert (options["model"], options["train_px"], options["eval_px"]) == ("nfnet_micro", 56, 64)
    assert (options["eval_crop"], options["crop_fraction"]) == ("center", 0.9)
    assert any("--init w: nfnet_micro, 56 px in training, 64 px in evaluation" in reason for reason in reasons)
    assert any("fine-tuning, with crops of at least 35 % of the image, weight decay 1e-05" in r for r in reasons)
    assert chosen(MICRO, crop_style="shift")[0]["min_area"] == 0.08
    options, _ = chosen(F0)
    assert (options["drop_rate"], options["stochastic_depth"]) == (0.25, 0.1)
    assert options["lr"] == pytest.approx(0.1 * 32 / 256 / 8)
    assert chosen(F0, drop_rate=0.5)[0]["drop_rate"] == 0.5
    assert (options["train_px"], options["eval_px"], options["eval_crop"]) == (192, 256, "resize_crop")
    small_images = replace(IMAGES, short_px=32)
    assert chosen(MICRO, images=small_images)[0]["train_px"] == 56


def test_what_is_given_is_obeyed_and_followed():
    usual, _ = chosen(MICRO)
    for name, value in {"lr": 0.5, "epochs": 7, "weight_decay": 0.1, "batch_size": 8, "min_area": 0.9}.items():
        assert chosen(MICRO, **{name: value})[0][name] == value
    assert chosen(MICRO, batch_size=usual["batch_size"] // 2)[0]["lr"] == pytest.approx(usual["lr"] / 2)
    assert chosen(MICRO, train_px=112)[0]["eval_px"] == 128
    assert chosen(F0, crop_fraction=0.9)[0]["eval_crop"] == "center"
    assert chosen(F0, eval_crop="center")[0]["crop_fraction"] == 1.0
    with pytest.raises(InputError, match=r"--crop-fraction 0\.9 does nothing with --eval-crop resize_crop"):
        chosen(MICRO, crop_fraction=0.9, eval_crop="resize_crop")
    options, reasons = chosen(MICRO, tune="gradual", epochs=10)
    assert options["head_epochs"] == 2
    assert any("the classifier alone in the first 2 epochs" in reason for reason in reasons)
    with pytest.raises(InputError, match="--head-epochs 2 has no effect without --tune gradual"):
        chosen(MICRO, head_epochs=2)


def quick(*args: object) -> None:
    cli.main([*map(str, args), "--device", "cpu", "--workers", "0"])


def failure(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as error:
        cli.main([*map(str, args)])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_bad_input(photos, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ("train", photos, "--init", weights)
    assert "--freeze and --tune gradual: give one of them" in failure(capsys, *train, "--freeze", "--tune", "gradual")
    assert "--tune head is for pre-trained weights: add --init" in failure(capsys, "train", photos, "--tune", "head")
    assert "--head-epochs 2.0 has no effect" in failure(capsys, *train, "--head-epochs", 2, "--epochs", 4)
    assert "layer-decay 1.5: more than 0" in failure(capsys, *train, "--layer-decay", 1.5)
    assert "--layer-decay 0.5 has no effect with --tune head" in failure(
        capsys, *train, "--tune", "head", "--layer-decay", 0.5
    )
    said = failure(capsys, *train, "--tune", "gradual", "--head-epochs", 3, "--epochs", 2)
    assert "--head-epochs 3 leave none of 16 steps" in said
    assert f"--init {weights} needs images to train on" in failure(capsys, "train", "--init", weights)
    assert "no weight file" in failure(capsys, "train", photos, "--init", tmp_path / "none")
    said = failure(capsys, *train, "--model", "nfnet_f0")
    assert f"{weights} holds weights of nfnet_nano, not of nfnet_f0" in said
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_brings_its_data(photos, weights, tmp_path, capsys, monkeypatch):
    """Its split, too, so that no image that is held out was trained on; the test resolution is tuned in one command."""
    monkeypatch.chdir(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for folder in (photos / "train").iterdir():
        folder.rename(flat / folder.name)
    first = tmp_path / "first"
    quick("train", flat, "--init", weights, "--steps", 4, "--seed", 5, "--validation-fraction", 0.25, "--out", first)
    said = capsys.readouterr()
    assert "140 of 142 tensors, 35,535 parameters, are taken over; 195 parameters of the classifier are new" in said.err
    quick("train", "--init", first, "--tune", "head", "--train-px", 24, "--steps", 3, "--out", tmp_path / "second")
    said = capsys.readouterr()
    assert "were trained on" not in said.err
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["data"]["path"] == str(flat)
    assert (config["data"]["validation_fraction"], config["seed"]) == (0.25, 5)
    assert (config["data"]["train_px"], config["optim"]["tune"]) == (24, "head")
    assert "the classifier keeps its rows for 3 of 3 classes" in said.err
    quick("train", flat, "--init", first, "--seed", 6, "--steps", 3, "--out", tmp_path / "third")
    assert "validation images, or more: the accuracy will be too high" in capsys.readouterr().err
    said = failure(capsys, "train", flat, "--init", first, "--resume", first)
    assert "--resume continues" in said


def test_photographs_hear_of_weights(photos, tmp_path):
    """From scratch, and where the images are large enough to be photographs."""
    large = replace(IMAGES, short_px=200)
    _, reasons = choose({"path": "my photos"}, large, CPU)
    assert any("normfree train 'my photos' --init hf://timm/" in reason.text for reason in reasons)
    _, reasons = choose({"path": "photos"}, replace(IMAGES, short_px=32), CPU)
    assert not any("--init" in reason.text for reason in reasons)


def test_classes_that_are_spelled_differently(photos, weights, capsys):
    model = load(weights)
    assert model.info is not None
    save(model, weights, replace(model.info, class_names=("Red", "cow", "gre-en")))
    (line,) = [note for note in build(tuned(photos, weights)).notes if "classifier is new" in note]
    assert line.endswith("spelled differently: green (gre-en in the file), red (Red in the file)")


def test_measured_speed_is_of_what_is_trained(photos, weights):
    """The choice may measure; it leaves no trace in the network that is trained."""
    given = {"path": str(photos), "init": str(weights), "device": "cpu", "tune": "head", "epochs": 1.0}
    run, _, read = choose_recipe(None, given)
    assert read is not None
    assert run.optim.tune == "head"
    model = build(run, read).task.model
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.fc.weight", "head.fc.bias"}
