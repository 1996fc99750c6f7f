"""The loop and its runs know no task: a regression, built in a few lines, trains, is killed, resumes, is evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normfree.config import ClassificationRun, MachineConfig, OptimConfig, Precision, load_config
from normfree.engine import run as engine
from normfree.engine.loop import Evaluation, Shard
from normfree.engine.update import Update
from normfree.errors import InputError


@dataclass(frozen=True)
class RegressionRun:
    task: ClassVar[str] = "regression"
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(batch_size=16, epochs=10, lr=0.05))
    machine: MachineConfig = field(default_factory=lambda: MachineConfig(device="cpu", checkpoint_minutes=0))
    seed: int = 0
    precision: Precision = "float32"

    def check(self) -> None:
        self.optim.check()


class Regression:
    """y = x W + 1, learned from 128 pairs."""

    metric = "r2"

    def __init__(self, run: RegressionRun):
        torch.manual_seed(run.seed)
        self.run, self.model = run, nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
        self.x = torch.randn(160, 8)
        self.y = self.x @ torch.randn(8, 1) + 1
        self.read = 0  # batches

    def batches(self, steps: range, shard: Shard) -> Iterator[Tensor]:
        assert shard == Shard(0, 1)
        for step in steps:
            self.read += 1
            yield torch.randperm(128, generator=torch.Generator().manual_seed(step))[: self.run.optim.batch_size]

    def split(self, batch: Tensor, size: int) -> list[tuple[Tensor, float]]:
        return [(part, len(part) / len(batch)) for part in batch.split(size)]

    def loss(self, forward: Callable[..., Any], batch: Tensor) -> dict[str, Tensor]:
        error = forward(self.x[batch]) - self.y[batch]
        return {"loss": error.square().mean(), "bias": error.mean()}

    @torch.no_grad()
    def evaluate(self, forward: Callable[..., Any], shard: Shard, show: Callable[[int, int], None]) -> Evaluation:
        error = (forward(self.x[128:]) - self.y[128:]).square().mean().item()
        show(32, 32)
        return Evaluation({"r2": 1 - error / self.y[128:].var().item()}, {"largest": float(self.y.max())})

    def group_of(self, name: str) -> str:
        return name.partition(".")[0]

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]

    def save(self, path: Path) -> None:
        save_file(self.model.state_dict(), path)


def job(run: RegressionRun) -> engine.Job:
    task = Regression(run)
    return engine.Job(
        run,
        task,
        Update(task.model, run.optim, classifier=task.model[2]),
        engine.make_plan(run, 128, unit="samples"),
        name="line",
        source="numbers",
        data={"held_out": False, "images": {}},
        description=["data     128 pairs"],
        notes=(),
        preview=lambda: (torch.arange(16) for _ in range(3)),
        workers=0,
        evaluation=(2.0, 0.3),
    )


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    clock = ("time", "samples_per_s", "data_wait", "memory_mib")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["kind"] != "start"]


def train_until(folder: str, options: str, stop: int) -> None:
    """In a process of its own, which is killed before update number `stop`."""
    broken = job(configured(json.loads(options)))
    original = broken.update.step

    def step(number: int, lr: float, hold: Tensor) -> None:
        if number == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        original(number, lr, hold)

    broken.update.step = step  # type: ignore[method-assign]
    engine.start(broken, Path(folder))


def configured(options: dict[str, Any]) -> RegressionRun:
    run = RegressionRun()
    return replace(run, optim=replace(run.optim, ema_decay=0.9, **options))


RUNS = {
    "sgd, agc": {},
    "sgd, norm": {"clip": "norm", "clipping": 0.5},
    "adamw, agc": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.01},
    "adamw, norm, sam, micro-batches": {
        "optimizer": "adamw",
        "lr": 0.01,
        "clip": "norm",
        "clipping": 0.5,
        "sam_rho": 0.01,
        "micro_batch": 5,
    },
    "adamw, none": {"optimizer": "adamw", "lr": 0.01, "clip": "none", "clipping": None},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_a_regression_is_killed_resumed_and_evaluated(options, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    outcome = engine.start(job(configured(options)), straight)
    assert outcome.best > 0.8
    assert outcome.details["largest"] > 1
    code = "import sys; from test_second_task import train_until; train_until(*sys.argv[1:3], int(sys.argv[3]))"
    command = [sys.executable, "-c", code, str(killed), json.dumps(options), "43"]
    assert subprocess.run(command, cwd=Path(__file__).parent, timeout=300).returncode == -signal.SIGKILL
    again = job(load_config(killed / "config.json", RegressionRun))
    assert engine.resume(again, killed).last == outcome.last
    assert again.task.read == 80  # type: ignore[attr-defined]  # as if there had been no interruption
    for name in ("last", "best"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (straight, killed))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert steps_of(killed) == steps_of(straight)
    train = next(line for line in steps_of(straight) if line["kind"] == "train")
    assert "bias" in train
    assert ("agc_0" in train) == (options.get("clip", "agc") == "agc")
    assert ("grad_norm" in train) == (options.get("clip") == "norm")


def test_the_file_of_another_task_is_refused(tmp_path):
    engine.start(job(configured({"steps": 2, "warmup_steps": 0})), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    with pytest.raises(InputError, match="is of a run of regression, not of classification"):
        load_config(path, ClassificationRun)
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(InputError, match="newer version"):
        load_config(path, RegressionRun)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}], ids=["sgd", "adamw"])
def test_a_held_update_changes_nothing(options):
    held = job(configured(options))
    expected = {name: value.clone() for name, value in held.update.tensors().items()}
    held.task.loss(held.task.model, torch.arange(8))["loss"].backward()
    held.update.step(0, 0.1, hold=torch.tensor(True))
    assert all(torch.equal(value, expected[name]) for name, value in held.update.tensors().items())
    held.update.step(0, 0.1, hold=torch.tensor(False))
    assert not torch.equal(held.update.tensors()["model.0.weight"], expected["model.0.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("change", [{"momentum": 0.5}, {"weight_decay": 0.5}, {"clip": "norm", "clipping": 0.01}])
def test_every_option_of_the_update_changes_it(optimizer, change):
    def weights(options: dict[str, Any]) -> Tensor:
        trained = job(configured({"optimizer": optimizer, "weight_decay": 0.01} | options))
        for step in range(3):
            trained.update.optimizer.zero_grad()
            loss = trained.task.loss(trained.task.model, torch.arange(4 * step, 4 * step + 4))["loss"]
            (loss * 10.0**step).backward()  # else AdamW would not see the scale
            trained.update.step(step, 0.01, hold=torch.tensor(False))
        return trained.task.model[2].weight

    assert not torch.equal(weights(change), weights({}))
