"""What a run says of itself: waiting for data, memory, accuracy of the classes, and wandb."""

import contextlib
import errno
import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_train import records, small_run

from normfree import cli
from normfree.config import load_config, save_config
from normfree.engine import loop
from normfree.engine.log import RunLog
from normfree.errors import InputError
from normfree.models import load
from normfree.tasks import classification
from normfree.tasks.accuracy import Accuracy, ClassScore, evaluate_weights, score_table
from normfree.tasks.classification import Classification, resume, start


def test_data_wait_is_the_share_of_the_time_without_evaluations(photos, tmp_path, monkeypatch):
    """On a clock that goes 3 s for a batch, 1 s for a loss and an hour for an evaluation."""
    clock = SimpleNamespace(now=0.0)
    originals = {name: getattr(Classification, name) for name in ("batches", "loss", "evaluate")}

    def batches(*arguments, **options):
        for batch in originals["batches"](*arguments, **options):
            clock.now += 3
            yield batch

    def slow(name, seconds):
        def later(*arguments):
            clock.now += seconds
            return originals[name](*arguments)

        return later

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(Classification, "batches", batches)
    monkeypatch.setattr(Classification, "loss", slow("loss", 1))
    monkeypatch.setattr(Classification, "evaluate", slow("evaluate", 3600))
    start(small_run(photos, epochs=2, log_every=2), tmp_path / "run")
    train = records(tmp_path / "run", "train")
    assert [r["step"] for r in train] == [2, 4, 6, 8, 9, 10, 12, 14, 16, 18]
    assert {r["data_wait"] for r in train} == {0.75}
    assert {r["images_per_s"] for r in train} == {2.0}


def test_memory_is_the_peak_in_mib(monkeypatch):
    used = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", used)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: device.index * 2**30)
    for platform, mib in (("linux", 3072.0), ("darwin", 3.0)):
        monkeypatch.setattr(loop, "sys", SimpleNamespace(platform=platform))
        assert loop.peak_memory_mib(torch.device("cpu")) == mib
    assert loop.peak_memory_mib(torch.device("cuda", 1)) == 1024.0
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert loop.peak_memory_mib(torch.device("cpu")) is None


def test_the_classes_are_those_of_the_averaged_weights(photos, tmp_path, monkeypatch):
    def counts(model, *others):
        """As many images as the classifier's weights add up to in millionths, and one or two more."""
        images = int(1e6 * model.head.fc.weight.abs().sum())
        return Accuracy(torch.diag(images + torch.arange(3)))

    monkeypatch.setattr(classification, "evaluate_images", counts)
    outcome = start(small_run(photos, epochs=2), tmp_path / "run")
    expected = counts(load(tmp_path / "run" / "last.safetensors")).confusion.diagonal().tolist()
    assert [row["images"] for row in outcome.details["classes"].values()] == expected


def test_the_classes_are_logged_and_shown_at_the_end(photos, tmp_path, capsys):
    folder = tmp_path / "run"
    outcome = start(small_run(photos, epochs=2), folder)
    said = capsys.readouterr().err
    (line,) = records(folder, "details")
    (*_, last) = records(folder, "eval")
    accuracy, info = evaluate_weights(str(folder / "last.safetensors"), str(photos), device="cpu", workers=0)
    scores = accuracy.scores(info.class_names)
    assert [ClassScore(name, **row) for name, row in line["classes"].items()] == scores
    assert line["step"] == last["step"] == 18
    assert outcome.details["classes"] == line["classes"]
    assert said.splitlines()[-4:] == score_table(scores)


def test_a_complete_run_is_resumed_to_the_same_end(photos, tmp_path, capsys):
    folder = tmp_path / "run"
    first = start(small_run(photos, epochs=2), folder)
    said = capsys.readouterr().err
    again = resume(folder)
    assert again.details == first.details
    assert len(records(folder, "details")) == 1
    assert capsys.readouterr().err.splitlines()[-3:] == said.splitlines()[-3:]

    manifest = folder / "checkpoints" / "step-00000018" / "manifest.json"  # as runs of version 0.1 left it
    content = json.loads(manifest.read_text())
    del content["extra"]["report"]
    manifest.write_text(json.dumps(content))
    assert resume(folder).details == {}


def test_a_full_disk_is_no_traceback_of_tensorboards_thread(tmp_path, monkeypatch, capsys):
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    hook = threading.excepthook
    log = RunLog(tmp_path)
    monkeypatch.setattr(LocalFileSystem, "_write", full)

    def fill() -> None:
        for step in range(10_000):
            log.write("train", step, loss=1.0)

    with pytest.raises(OSError, match="No space left"):
        fill()
    with contextlib.suppress(OSError):
        log.close()
    assert threading.excepthook is hook
    assert "Traceback" not in capsys.readouterr().err


