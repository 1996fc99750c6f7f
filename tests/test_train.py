"""The loop: what it leaves behind, and that nothing that happens to it changes its numbers."""

import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from normfree.config import (
    ClassificationRun,
    ClassifierOptim,
    DataConfig,
    MachineConfig,
    ModelConfig,
    load_config,
    save_config,
)
from normfree.engine.checkpoint import DamagedCheckpoint, load_checkpoint, newest_whole, save_checkpoint
from normfree.engine.loop import Diverged, eval_steps
from normfree.errors import InputError
from normfree.models import create_model, load, save
from normfree.tasks.accuracy import evaluate_weights
from normfree.tasks.classification import resume, start


def small_run(photos: Path, epochs: float = 4, **machine) -> ClassificationRun:
    """16 px, 8 images a step, 9 steps an epoch; dropout, stochastic depth and crops all on."""
    return ClassificationRun(
        ModelConfig("nfnet_nano", width=(16, 32, 32, 32), group_width=8, drop_rate=0.2),
        DataConfig(str(photos), train_px=16, eval_px=16, min_area=0.5),
        ClassifierOptim(epochs=epochs, batch_size=8, lr=0.1, clipping=0.1),
        MachineConfig(**({"device": "cpu", "log_every": 1, "workers": 0} | machine)),
        seed=3,
    )


def records(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


OF_THE_MACHINE = {"time", "images_per_s", "data_wait", "memory_mib"}


def numbers(folder: Path, kind: str) -> list[dict]:
    """Lines of the log without what is another in every run."""
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in records(folder, kind)]


