"""What goes wrong around a run, tried again and again: `python -m tests.faults --minutes 10`.

Each try trains a small network in a process of its own, does something to it, lets it resume, and compares the weights
and the log with those of a run that nothing happened to, bit for bit. A table of the tries is printed and written to
docs/results/faults.md. Processes are forked, which takes OMP_NUM_THREADS=1.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import COLOURS, draw
from test_train import numbers, small_run

from normfree import cli, files
from normfree.config import ClassificationRun, with_options
from normfree.engine import checkpoint, loop
from normfree.engine import run as engine
from normfree.engine.checkpoint import MANIFEST, all_steps, newest_whole, save_checkpoint
from normfree.engine.device import processor
from normfree.engine.log import RunLog
from normfree.tasks.classification import Classification, resume, start

ROOT = Path(__file__).parents[1]
HUNG_SECONDS = 120
RUNS: dict[str, dict[str, Any]] = {
    "SGD, AGC, EMA": {},
    "SAM, micro-batches": {"sam_rho": 0.05, "micro_batch": 3},
    "AdamW, MixUp, CutMix": {"optimizer": "adamw", "lr": 0.01, "mixup": 0.2, "cutmix": 1.0},
    "bfloat16, two workers": {"precision": "bfloat16", "workers": 2},
    "batch normalization": {"model": "bn_nfnet_nano", "on_nonfinite": "skip"},
}


class Lost(Exception):
    """What a run did not survive."""


@dataclass
class Try:
    """A run that something happens to. `seconds`: how long it takes on its own; `chance`: gives random numbers."""

    run: ClassificationRun
    folder: Path
    log: Path
    seconds: float
    chance: random.Random

    def begin(self, hook: Callable[[], None] = lambda: None) -> int:
        """Starts or resumes the run in a new process, after `hook` in it; its number."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(out, 1)
            os.dup2(out, 2)
            engine.estimated_seconds = lambda job: 0.0  # which takes as long as the run
            hook()
            cli.VERBS["train"] = lambda _: self._train()
            cli.main(["train"])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _train(self) -> None:
        if (self.folder / "config.json").is_file():
            resume(self.folder)
        else:  # nothing was done yet
            shutil.rmtree(self.folder, ignore_errors=True)
            start(self.run, self.folder)

    def wait(self, pid: int, *expected: int) -> int:
        """The exit code of a process, or -N after signal N; Lost if it is not one of `expected`, or if it hangs."""
        deadline = time.monotonic() + HUNG_SECONDS
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Lost(f"hung: {self.said()}")
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(done[1])
        if code not in expected:
            raise Lost(f"exit code {code}: {self.said()}")
        if "Traceback" in self.log.read_text():
            raise Lost(f"a traceback: {self.said()}")
        return code

    def said(self) -> str:
        """The last line that the processes printed."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return lines[-1] if lines else "(nothing)"

    def pause(self) -> None:
        """Until a random moment of the run."""
        time.sleep(self.chance.uniform(0, self.seconds))

    def stopped(self) -> list[Path]:
        """Kills the run right after a checkpoint; the checkpoints."""
        count = self.chance.randrange(3, 12)

        def hook() -> None:
            after(loop, "save_checkpoint", count, lambda: os.kill(os.getpid(), signal.SIGKILL))

        self.wait(self.begin(hook), -signal.SIGKILL)
        return all_steps(self.folder / "checkpoints")


def after(owner: Any, name: str, count: int, action: Callable[[], None], before: bool = False) -> None:
    """Has `action` called after, or before, call number `count` of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def later(*args: Any, **options: Any) -> Any:
        now = next(calls) == count
        if now and before:
            action()
        result = original(*args, **options)
        if now and not before:
            action()
        return result

    setattr(owner, name, later)


# --- the faults ---


def signalled(t: Try, number: int, *codes: int) -> None:
    """At up to three random moments."""
    for _ in range(t.chance.randrange(1, 4)):
        pid = t.begin()
        t.pause()
        os.kill(pid, number)
        t.wait(pid, *codes, -number, 0)
        _, damaged = newest_whole(t.folder / "checkpoints")
        if damaged:
            raise Lost(damaged[0])


def killed_in(t: Try, owner: Any, name: str, most: int, seconds: float) -> None:
    """A random time after a function has been called for a random time of times."""
    count, delay = t.chance.randrange(1, most), t.chance.uniform(0, seconds)

    def die() -> None:
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    t.wait(t.begin(lambda: after(owner, name, count, die, before=True)), -signal.SIGKILL, 0)


def killed_in_a_line(t: Try) -> None:
    count, share = t.chance.randrange(2, 15), t.chance.random()
    original, calls = RunLog.write, itertools.count(1)

    def write(self: RunLog, kind: str, step: int, **values: Any) -> None:
        if next(calls) == count:
            line = json.dumps({"kind": kind, "step": step} | values)
            self.file.write(line[: int(share * len(line))])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, kind, step, **values)

    t.wait(t.begin(lambda: setattr(RunLog, "write", write)), -signal.SIGKILL)


