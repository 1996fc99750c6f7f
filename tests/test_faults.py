"""Faults of tests/faults.py that no other test tries, once. Its processes are forked, from one with one thread."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS


@pytest.mark.parametrize("faults", ["SIGKILL (in|while)", "read-only|truncated|deleted|newer|another|clock"])
def test_a_run_survives_each_fault_once(faults):
    command = [sys.executable, "-m", "tests.faults", "--tries", "1", "--only", faults]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [name for name in FAULTS if re.search(faults, name)]
    assert len(names) >= 5
    assert done.stdout.splitlines()[2:-1] == [f"| {name} | 1 | 1 | 0 |" for name in names]