def same_run(a: Path, b: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for kind in ("train", "eval", "details"):
        assert numbers(a, kind) == numbers(b, kind)
    assert len(numbers(b, "details")) == 1


def test_a_run_learns_and_leaves_what_it_promises(photos, tmp_path):
    run, folder = small_run(photos, epochs=8), tmp_path / "run"
    outcome = start(run, folder)
    assert outcome.best > 90
    assert load_config(folder / "config.json") == run
    names = {p.name.split(".")[0] for p in folder.iterdir()}
    assert {"config", "log", "events", "checkpoints", "best", "last"} <= names
    train, evals = records(folder, "train"), records(folder, "eval")
    assert [r["step"] for r in train] == list(range(1, 73))
    assert [r["step"] for r in evals] == list(range(9, 73, 9))
    assert {"loss", "lr", "epoch", "images_per_s", "clipped_fraction", "max_grad_ratio"} <= train[0].keys()
    assert all(0 <= r["data_wait"] <= 1 for r in train)
    assert all(100 < a["memory_mib"] <= b["memory_mib"] for a, b in pairwise(train))
    assert max(r["lr"] for r in train) == pytest.approx(0.1, rel=1e-2)
    assert max(r["top1"] for r in evals) == outcome.best
    assert len(list((folder / "checkpoints").iterdir())) == run.machine.keep_checkpoints

    accuracy, info = evaluate_weights(str(folder / "best.safetensors"), str(photos), device="cpu", workers=0)
    assert accuracy.top1_percent == outcome.best
    assert accuracy.num_images == 18
    assert info.class_names == ("blue", "green", "red")
    assert (info.train_px, info.eval_px, info.eval_crop) == (16, 16, "center")
    assert sum(score.images for score in accuracy.scores(info.class_names)) == 18


def test_tensorboard_holds_the_curves(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(small_run(photos, epochs=2), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"train/loss", "train/lr", "eval/top1"} <= set(events.Tags()["scalars"])
    logged = [r["loss"] for r in records(tmp_path / "run", "train")]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(logged, rel=1e-6)


# A run that sends itself a signal once its log has so many lines of training. It does so itself, in a thread: however
# slow the machine is, the steps do not run ahead of it.
STOPPED = """
import os, sys, threading, time
from pathlib import Path
from normfree import cli
from normfree.config import load_config
from normfree.tasks import classification

config, folder, number, steps = sys.argv[1:]

def stop():
    log = Path(folder, "log.jsonl")
    while not log.exists() or log.read_text().count('"kind": "train"') < int(steps):
        time.sleep(0.001)
    os.kill(os.getpid(), int(number))

threading.Thread(target=stop, daemon=True).start()
cli.VERBS["train"] = lambda _: classification.start(load_config(config), Path(folder))
cli.main(["train"])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_anywhere_and_resumed_with_other_workers(photos, tmp_path, number):
    """Bit-identical weights, whatever step the signal falls into."""
    run = small_run(photos, epochs=3, checkpoint_minutes=0.0)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    start(run, straight)

    config = tmp_path / "config.json"
    save_config(run, config)
    stop_after = random.SystemRandom().randint(1, 12)  # of 27
    print(f"stopped after {stop_after} steps")  # shown where the test fails
    command = [sys.executable, "-c", STOPPED, str(config), str(broken), str(number.value), str(stop_after)]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
    said = process.stderr
    assert not (broken / "last.safetensors").exists(), said
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, said
        assert f"continue with: normfree train --resume {broken}" in said
    resume(broken, replace(run, machine=replace(run.machine, workers=2)))
    same_run(straight, broken)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_micro_batches_train_as_the_whole_batch_does(photos, tmp_path, sam_rho):
    run = small_run(photos, epochs=2)
    still = replace(run.model, stochastic_depth=0.0, drop_rate=0.0)  # their chances fall otherwise in smaller batches
    for name, size in (("whole", None), ("micro", 3)):
        optim = replace(run.optim, micro_batch=size, sam_rho=sam_rho)
        start(replace(run, model=still, optim=optim), tmp_path / name)
    whole, micro = (records(tmp_path / name, "train") for name in ("whole", "micro"))
    for a, b in zip(whole, micro, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    assert whole[-1]["loss"] != whole[0]["loss"]


def test_a_damaged_checkpoint_is_named_and_passed_over(photos, tmp_path, capsys):
    run = small_run(photos, epochs=2)
    start(run, tmp_path / "a")
    start(run, tmp_path / "b")
    (tmp_path / "b" / "last.safetensors").unlink()
    newest = sorted((tmp_path / "b" / "checkpoints").iterdir())[-1]
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    resume(tmp_path / "b")
    assert f"checkpoint {newest} is damaged and is passed over" in capsys.readouterr().err
    same_run(tmp_path / "a", tmp_path / "b")


def test_resume_changes_nothing_but_the_machine(photos, tmp_path):
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    start(run, folder)
    with pytest.raises(InputError, match="the machine options may change"):
        resume(folder, replace(run, seed=4))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_divergence_is_stopped_and_named(photos, tmp_path):
    run, folder = small_run(photos, epochs=3, checkpoint_minutes=0.0), tmp_path / "run"
    run = replace(run, optim=replace(run.optim, lr=1e6, clipping=None, warmup_epochs=2))
    with pytest.raises(Diverged, match=r"step \d+: the (output|gradient) of \S+") as caught:
        start(run, folder)
    assert "\n" not in str(caught.value)
    paths = list((folder / "checkpoints").glob("step-*"))
    assert paths
    for path in paths:
        tensors = load_checkpoint_model(path)
        assert tensors
        assert all(v.isfinite().all() for v in tensors.values())
    assert not (folder / "last.safetensors").exists()


def load_checkpoint_model(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(path.glob("*.safetensors")))


def test_unreadable_images_are_skipped_named_and_limited(photos, tmp_path, capsys):
    bad = photos / "train" / "red" / "00.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    (photos / "validation" / "blue" / "00.jpg").write_bytes(b"")
    run = small_run(photos, epochs=2)
    start(run, tmp_path / "run")
    (record,) = records(tmp_path / "run", "unreadable")
    assert "red/00.jpg" in record["name"]
    assert [r["unreadable"] for r in records(tmp_path / "run", "eval")] == [1, 1]
    assert "not counted: validation/blue/00.jpg" in capsys.readouterr().err
    strict = replace(run, data=replace(run.data, max_unreadable=0.0))
    with pytest.raises(InputError, match=r"1 of 72 training images cannot be read.*red/00.jpg"):
        start(strict, tmp_path / "strict")


def test_fine_tuning_and_linear_probe(photos, tmp_path):
    start(small_run(photos, epochs=2), tmp_path / "first")
    weights = tmp_path / "first" / "last.safetensors"
    run = small_run(photos, epochs=2)
    run = replace(run, model=replace(run.model, init=str(weights), freeze=True))
    start(run, tmp_path / "probe")
    before, after = load(weights).state_dict(), load(tmp_path / "probe" / "last.safetensors").state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"head.fc.weight", "head.fc.bias"}


def test_what_is_taken_from_the_first_weights_is_said(photos, tmp_path, capsys):
    """Classes by name, channels adapted; what is not used is named."""
    model = create_model("nfnet_nano", 3, width=(16, 32, 32, 32), group_width=8)
    assert model.info is not None
    weights = tmp_path / "first.safetensors"
    save(model, weights, replace(model.info, class_names=("red", "yellow", "green")))
    run = small_run(photos, epochs=2)
    run = replace(run, model=replace(run.model, init=str(weights), in_channels=1, activation="relu"))
    start(run, tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("init ")]
    assert said == [
        f"init     unlike the network of {weights}: activation=relu",
        "init     stem.conv0 is adapted from 3 to 1 channels, mean and deviation averaged",
        "init     140 of 142 tensors, 35,377 parameters, are taken over; 65 parameters of the classifier are new",
        "init     the classifier keeps its rows for 2 of 3 classes; new: blue; left out: yellow",
    ]
    info = load(tmp_path / "run" / "last.safetensors").info
    assert info is not None
    assert (info.class_names, info.in_channels, len(info.mean)) == (("blue", "green", "red"), 1, 1)


def test_checkpoint_round_trip_and_pruning(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4), "scalar": torch.tensor(2.5), "half": torch.randn(5).bfloat16()}
    tensors["last"] = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    (tmp_path / "partial-00000009").mkdir()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors, {"note": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    into = {name: torch.zeros_like(value) for name, value in tensors.items()}
    path, damaged = newest_whole(tmp_path)
    assert path is not None
    assert damaged == []
    manifest = load_checkpoint(path, into)
    assert (manifest["step"], manifest["extra"]) == (3, {"note": 3})
    assert all(torch.equal(into[name], tensors[name]) for name in tensors)
    with pytest.raises(DamagedCheckpoint, match="another network"):
        load_checkpoint(path, {"other": torch.zeros(1)})
    (path / "manifest.json").write_text("{")
    assert newest_whole(tmp_path)[0] == tmp_path / "step-00000002"
    assert "manifest" in newest_whole(tmp_path)[1][0]


def test_no_pickle_in_a_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(2)}, {}, keep=1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_eval_steps_fall_on_ends_of_epochs():
    assert sorted(eval_steps(36, 9.0, 1)) == [9, 18, 27, 36]
    assert sorted(eval_steps(10, 3.3, 1)) == [3, 7, 10]
    assert sorted(eval_steps(5, 9.0, 1)) == [5]


def test_config_round_trip_and_validation(tmp_path):
    run = replace(ClassificationRun(), model=ModelConfig(width=(1, 2, 3, 4), second_conv=False))
    path = tmp_path / "config.json"
    save_config(run, path)
    assert load_config(path) == run
    run.check()
    data = json.loads(path.read_text())
    assert (data.pop("format"), data.pop("task")) == (2, "classification")
    del data["optim"]["optimizer"], data["optim"]["clip"]
    path.write_text(json.dumps(data))  # as version 0.1 wrote it
    assert load_config(path) == run
    data["optim"]["learning_rate"] = 1
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="unknown field 'learning_rate'"):
        load_config(path)
    path.write_text("[")
    with pytest.raises(InputError, match="is no configuration"):
        load_config(path)
    with pytest.raises(InputError, match="--momentum 1"):
        replace(run, optim=replace(run.optim, momentum=1.0)).check()
    with pytest.raises(InputError, match=r"--min-area 0\.5 has no effect with --crop-style shift"):
        replace(run, data=replace(run.data, crop_style="shift", min_area=0.5)).check()