def disk_full(t: Try) -> None:
    t.folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", t.folder.parent], check=True)
    try:
        pid = t.begin()
        t.pause()
        filler = t.folder.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        t.wait(pid, 0, 1, 2)
        filler.unlink()
        t.wait(t.begin(), 0)
        keep = Path(f"{t.folder.parent}-kept")
        shutil.copytree(t.folder, keep)
    finally:
        subprocess.run(["umount", t.folder.parent], check=True)
    shutil.rmtree(t.folder, ignore_errors=True)
    shutil.move(keep, t.folder)


def read_only(t: Try) -> None:
    """The run's folder loses its permission to write; for root, who needs none, a read-only mount lies over it."""
    pid = t.begin()
    while not all_steps(t.folder / "checkpoints"):  # before that, a run makes its folder
        time.sleep(0.005)
    t.pause()
    root = os.getuid() == 0
    folders = [t.folder, t.folder / "checkpoints"]
    if root:
        subprocess.run(["mount", "--bind", t.folder, t.folder], check=True)
    try:
        if root:
            subprocess.run(["mount", "-o", "remount,ro,bind", t.folder], capture_output=True)  # fails while it writes
        else:
            for folder in folders:
                folder.chmod(0o555)
        t.wait(pid, 0, 1, 2)
    finally:
        if root:
            subprocess.run(["umount", "--lazy", t.folder], check=True)
        else:
            for folder in folders:
                folder.chmod(0o755)


def damaged(t: Try, damage: Callable[[Path, random.Random], None], refusal: str = "") -> None:
    """The newest checkpoint, after which the one before is used, or which is refused until it is removed."""
    newest = t.stopped()[-1]
    damage(newest, t.chance)
    if refusal:
        t.wait(t.begin(), 2)
        if refusal not in t.said():
            raise Lost(f"not said: {t.said()}")
        shutil.rmtree(newest)
    t.wait(t.begin(), 0)
    if not refusal and f"{newest} is damaged and is passed over" not in t.log.read_text():
        raise Lost(f"not said: {t.said()}")


