"""Benchmarks and experiments start in the environment that is installed for the tests."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from normfree.data import open_dataset

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/*/*.py")))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of the other tests
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_photographs_of_the_benchmark_are_there(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/data.py"))
    script["make_photographs"](tmp_path, 4)
    train, validation = open_dataset(str(tmp_path))
    assert (len(train), len(train.class_names), len(validation)) == (4, 3, 1)
    assert min(train.read(0).size) == 400
