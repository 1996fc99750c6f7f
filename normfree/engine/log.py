"""Output of a run: log.jsonl, TensorBoard, wandb, and a progress bar or plain lines on the console."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from normfree.errors import InputError
from normfree.files import replacing
from normfree.native import library, status
from normfree.weights.file import package_version

PLAIN_SECONDS = 15.0  # between progress lines without a terminal


class ProgressBar:
    """A bar on a terminal, else a line now and then; on standard error, so that results can be piped."""

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "steps"):
        self.what, self.total, self.unit = what, total, unit
        self.console = Console(stderr=True)
        self.lines = deque([(time.monotonic(), done)], maxlen=5)  # times of the last plain lines, and steps done
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
        """Draws the bar; None keeps the last `note`."""
        self.note = self.note if note is None else note
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=self.note)
        elif (now := time.monotonic()) - self.lines[-1][0] >= PLAIN_SECONDS:
            before, first = self.lines[0]
            left = (now - before) / max(done - first, 1) * (self.total - done)  # by the recent speed
            self.lines.append((now, done))
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


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `show(done, total)`, which draws a bar of images."""
    with contextlib.ExitStack() as stack:
        bars: list[ProgressBar] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(contextlib.closing(ProgressBar(what, total, done, unit="images"))))
            bars[0].update(done)

        yield show


def duration(seconds: float) -> str:
    """65 -> '1:05'"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class RunLog:
    """log.jsonl, TensorBoard and, with a project, wandb. Resuming at a step drops the lines after it.

    wandb keeps what it has and ignores the steps that are taken again; they give the same numbers.
    """

    def __init__(self, folder: Path, step: int = 0, wandb_project: str | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.folder = folder
        self.wandb = None if wandb_project is None else _open_wandb(wandb_project, folder)
        path = folder / "log.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line).get("step", 0) <= step]
        records = [json.loads(line) for line in kept]
        starts = [record for record in records if record["kind"] == "start"]
        self.begun: dict[str, Any] = starts[0] if starts else {}
        self.resumed: dict[str, Any] = starts[-1] if starts else {}
        self.last_lr: float | None = next((r["lr"] for r in reversed(records) if "lr" in r), None)
        with replacing(path) as whole:
            whole.write_text("".join(kept))
        self.file: TextIO = path.open("a", buffering=1)
        self.thread_hook, threading.excepthook = threading.excepthook, _quiet_thread
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes a line, and its numbers to TensorBoard and wandb as KIND/NAME; null if not finite."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if self.wandb is not None and numbers:
            self.wandb.log(numbers, step=step)

    def show(self, step: int, pictures: Mapping[str, Callable[[], Image]]) -> None:
        """Draws pictures for TensorBoard, and for pictures/NAME.jpg, where they replace those of an earlier step."""
        for name, draw in pictures.items():
            picture = draw()
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
            with replacing(self.folder / "pictures" / f"{name}.jpg") as temporary:
                picture.save(temporary, "JPEG", quality=90)

    def differences(self, here: Mapping[str, Any]) -> list[str]:
        """What of `environment` has changed since the run began, one line each."""
        return [f"{k} {v}, was {self.begun[k]}" for k, v in here.items() if self.begun.get(k, v) != v]

    def close(self) -> None:
        self.file.close()
        try:
            self.writer.close()
        finally:
            threading.excepthook = self.thread_hook
        if self.wandb is not None:
            self.wandb.finish()


def _quiet_thread(args: threading.ExceptHookArgs) -> None:
    """No traceback of a full disk: TensorBoard's thread keeps the error for `RunLog.write` or `close`."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def wandb_init() -> Callable[..., Any]:
    """`wandb.init`; InputError if the package is not installed."""
    try:
        return importlib.import_module("wandb").init
    except (ImportError, AttributeError):  # wandb makes a folder `wandb`, which imports as an empty package
        raise InputError("--wandb needs a package that is not installed: pip install wandb") from None


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's numbers depend on besides its configuration."""
    library()  # load it, so that its status names the file
    packages = {name: package_version(name) for name in ("normfree", "torch", "torchvision", "numpy", "pillow")}
    vectors = torch.backends.cpu.get_cpu_capability()
    cpu = {"kernels": status(), "threads": torch.get_num_threads(), "vectors": vectors}
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"device": device.type, **gpu, **packages, **cpu}


def _open_wandb(project: str, folder: Path) -> Any:
    """The wandb run of a run folder, also of a resumed one.

    Its id lies in the folder, since names of folders come again: on another machine, or after one was deleted.
    """
    init, id_file = wandb_init(), folder / "wandb.id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    config = json.loads((folder / "config.json").read_text())
    name = folder.resolve().name
    try:
        return init(project=project, id=id_file.read_text(), resume="allow", name=name, config=config, dir=str(folder))
    except Exception as error:  # not logged in, no connection, an unknown setting, ...
        raise InputError(f"--wandb {project}: {' '.join(str(error).split())}") from None


def _whole_lines(path: Path) -> list[str]:
    """The lines up to the first that does not parse: a killed process may have left half a line."""
    lines = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            json.loads(line)
        except ValueError:
            break
        lines.append(line)
    return lines