def flip(path: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(path.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data + b"!")  # two flips may cancel each other


def truncate(path: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(p for p in path.iterdir() if p.stat().st_size))
    os.truncate(file, chance.randrange(file.stat().st_size))


def delete(path: Path, chance: random.Random) -> None:
    everything = sorted(path.iterdir())
    for file in chance.sample(everything, chance.randrange(1, len(everything) + 1)):
        file.unlink()


def newer(path: Path, chance: random.Random) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": manifest["format"] + 1}))


def of_another(path: Path, chance: random.Random) -> None:
    step = int(path.name.removeprefix("step-"))
    shutil.rmtree(path)
    save_checkpoint(path.parent, step, {"model.other": torch.zeros(3)}, {}, keep=9)


def two_runs(t: Try) -> None:
    first = t.begin()
    while not (t.folder / ".lock").exists() or not all_steps(t.folder / "checkpoints"):
        time.sleep(0.005)
    second = t.begin(lambda: setattr(files, "_LOCK_SECONDS", 0.05))
    code = t.wait(second, 0, 2)  # 0: the first one had ended
    if code and "another process is working in" not in t.log.read_text():
        raise Lost(f"not said: {t.said()}")
    t.wait(first, 0)


def clock(t: Try) -> None:
    """It jumps back by a day, then forth, while the run is killed on the way."""
    count, real = t.chance.randrange(1, 200), time.time
    calls = itertools.count()

    def hook() -> None:
        time.time = lambda: real() - 86400 * (next(calls) > count)

    pid = t.begin(hook)
    t.pause()
    os.kill(pid, signal.SIGKILL)
    t.wait(pid, -signal.SIGKILL, 0)


FAULTS: dict[str, Callable[[Try], None]] = {
    "SIGKILL at random moments": lambda t: signalled(t, signal.SIGKILL),
    "SIGKILL in a checkpoint": lambda t: killed_in(t, loop, "save_checkpoint", 27, 0.02),
    "SIGKILL while a checkpoint gets its name": lambda t: killed_in(t, checkpoint, "sync", 100, 0.003),
    "SIGKILL in an evaluation": lambda t: killed_in(t, Classification, "evaluate", 7, 0.05),
    "SIGKILL in a weight file": lambda t: killed_in(t, Classification, "save", 3, 0.005),
    "SIGKILL in a line of the log": killed_in_a_line,
    "SIGTERM at random moments": lambda t: signalled(t, signal.SIGTERM, 143),
    "SIGINT at random moments": lambda t: signalled(t, signal.SIGINT, 130),
    "disk full": disk_full,
    "folder becomes read-only": read_only,
    "checkpoint with flipped bits": lambda t: damaged(t, flip),
    "checkpoint truncated": lambda t: damaged(t, truncate),
    "checkpoint half deleted": lambda t: damaged(t, delete),
    "checkpoint of a newer format": lambda t: damaged(t, newer),
    "checkpoint of another network": lambda t: damaged(t, of_another, "belongs to another network"),
    "two runs into one folder": two_runs,
    "clock that jumps back": clock,
}


# --- trying them ---


@dataclass
class Row:
    tries: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    skipped: str = ""


def compare(reference: Path, folder: Path) -> None:
    """Lost unless two runs ended alike, bit for bit, and logged the same."""
    for name in ("last.safetensors", "best.safetensors"):
        if (reference / name).read_bytes() != (folder / name).read_bytes():
            raise Lost(f"{name} differs")
    for kind in ("train", "eval", "details", "unreadable"):
        if numbers(reference, kind) != numbers(folder, kind):
            raise Lost(f"the log differs in its lines of kind {kind}")


def pictures(folder: Path) -> None:
    """90 pictures in three classes, one of which cannot be read."""
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(30):
            part = "train" if i < 24 else "validation"
            draw(folder / part / name / f"{i:02d}.jpg", colour, 100 * c + i)
    (folder / "train" / "red" / "00.jpg").write_bytes(b"nothing")


def can_mount(folder: Path) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def rounds(seconds: float, tries: int | None, only: str, work: Path) -> Iterator[dict[str, Row]]:
    """Tries all faults in turn; gives the table after each try."""
    chance = random.Random()
    began = time.monotonic()
    pictures(work / "photos")
    small = small_run(work / "photos", epochs=1.5 if tries else 3, checkpoint_minutes=0.0)
    runs = {name: with_options(small, {"ema_decay": 0.9} | options) for name, options in RUNS.items()}
    references: dict[str, tuple[Path, float]] = {}
    faults = {name: fault for name, fault in FAULTS.items() if re.search(only, name)}
    rows = {name: Row() for name in faults}
    if "disk full" in rows and not can_mount(work / "mount"):
        rows["disk full"].skipped = "needs root, to mount a small tmpfs"
    count = itertools.count()
    for name, fault in itertools.cycle(faults.items()):
        number = next(count)
        if (number // len(faults) >= tries) if tries else time.monotonic() - began > seconds:
            return
        if rows[name].skipped:
            continue
        which = list(runs)[0 if tries else number % len(runs)]
        if which not in references:
            alone = Try(runs[which], work / f"reference-{len(references)}", work / "log", 0.0, chance)
            before = time.monotonic()
            alone.wait(alone.begin(), 0)
            references[which] = alone.folder, time.monotonic() - before
        reference, length = references[which]
        place = work / f"try-{number}"
        place.mkdir()
        log = work / f"log-{number}"
        one = Try(runs[which], place / "run", log, length, chance)
        rows[name].tries += 1
        try:
            fault(one)
            one.wait(one.begin(), 0)
            compare(reference, one.folder)
            rows[name].survived += 1
        except Lost as reason:
            rows[name].lost.append(f"{name}, {which}: {reason}")
        shutil.rmtree(place, ignore_errors=True)
        yield rows


def table(rows: dict[str, Row]) -> list[str]:
    lines = ["| fault | tries | survived | lost |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.skipped or row.tries} | {row.survived} | {len(row.lost)} |")
    total = [sum(values) for values in zip(*((r.tries, r.survived, len(r.lost)) for r in rows.values()), strict=True)]
    return [*lines, f"| **all** | {total[0]} | {total[1]} | {total[2]} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tries", type=int, help="so many of each fault, on the first run; writes no file")
    parser.add_argument("--only", default="", metavar="REGEX", help="the faults whose names match; writes no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as work:
        Path(work).chmod(0o755)
        for rows in rounds(60 * options.minutes, options.tries, options.only, Path(work)):  # noqa: B007
            pass
    lost = [line for row in rows.values() for line in row.lost]
    print(*table(rows), *lost, sep="\n")
    if options.tries is None and not options.only:
        about = (
            "# What a run survives",
            f"`python -m tests.faults --minutes {options.minutes:g}`, torch {torch.__version__}, {processor()}, one "
            "thread. Each try does something to a small run, of one process, lets it resume, and compares weights and "
            "log with those of a run that nothing happened to. Survived: bit for bit the same. The runs take turns: "
            f"{'; '.join(RUNS)}. All have a moving average of the weights and an unreadable image.",
            "\n".join(table(rows)),
            *(["\n".join(f"- {line}" for line in lost)] if lost else []),
        )
        target = ROOT / "docs" / "results" / "faults.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n\n".join(about) + "\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
