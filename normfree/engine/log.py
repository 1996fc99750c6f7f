"""What a run says: log.jsonl, TensorBoard, and a progress bar or plain lines on the console."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0  # between progress lines where there is no terminal


class ProgressBar:
    """A bar on a terminal, a line now and then elsewhere; on standard error, so that results can be piped."""

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "steps"):
        self.what, self.total, self.first, self.unit = what, total, done, unit
        self.console = Console(stderr=True)
        self.start = self.last_line = time.monotonic()
        self.note = ""
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task(what, total=total, completed=done, note="")
            self.bar.start()

    def update(self, done: int, note: str | None = None) -> None:
        """`note` stays until another one is given."""
        self.note = self.note if note is None else note
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=self.note)
        elif (now := time.monotonic()) - self.last_line >= PLAIN_SECONDS:
            self.last_line = now
            left = (now - self.start) / max(done - self.first, 1) * (self.total - done)
            self.say(f"{self.what} {done}/{self.total} {self.unit}  {self.note}  {duration(left)} left")

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def duration(seconds: float) -> str:
    """65 -> '1:05'"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class RunLog:
    """log.jsonl and TensorBoard of one run. Resuming at a step drops what was logged after it."""

    def __init__(self, folder: Path, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # imports slowly

        path = folder / "log.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line).get("step", 0) <= step]
        path.write_text("".join(kept))
        self.file: TextIO = path.open("a", buffering=1)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One object on one line; numbers also go to TensorBoard as KIND/NAME."""
        self.file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.file.close()
        self.writer.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines that parse; a process that was killed may have left half a line."""
    lines = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            json.loads(line)
        except ValueError:
            break
        lines.append(line)
    return lines
