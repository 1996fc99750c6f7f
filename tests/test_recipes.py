"""Recipes: the networks that they name, and two real steps of each."""

import json
from dataclasses import replace

import pytest
from test_models import LADDER, counts, on_meta

from normfree.models import find_variant
from normfree.recipes import RECIPES, imagenet
from normfree.tasks.classification import start

RUNGS = list(imagenet.LADDER)


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
    run = RECIPES["nfnet_f2_second_conv"]("imagenet")
    assert (run.optim.epochs, run.optim.batch_size, run.optim.lr, run.optim.warmup_epochs) == (360, 4096, 1.6, 5)
    assert (run.optim.clipping, run.optim.weight_decay, run.optim.label_smoothing) == (0.01, 2e-5, 0.1)
    assert run.optim.ema_decay == 0.99999
    assert run.precision == "bfloat16"
    assert RECIPES["nfnet_f2_bn"]("imagenet").optim.clipping is None


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
    run = replace(
        run,
        model=replace(run.model, width=width, group_width=8),
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
