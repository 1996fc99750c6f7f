"""`--on-nonfinite skip`: a step that is not finite is not made, and the run goes on as if only its update lacked."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_engine import interrupted, new
from test_train import numbers, records, same_run, small_run

from normfree.config import ClassificationRun, with_options
from normfree.engine import loop
from normfree.engine.loop import Diverged, train
from normfree.optim.ema import EMA, blend_
from normfree.tasks.classification import build, resume, start

LAYER = "stages.2.0.conv0.weight"
OPTIONS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "sam, micro-batches, norm": {"sam_rho": 0.05, "micro_batch": 3, "clip": "norm", "clipping": 1.0},
}


def skipping(photos: Path, epochs: float = 2, **options) -> ClassificationRun:
    return with_options(small_run(photos, epochs, on_nonfinite="skip"), {"ema_decay": 0.9} | options)


def poison(monkeypatch: pytest.MonkeyPatch, steps: Iterable[int], loss: bool = False) -> None:
    """A gradient, or the loss with all gradients, is not finite in these steps, counted from 0."""
    original = loop._gradients

    def gradients(task, update, sam, plan, batch, seed, at):
        losses = original(task, update, sam, plan, batch, seed, at)
        if at in steps and loss:
            for p in task.model.parameters():
                p.grad.fill_(float("nan"))
            return {name: value * float("nan") for name, value in losses.items()}
        if at in steps:
            dict(task.model.named_parameters())[LAYER].grad[0, 0] = float("inf")
        return losses

    monkeypatch.setattr(loop, "_gradients", gradients)


def without_updates(run: ClassificationRun, folder: Path, steps: Iterable[int]) -> None:
    """The reference: a run in which nothing is wrong, but these updates are left out."""
    job = build(run)
    original = job.update.step

    def step(number: int, lr: float, hold: torch.Tensor) -> None:
        if number not in steps:
            original(number, lr, hold)

    job.update.step = step  # type: ignore[method-assign]
    folder.mkdir()
    train(job.task, job.update, job.plan, new(folder, run), run.seed)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("check_every", [1, 4, 100])
def test_only_the_updates_of_bad_steps_are_left_out(photos, tmp_path, monkeypatch, capsys, check_every, options):
    """Also as on a device, which is asked now and then; 9 steps are an epoch, at whose end it is asked."""
    run, bad = skipping(photos, log_every=100, **options), (5, 6, 12)
    without_updates(run, tmp_path / "reference", bad)
    poison(monkeypatch, bad, loss=check_every == 4)
    job = build(run)
    (tmp_path / "run").mkdir()
    folder = new(tmp_path / "run", run)
    train(job.task, job.update, replace(job.plan, check_every=check_every), folder, run.seed)
    for name in ("last.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert numbers(folder, "eval") == numbers(tmp_path / "reference", "eval")
    skipped = records(folder, "skipped")
    assert [line["step"] for line in skipped] == [6, 7, 13]
    what = {1: f"the gradient of {LAYER}", 4: "the loss", 100: "a gradient"}[check_every]
    assert {line["what"] for line in skipped} == {what}
    assert skipped[0]["lr"] == job.plan.lr_at(5)
    assert f"warning: step 7 is skipped: {what} is not finite" in capsys.readouterr().err


def test_running_statistics_are_those_before_the_step(photos, tmp_path, monkeypatch):
    run = with_options(skipping(photos), {"model": "bn_nfnet_nano", "skip_init": None})
    job = build(run)
    bad = torch.zeros(())
    before: dict[int, list[torch.Tensor]] = {}
    block, original = job.task.model.stages[1][0], loop._gradients  # type: ignore[attr-defined]
    forward, update = block.forward, job.update.step
    monkeypatch.setattr(block, "forward", lambda x: forward(x) + bad)

    def gradients(task, update, sam, plan, batch, seed, at):
        before.setdefault(at, [buffer.clone() for buffer in task.model.buffers()])
        bad.fill_(float("nan") if at == 5 else 0.0)
        return original(task, update, sam, plan, batch, seed, at)

    def step(number: int, lr: float, hold: torch.Tensor) -> None:
        pairs = list(zip(before[number], job.task.model.buffers(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs) == (number == 5)
        update(number, lr, hold)

    monkeypatch.setattr(loop, "_gradients", gradients)
    job.update.step = step  # type: ignore[method-assign]
    train(job.task, job.update, job.plan, new(tmp_path, run), run.seed)
    assert [line["step"] for line in records(tmp_path, "skipped")] == [6]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "last.safetensors").values())


def test_too_many_bad_steps_end_the_run_also_after_a_resume(photos, tmp_path, monkeypatch):
    run = skipping(photos, epochs=4)
    with monkeypatch.context() as patch:  # 5 of any 100 steps may go on for ever
        poison(patch, range(0, 270, 20))
        start(with_options(run, {"steps": 14 * 20, "eval_every": 100.0, "batch_size": 2}), tmp_path / "rare")
        assert len(records(tmp_path / "rare", "skipped")) == 14
    poison(monkeypatch, range(7, 100))
    interrupted(run, tmp_path / "resumed", 12, monkeypatch)
    for name, begin in (("straight", start), ("resumed", lambda _, folder: resume(folder))):
        with pytest.raises(Diverged) as caught:
            begin(run, tmp_path / name)
        said = rf"step 18: the gradient of {LAYER} is not finite at learning rate 0\.\d+, as 10 of the 99 steps before"
        assert caught.match(said), name
        assert [line["step"] for line in records(tmp_path / name, "skipped")] == list(range(8, 18))


def test_a_run_that_stopped_goes_on_as_one_that_skips(photos, tmp_path, monkeypatch):
    run = skipping(photos)
    poison(monkeypatch, (5, 12))
    start(run, tmp_path / "straight")
    stopping = with_options(run, {"on_nonfinite": "stop"})
    with pytest.raises(Diverged, match="step 6"):
        start(stopping, tmp_path / "run")
    interrupted(run, tmp_path / "interrupted", 7, monkeypatch)
    resume(tmp_path / "run", run)
    resume(tmp_path / "interrupted")
    for name in ("run", "interrupted"):
        same_run(tmp_path / "straight", tmp_path / name)
        assert numbers(tmp_path / "straight", "skipped") == numbers(tmp_path / name, "skipped")


def test_a_held_average_does_not_move():
    """The operations for devices; on a CPU, which can look at the flag, a held step ends before them."""
    model = torch.nn.Linear(3, 2)
    ema = EMA(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    ema.update(0, torch.tensor(True))
    assert all(torch.equal(value, before[name]) for name, value in ema.shadow.items())
    expected = {p: value.clone() for p, value in ema.averages().items()}
    blend_(expected, 1 - ema.decay_at(0))
    ema.update(0, torch.tensor(False))
    for p, value in ema.averages().items():
        torch.testing.assert_close(value, expected[p], rtol=1e-6, atol=1e-7)
