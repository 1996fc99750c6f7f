"""Several ranks give what one process gives: torchrun with gloo on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("distributed_optim.py")


def torchrun(ranks: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, ["ddp", "fsdp2", "fsdp2 uneven", "fsdp2 mixed with plain"]), (4, ["hsdp", "hsdp uneven"])],
)
def test_clipping_and_steps_are_those_of_one_process(ranks, cases):
    said = torchrun(ranks)
    assert [line for line in said.splitlines() if line.endswith(": equal")] == [f"{case}: equal" for case in cases]
