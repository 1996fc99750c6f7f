"""Labels for files and folders."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO, StringIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from normfree.config import MAX_WORKERS, InputError, check_range, check_writable, utf8
from normfree.data import EvalTransform, FolderImages, eval_batches, find_images
from normfree.data.remote import short_hash
from normfree.engine.distributed import pick_device
from normfree.engine.evaluate import prepare
from normfree.engine.log import ProgressBar
from normfree.engine.loop import Interrupted
from normfree.models import load

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, most probable first, or the reason why it could not be read."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


def predict(
    weights: str,
    paths: Sequence[str],
    top: int = 1,
    device: str | None = None,
    workers: int = 0,
    show: Callable[[int, int], None] = lambda seen, total: None,
) -> Iterator[Prediction]:
    """The `top` most probable classes of every image in `paths` (files and folders), in order.

    What cannot be found or read has a row with the reason.

    Raises:
        InputError: there is nothing to predict; a weight file or an option that cannot be used.
    """
    return _predict(weights, *find_images(paths), top, device, workers, show)


def _predict(
    weights: str,
    files: Sequence[str],
    failed: Mapping[str, str],
    top: int,
    device: str | None,
    workers: int,
    show: Callable[[int, int], None],
    start: int = 0,
) -> Iterator[Prediction]:
    """`predict` from file number `start` on; `failed` says which paths are no files to read, and why."""
    check_range("workers", workers, 0, MAX_WORKERS)
    where = pick_device(device)
    model = load(weights).float()
    info = model.info
    assert info is not None
    if not info.num_classes:
        raise InputError(f"{weights} has no classifier")
    if not 1 <= top <= info.num_classes:
        raise InputError(f"--top {top}: 1 to {info.num_classes}, the classes of {weights}")
    names = info.class_names or tuple(str(i) for i in range(info.num_classes))
    model = model.to(where).to(memory_format=torch.channels_last)
    transform = EvalTransform(info.eval_px, info.eval_crop, info.crop_fraction)
    rest = list(files[start:])
    images = FolderImages(class_names=names, targets=[0] * len(rest), root="", paths=rest)
    batches = eval_batches(
        images, transform, batch_size=BATCH, workers=workers, channels=info.in_channels, min_px=transform.min_px
    )

    def run() -> Iterator[Prediction]:
        for number, batch in enumerate(batches):
            chunk = rest[number * BATCH : (number + 1) * BATCH]
            results: dict[int, tuple[tuple[str, float], ...]] = {}
            if len(batch.indices):
                with torch.inference_mode():
                    probability = model(prepare(batch.images, info.mean, info.std, where)).float().softmax(1).cpu()
                values, classes = probability.topk(top, 1)
                rows = zip(batch.indices.tolist(), values.tolist(), classes.tolist(), strict=True)
                for index, row_values, row_classes in rows:
                    results[index] = tuple((names[c], v) for c, v in zip(row_classes, row_values, strict=True))
            reasons = iter(batch.unreadable)
            for index, path in enumerate(chunk, number * BATCH):
                error = "" if index in results else next(reasons)
                error = f"{path}: {failed[path]}" if path in failed else error
                yield Prediction(path, results.get(index, ()), error)
            show(start + number * BATCH + len(chunk), len(files))

    return run()


def write_predictions(
    weights: str,
    paths: Sequence[str],
    out: str | None = None,
    top: int = 1,
    device: str | None = None,
    workers: int = 0,
) -> int:
    """`predict` to standard output, or to the CSV or JSON-lines file `out`; returns how many images were unreadable.

    Rows are in OUT.partial until all are there; a call with the same weights, images and `top` goes on after them.
    Files are UTF-8; bytes of a name that are not are written as Python escapes them, \\udc80 to \\udcff.

    Raises:
        InputError: as `predict`; `out` exists, has another suffix, cannot be written, is being written by another
            process, or was begun with other arguments; no image at all could be read.
        OSError: a row could not be written.
        Interrupted: SIGINT or SIGTERM came.
    """
    if out is not None:
        if Path(out).suffix not in (".csv", ".jsonl"):
            raise InputError(f"--out {out}: the name must end in .csv or .jsonl")
        check_writable(out)
    files, failed = find_images(paths)
    with ExitStack() as stack:
        table = None if out is None else stack.enter_context(_Table(out, _key(weights, files, top)))
        done, unreadable = (0, 0) if table is None else table.whole_rows()
        bar = None if out is None else ProgressBar("predict", len(files), done, unit="images")
        if bar is not None:
            stack.callback(bar.close)

        def show(seen: int, total: int) -> None:
            if bar is not None:
                bar.update(seen)

        rows = _predict(weights, files, failed, top, device, workers, show, done)
        write = sys.stdout.write if table is None else table.write
        as_json = out is not None and out.endswith(".jsonl")

        def stop(number: int, frame: object) -> None:
            go_on = "" if table is None else f"; the rows are in {table.path}: the same command goes on"
            raise Interrupted(f"stopped after {done} of {len(files)} images{go_on}", 128 + number)

        stack.enter_context(_on_signals(stop))
        if not as_json and not done:
            ranks = [""] + [f"_{i}" for i in range(2, top + 1)]
            columns = [name + rank for rank in ranks for name in ("label", "probability")]
            write(_csv_line(["path", *columns, "error"]))
        for row in rows:
            write(_json_line(row) if as_json else _csv_line(_cells(row, top)))
            done += 1
            if row.error:
                unreadable += 1
                print(f"warning: {row.error}", file=sys.stderr)
        if table is not None:
            table.finish()
    if unreadable == len(files):
        raise InputError(f"none of the {len(files)} images could be read")
    return unreadable


class _Table:
    """OUT.partial, which gets the name OUT when it has all rows; OUT.partial.key says what they are rows of.

    As a context, it keeps other processes away. Rows are written one by one, so that what is there can be kept.
    """

    def __init__(self, out: str, key: str) -> None:
        self.out, self.key = out, key
        self.path, self.key_path, self.lock = (
            Path(f"{out}.partial"),
            Path(f"{out}.partial.key"),
            FileLock(f"{out}.lock"),
        )
        self.file: FileIO | None = None

    def __enter__(self) -> _Table:
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"--out {self.out} is being written by another process") from None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.close()
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def whole_rows(self) -> tuple[int, int]:
        """How many rows are there already, and how many of these are errors; half a row at the end is cut off."""
        if not self.path.exists():
            return 0, 0
        if not self.key_path.exists() or self.key_path.read_text() != self.key:
            raise InputError(f"{self.path} was begun with other weights, images or --top: repeat those, or delete it")
        is_csv = self.out.endswith(".csv")
        rows = errors = size = 0
        row = b""
        with self.path.open("rb") as file:
            for line in file:
                row += line
                if not line.endswith(b"\n") or (is_csv and row.count(b'"') % 2):  # of a name with a line break
                    continue
                if not (is_csv and size == 0):  # the names of the columns
                    rows += 1
                    text = row.decode()
                    errors += next(csv.reader(StringIO(text)))[-1] != "" if is_csv else "error" in json.loads(text)
                size += len(row)
                row = b""
        os.truncate(self.path, size)
        return rows, errors

    def write(self, text: str) -> None:
        content = utf8(text)
        try:
            if self.file is None:
                self.key_path.write_text(self.key)
                self.file = FileIO(self.path, "a")
            while content:
                content = content[self.file.write(content) :]
        except OSError as error:
            go_on = f"the rows so far are in {self.path}: the same command goes on"
            raise OSError(f"cannot write {self.out}: {(error.strerror or str(error)).lower()}; {go_on}") from None

    def finish(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.rename(self.out)
        self.key_path.unlink()


def _key(weights: str, files: Sequence[str], top: int) -> str:
    """A hash of all that rows depend on: the content of the weight file, the images, the number of classes."""
    content = weights
    if os.path.isfile(weights):
        with open(weights, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    return short_hash("\0".join([content, str(top), *files]))


@contextmanager
def _on_signals(stop: Callable[[int, object], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop`, where this is the main thread."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _csv_line(cells: Sequence[str]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _cells(row: Prediction, top: int) -> list[str]:
    cells = [cell for label, value in row.top for cell in (label, f"{value:.4f}")]
    return [row.path, *cells, *[""] * (2 * top - len(cells)), row.error]


def _json_line(row: Prediction) -> str:
    value: dict[str, Any] = {"path": row.path}
    if row.error:
        value["error"] = row.error
    else:
        value |= {"label": row.top[0][0], "probability": row.top[0][1], "top": row.top}
    return json.dumps(value, ensure_ascii=False) + "\n"
