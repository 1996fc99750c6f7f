"""A run that is resumed may get a new length: what its learning rate does then, and what stays as it was."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import refused
from test_cli import run as command
from test_engine import interrupted
from test_train import numbers, records, same_run, small_run

from normfree.config import ClassificationRun, load_config, with_options
from normfree.engine import run as engine
from normfree.engine.run import make_plan
from normfree.errors import InputError
from normfree.tasks.classification import build, resume, start


def resume_until(folder: str, epochs: str, stop: str) -> None:
    """In a process of its own: to a new length, and killed before update number `stop`."""
    saved = load_config(Path(folder) / "config.json")
    job = build(with_options(saved, {"epochs": float(epochs)}))
    original = job.update.step

    def step(number: int, lr: float, hold) -> None:
        if number == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)
        original(number, lr, hold)

    job.update.step = step  # type: ignore[method-assign]
    engine.resume(job, Path(folder), saved)


def grown(run: ClassificationRun, epochs: float) -> ClassificationRun:
    return with_options(run, {"epochs": epochs})


def test_grown_during_the_warm_up_it_is_the_longer_run(photos, tmp_path, monkeypatch):
    """Until then the rates of both lengths are the same, so that not a bit may differ."""
    run = small_run(photos, epochs=2)
    start(grown(run, 4), tmp_path / "straight")
    interrupted(run, tmp_path / "run", 5, monkeypatch)
    resume(tmp_path / "run", grown(run, 4))
    same_run(tmp_path / "straight", tmp_path / "run")


def test_a_finished_run_grows_and_a_kill_on_the_way_changes_nothing(photos, tmp_path, capsys):
    run = small_run(photos, epochs=2)
    for name in ("straight", "killed"):
        start(run, tmp_path / name)
    capsys.readouterr()
    resume(tmp_path / "straight", grown(run, 4))
    said = capsys.readouterr().err.splitlines()
    rates = [record["lr"] for record in records(tmp_path / "straight", "train")]
    (line,) = (line for line in said if line.startswith("length"))
    assert line == (
        "length   36 steps instead of 18: from step 19 on, the learning rate is that of a run of this length, at first "
        f"{rates[18]:.3g} (it was {rates[17]:.3g}); there is no second warm-up"
    )
    assert rates[17] < 0.005 < 0.05 < rates[18]
    assert rates[18:] == [make_plan(grown(run, 4), 72).lr_at(step) for step in range(18, 36)]
    assert [r["step"] for r in records(tmp_path / "straight", "eval")] == [9, 18, 27, 36]
    assert load_config(tmp_path / "straight" / "config.json") == grown(run, 4)

    code = "import sys; from test_length import resume_until; resume_until(*sys.argv[1:])"
    arguments = [sys.executable, "-c", code, str(tmp_path / "killed"), "4", "29"]  # after the checkpoint of step 27
    killed = subprocess.run(arguments, cwd=Path(__file__).parent, timeout=300, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    capsys.readouterr()
    resume(tmp_path / "killed")  # config.json has the length
    assert "length  " not in capsys.readouterr().err
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    for kind in ("train", "eval", "details"):
        assert numbers(tmp_path / "straight", kind) == numbers(tmp_path / "killed", kind)
    starts = records(tmp_path / "killed", "start")
    assert [(s["step"], s["total_steps"], s.get("total_steps_before")) for s in starts] == [
        (0, 18, None),
        (18, 36, 18),
        (27, 36, None),
    ]


def test_a_run_that_is_not_finished_may_become_shorter_but_not_than_it_is(photos, tmp_path, monkeypatch, capsys):
    run, folder = small_run(photos, epochs=4), tmp_path / "run"
    interrupted(run, folder, 14, monkeypatch)
    before = (folder / "config.json").read_bytes(), (folder / "log.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(InputError, match=r"14 steps are done, 1\.556 epochs, and 14 would be the last: give --epochs"):
        resume(folder, with_options(run, {"steps": 14}))
    assert capsys.readouterr().err == ""  # one line in all, the error
    assert before == ((folder / "config.json").read_bytes(), (folder / "log.jsonl").read_bytes())
    resume(folder, grown(run, 2))
    assert [r["step"] for r in records(folder, "eval")] == [9, 18]
    assert load_config(folder / "config.json") == grown(run, 2)


def test_config_json_gets_the_length_alone(photos, tmp_path):
    run, folder = small_run(photos, epochs=2), tmp_path / "run"
    start(run, folder)
    machine = replace(run.machine, log_every=3)
    resume(folder, replace(with_options(run, {"steps": 20}), machine=machine))
    assert load_config(folder / "config.json") == with_options(run, {"steps": 20})
    with pytest.raises(InputError, match="--epochs 9 has no effect with --steps 20"):
        resume(folder, grown(with_options(run, {"steps": 20}), 9))
    resume(folder, with_options(run, {"steps": None, "epochs": 2.5}))
    assert load_config(folder / "config.json") == grown(run, 2.5)


def test_length_on_the_command_line(photos, tmp_path, capsys):
    folder = tmp_path / "run"
    quick = "--train-px 16 --eval-px 16 --batch-size 8 --workers 0 --device cpu --width 16 32 32 32 --group-width 8"
    command("train", photos, quick, "--steps 12", "--out", folder)
    command("train --resume", folder, "--epochs 2 --workers 0")  # the saved steps no longer count
    assert "18 steps instead of 12" in capsys.readouterr().err
    assert [r["step"] for r in records(folder, "eval")] == [12, 18]
    assert load_config(folder / "config.json").optim.steps is None
    assert "give one of them" in refused(capsys, "train --resume", folder, "--epochs 3 --steps 40")
    lines = []
    for option in ("--epochs 1", "--steps 17"):
        with pytest.raises(SystemExit) as stop:
            command("train --resume", folder, option)
        assert stop.value.code == 2
        lines.append(capsys.readouterr().err.splitlines()[-1])
    assert all("18 steps are done" in line for line in lines)
    assert load_config(folder / "config.json").optim.epochs == 2
