"""Recipes: the networks that they name, and two real steps of each."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import COLOURS, draw
from test_models import LADDER, counts, on_meta

from normfree.config import options_of
from normfree.data import open_dataset
from normfree.data.pack import pack
from normfree.engine.loop import Shard
from normfree.errors import InputError
from normfree.layers import StochasticDepth
from normfree.models import find_variant
from normfree.recipes import RECIPES, imagenet
from normfree.tasks.choice import choose_recipe
from normfree.tasks.classification import build, start

RUNGS = list(imagenet.LADDER)
GROUPS = {"group_width": 8}


@pytest.mark.parametrize("size", range(4))
def test_the_rungs_are_the_papers_networks(size):
    """Parameters and multiply-adds at the test pixels; the BN rung differs in its norms' parameters only."""
    px = find_variant(f"nfnet_f{size}").eval_px

    def rung(name: str) -> tuple[float, float]:
        model = RECIPES[f"nfnet_f{size}_{name}"]("imagenet").model
        return counts(on_meta(model.model, **model.overrides()), px)

    final = counts(on_meta(f"nfnet_f{size}"), px)
    assert [rung(name) for name in ("baseline", "modified_width", "default_width")] == LADDER[f"nfnet_f{size}"]
    assert rung("second_conv") == final
    params, macs = rung("bn")
    assert macs == final[1]
    assert params == pytest.approx(final[0], rel=2e-3)


def test_the_papers_schedule():
    """Appendix A.1 to A.3, Table 1."""
    magnitudes = []
    for size in range(8):
        run = RECIPES[f"nfnet_f{size}"]("imagenet")
        assert (run.optim.epochs, run.optim.batch_size, run.optim.lr, run.optim.warmup_epochs) == (360, 4096, 1.6, 5)
        assert (run.optim.clipping, run.optim.weight_decay, run.optim.label_smoothing) == (0.01, 2e-5, 0.1)
        assert (run.optim.ema_decay, run.precision, run.data.eval_crop) == (0.99999, "bfloat16", "resize_crop")
        assert (run.data.mixup, run.data.cutmix, run.data.randaugment_layers) == (0.2, 1, 4)
        assert run.data.randaugment_style == run.data.crop_style == "paper"
        magnitudes.append(run.data.randaugment_magnitude)
    assert magnitudes == [5, 10, 10, 15, 15, 15, 15, 15]
    steps = round(run.optim.epochs * 1_281_167 / run.optim.batch_size)
    assert steps == 112_603  # published: 112,602, which cuts off