class FakeWandb(ModuleType):
    """Keeps what `wandb.init`, `Run.log` and `Run.finish` are given."""

    def __init__(self):
        super().__init__("wandb")
        self.runs: list[SimpleNamespace] = []

    def init(self, **options):
        run = SimpleNamespace(options=options, logged=[], finished=0)

        def log(numbers: dict, step: int) -> None:
            assert not run.finished
            run.logged.append((step, numbers))

        def finish() -> None:
            run.finished += 1

        run.log, run.finish = log, finish
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_what_tensorboard_is_told(photos, tmp_path, wandb):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    start(small_run(photos, epochs=2, wandb="colours"), folder)
    (run,) = wandb.runs
    assert run.finished == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/data_wait", "train/agc_head", "eval/top1"} <= set(events.Tags()["scalars"])
    told = [(name, step, value) for step, numbers in run.logged for name, value in numbers.items()]
    shown = [(name, e.step, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    assert [row[:2] for row in sorted(told)] == [row[:2] for row in sorted(shown)]
    assert [row[2] for row in sorted(told)] == pytest.approx([row[2] for row in sorted(shown)], rel=1e-6)
    assert [step for step, _ in run.logged] == sorted(step for step, _ in run.logged)  # else wandb drops them


def test_a_resumed_run_goes_on_in_the_same_wandb_run(photos, tmp_path, wandb):
    run = small_run(photos, epochs=2, wandb="colours")
    for name in ("a", "b/run"):
        start(run, tmp_path / name)
    resume(tmp_path / "a")
    first, other, resumed = (one.options for one in wandb.runs)
    assert (first["project"], first["name"], first["resume"]) == ("colours", "a", "allow")
    assert first["config"] == json.loads((tmp_path / "a" / "config.json").read_text())
    assert first["config"]["optim"]["lr"] == 0.1
    assert first["dir"] == str(tmp_path / "a")
    assert resumed == first
    assert other["id"] != first["id"]
    assert other["name"] == "run"


def test_names_of_folders_come_again_and_wandb_runs_do_not(photos, tmp_path, wandb):
    """What wandb has of a deleted folder would hide the steps of the next run that is called the same."""
    run = small_run(photos, epochs=2, wandb="colours")
    for _ in range(2):
        start(run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    first, second = wandb.runs
    assert first.options["name"] == second.options["name"]
    assert first.options["id"] != second.options["id"]


@pytest.mark.parametrize("found", [None, ModuleType("wandb")], ids=["nothing", "a folder of that name"])
def test_wandb_that_is_missing_is_asked_for_before_anything_is_done(photos, tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    asked = replace(run, machine=replace(run.machine, wandb="colours"))
    with monkeypatch.context() as patch:
        patch.setattr("normfree.engine.run.new_run_folder", lambda path: pytest.fail("the folder was made"))
        with pytest.raises(InputError, match=r"--wandb.*pip install wandb$"):
            start(asked, folder)
    start(run, folder)  # not imported where it is not asked for
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(InputError, match="pip install wandb"):
        resume(folder, asked)
    assert (folder / "log.jsonl").read_bytes() == before


def test_wandb_that_refuses_is_one_line_and_leaves_no_folder(photos, tmp_path, wandb, monkeypatch):
    def refuse(**options):
        raise ValueError("No API key configured.\n  Use `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match=r"^--wandb colours: No API key configured. Use `wandb login`$"):
        start(small_run(photos, epochs=2, wandb="colours"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wandb_is_finished_when_the_run_stops_early(photos, tmp_path, wandb):
    run = small_run(photos, epochs=3, wandb="colours")
    run = replace(run, optim=replace(run.optim, lr=1e6, clipping=None, warmup_epochs=2))
    with pytest.raises(loop.Diverged):
        start(run, tmp_path / "run")
    assert wandb.runs[0].finished == 1


def test_wandb_is_an_option_that_a_config_keeps(tmp_path, capsys):
    run = small_run(Path("photos"), wandb="colours")
    save_config(run, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == run
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "--wandb PROJECT" in capsys.readouterr().out


def test_time_left_follows_the_speed_of_late(monkeypatch, capsys):
    """A slow beginning, such as kernels that are compiled, is forgotten."""
    from normfree.engine import log

    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    bar = log.ProgressBar("train", 1000)
    for done, seconds in (
        (1, 600),
        (16, 15),
        (31, 15),
        (46, 15),
        (61, 15),
        (76, 15),
    ):  # 10 minutes, then 1 step a second
        now += seconds
        bar.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].endswith("15:24 left")