def test_the_ladder_adds_one_thing_after_another():
    for size in range(4):
        runs = {rung: RECIPES[f"nfnet_f{size}_{rung}"]("imagenet") for rung in RUNGS}
        assert runs["cutmix"] == RECIPES[f"nfnet_f{size}"]("imagenet")
        kinds = [
            (run.data.mixup > 0, run.data.randaugment_layers > 0, run.data.cutmix > 0)
            for run in (runs[rung] for rung in ("second_conv", "mixup", "randaugment", "cutmix"))
        ]
        assert kinds == [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
        assert runs["default_width"].data == runs["bn"].data == runs["cutmix"].data
        assert runs["bn"].optim.clipping is None


def test_batch_sizes_scale_the_rate():
    for batch, rate in ((256, 0.1), (512, 0.2), (1024, 0.4), (2048, 0.8), (4096, 1.6)):
        for kind in ("nf", "bn"):
            run = RECIPES[f"{kind}_resnet50_{batch}"]("imagenet")
            assert (run.optim.batch_size, run.optim.lr, run.optim.epochs) == (batch, pytest.approx(rate), 90)
            assert (run.optim.clipping is None) == (kind == "bn")


RESNETS = [f"{kind}_resnet{depth}" for kind in ("nf", "bn") for depth in (50, 101, 152, 200)]
NO_AUGMENTATION = dict(mixup=0.0, cutmix=0.0, randaugment_layers=0, flip=True, min_area=0.08, crop_style="paper")
ANYWHERE = dict(optimizer="sgd", momentum=0.9, final_lr=0.0, tune="all", freeze=False, precision="bfloat16")


def options(recipe: str) -> dict:
    return options_of(RECIPES[recipe]("images"))


@pytest.mark.parametrize("name", RESNETS)
def test_the_papers_transfer_of_resnets(name):
    """Section 6.2, appendix A.5, Table 4: 10 epochs on JFT-300M at 224 px, then 15,000 steps on ImageNet."""
    before, after = options(f"{name}_pretraining"), options(f"{name}_fine_tuning")
    shared = ANYWHERE | NO_AUGMENTATION | {"model": name, "warmup_steps": 5000, "sam_rho": 0.0}
    shared |= {"clipping": 0.01 if name.startswith("nf") else None}
    assert before.items() >= (shared | {"epochs": 10, "steps": None, "batch_size": 1024, "lr": 0.4}).items()
    assert before.items() >= {"weight_decay": 1e-5, "ema_decay": 0.0, "train_px": 224, "eval_px": 224}.items()
    assert after.items() >= (shared | {"steps": 15_000, "batch_size": 2048, "lr": 0.1, "weight_decay": 0.0}).items()
    assert after.items() >= {"ema_decay": 0.9999, "train_px": 384, "eval_px": 384}.items()
    model = on_meta(name, **RECIPES[f"{name}_fine_tuning"]("images").model.overrides())
    assert model.head.drop.p == 0
    assert all(module.rate == 0 for module in model.modules() if isinstance(module, StochasticDepth))


@pytest.mark.parametrize(("name", "epochs"), [("nfnet_f4", 40), ("nfnet_f4_plus", 20)])
def test_the_papers_transfer_of_nfnets(name, epochs):
    """Section 6.2, appendix A.5, Table 5."""
    before, after = options(f"{name}_pretraining"), options(f"{name}_fine_tuning")
    shared = ANYWHERE | NO_AUGMENTATION | {"model": name, "clipping": 0.01}
    as_on_imagenet = {"batch_size": 4096, "lr": 1.6, "warmup_epochs": 5, "warmup_steps": None, "ema_decay": 0.99999}
    assert before.items() >= (shared | as_on_imagenet | {"epochs": epochs, "weight_decay": 1e-6}).items()
    assert before.items() >= {"train_px": 224, "eval_px": 224, "sam_rho": 0.0, "steps": None}.items()
    tuned = {"steps": 15_000, "batch_size": 2048, "lr": 0.1, "warmup_steps": 5000, "weight_decay": 1e-5}
    tuned |= {"sam_rho": 0.05, "drop_rate": 0.25, "stochastic_depth": 0.1}
    assert after.items() >= (shared | tuned).items()
    assert find_variant(name).eval_px == 512  # 367 G multiply-adds of F4+ are at this resolution


def test_fine_tuning_needs_weights(photos):
    with pytest.raises(
        InputError, match="--recipe nf_resnet50_fine_tuning starts from pre-trained weights: add --init"
    ):
        choose_recipe("nf_resnet50_fine_tuning", {"path": str(photos), "device": "cpu"})


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_valid_and_names_a_network(name):
    run = RECIPES[name]("imagenet")
    run.check()
    on_meta(run.model.model, **run.model.overrides())


@pytest.mark.parametrize("name", ["nf_regnet_b0", "nf_resnet50_256", "bn_resnet50_256", "nfnet_f4_plus_fine_tuning"])
def test_other_recipes_take_two_steps(name, photos, tmp_path):
    run = RECIPES[name](str(photos))
    steps = {} if run.optim.steps is None else {"steps": 2, "warmup_steps": 1}
    run = replace(run, optim=replace(run.optim, **steps))
    take_two_steps(replace(run, model=replace(run.model, depth=(1, 1, 1, 1))), tmp_path)


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_takes_two_steps(rung, photos, tmp_path):
    """At reduced size: a sixteenth of the widths, pictures of 32 px."""
    take_two_steps(RECIPES[f"nfnet_f0_{rung}"](str(photos)), tmp_path)


def test_sam_takes_two_steps(photos, tmp_path):
    run = RECIPES["nfnet_f6_sam"](str(photos))
    assert (run.model.model, run.optim.sam_rho, run.optim.sam_fraction) == ("nfnet_f6", 0.05, 0.2)
    take_two_steps(replace(run, model=replace(run.model, depth=(1, 1, 1, 1))), tmp_path)


def take_two_steps(run, tmp_path):
    width = tuple(side // 16 for side in run.model.width or (256, 512, 1536, 1536))
    groups = {} if "resnet" in run.model.model else {"group_width": 8}
    run = replace(
        run,
        model=replace(run.model, width=width, **groups),
        data=replace(run.data, train_px=32, eval_px=32),
        optim=replace(run.optim, epochs=2, batch_size=36, lr=0.1, warmup_epochs=1),
        machine=replace(run.machine, log_every=1, workers=0),
        precision="float32",
    )
    start(run, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) >= 2
    assert all(0 < step["loss"] < 10 for step in steps)
    if run.optim.clipping is not None:
        assert {"agc_stem", "agc_stages.0", "agc_stages.3", "agc_head"} <= steps[0].keys()
        assert all(0 <= value <= 1 for key, value in steps[0].items() if key.startswith("agc_"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same pictures as a folder, as tar shards and as tables, of one folder name: three classes, 12 + 2 of each."""
    datasets = pytest.importorskip("datasets")
    folder, shards, tables = (tmp_path_factory.mktemp(name) for name in ("folder", "shards", "tables"))
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(14):
            draw(folder / ("validation" if i < 2 else "train") / name / f"{i:02d}.jpg", colour, 100 * c + i)
    pack(str(folder), str(shards / "packed"), shard_mb=0.02)
    assert len(list((shards / "packed").glob("train-*.tar"))) > 1
    for part, images in zip(("train", "validation"), open_dataset(str(folder)), strict=True):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(images.class_names)))
        rows = {"image": [{"path": images.source(i)} for i in range(len(images))], "label": list(images.targets)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tables / f"{part}.parquet"))
    return str(folder), str(shards / "packed"), str(tables)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_takes_two_steps_from_folder_shards_and_tables(name, sources):
    """At reduced size, one block a stage, from one seed: the losses of all three are the same to the bit."""
    losses = [two_losses(RECIPES[name](path)) for path in sources]
    assert losses[0] == losses[1] == losses[2]
    assert all(0 < loss < 10 for loss in losses[0])
    assert losses[0][0] != losses[0][1]


def two_losses(run):
    narrow = {"width": (16, 16, 32, 32), "depth": (1, 1, 1, 1)} | ({} if "resnet" in run.model.model else GROUPS)
    run = replace(
        run,
        model=replace(run.model, **narrow),
        data=replace(run.data, train_px=32, eval_px=32),
        optim=replace(run.optim, epochs=2, steps=None, batch_size=12, lr=0.1, warmup_epochs=0, warmup_steps=None),
        machine=replace(run.machine, workers=0, device="cpu"),
        precision="float32",
    )
    job = build(run)
    task, update = job.task, job.update
    task.model.train()
    losses = []
    for step, batch in enumerate(task.batches(range(2), Shard())):
        torch.manual_seed(step)
        update.optimizer.zero_grad()
        loss = task.loss(task.model, batch)["loss"]
        loss.backward()
        update.step(step, job.plan.lr_at(step), hold=torch.tensor(False))
        assert update.optimizer.stats.max_ratio.isfinite()
        losses.append(loss.item())
    return losses
