"""Labels for files and folders."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from normfree.config import MAX_WORKERS
from normfree.data import FolderImages, find_images
from normfree.data.remote import short_hash
from normfree.engine.device import pick_device
from normfree.engine.log import progress
from normfree.engine.loop import Interrupted, Signals
from normfree.errors import InputError, check_range
from normfree.files import check_writable, replacing, sha256, utf8
from normfree.models import load
from normfree.tasks.accuracy import batches_for, prepare

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, most probable first, or the reason why it could not be read."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


def predict(
    weights: str, paths: Sequence[str], top: int = 1, device: str | None = None, workers: int = 0
) -> Iterator[Prediction]:
    """The `top` most probable classes of every image in `paths` (files and folders), in order.

    What cannot be found or read has a row with the reason.

    Raises:
        InputError: there is nothing to predict; a weight file or an option that cannot be used.
    """
    return chain.from_iterable(_predict(weights, *find_images(paths), top, device, workers))


def _predict(
    weights: str,
    files: Sequence[str],
    failed: Mapping[str, str],
    top: int,
    device: str | None,
    workers: int,
    start: int = 0,
) -> Iterator[list[Prediction]]:
    """`predict` from file number `start` on, in batches; `failed` says which paths are no files to read, and why."""
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
    rest = list(files[start:])
    images = FolderImages(root="", paths=rest)
    batches = batches_for(info, images, BATCH, workers)

    def run() -> Iterator[list[Prediction]]:
        for number, batch in enumerate(batches):
            found: dict[int, tuple[tuple[str, float], ...]] = {}
            if len(batch.indices):
                with torch.inference_mode():
                    probability = model(prepare(batch.images, info.mean, info.std, where)).float().softmax(1).cpu()
                values, classes = (best.tolist() for best in probability.topk(top, 1))
                for index, row_values, row_classes in zip(batch.indices.tolist(), values, classes, strict=True):
                    found[index] = tuple((names[c], v) for c, v in zip(row_classes, row_values, strict=True))
            reasons, rows = iter(batch.unreadable), []
            for index, path in enumerate(rest[number * BATCH : (number + 1) * BATCH], number * BATCH):
                error = "" if index in found else next(reasons)
                error = f"{path}: {failed[path]}" if path in failed else error
                rows.append(Prediction(path, found.get(index, ()), error))
            yield rows

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
        OSError: rows could not be written.
        Interrupted: SIGINT or SIGTERM came.
    """
    check_writable(out, endings=(".csv", ".jsonl"))
    files, failed = find_images(paths)
    as_json = out is not None and out.endswith(".jsonl")
    with ExitStack() as stack:
        table = None if out is None else _Table(out, _key(weights, files, top), stack)
        done, unreadable = (0, 0) if table is None else (table.done, table.unreadable)
        batches = _predict(weights, files, failed, top, device, workers, done)
        show = stack.enter_context(progress("predict"))
        signals = stack.enter_context(Signals())
        for rows in batches:
            if signals.received:
                go_on = "" if table is None else f"; the rows are in {table.path}: the same command goes on"
                raise Interrupted(f"stopped after {done} of {len(files)} images{go_on}", 128 + signals.received)
            text = "".join(map(_json_line, rows)) if as_json else _csv(rows, top, header=not done)
            errors = [row.error for row in rows if row.error]
            done, unreadable = done + len(rows), unreadable + len(errors)
            if table is None:
                sys.stdout.write(text)
            else:
                table.add(text, done, unreadable)
                show(done, len(files))
            for error in errors:
                print(f"warning: {error}", file=sys.stderr)
        if table is not None:
            table.finish()
    if unreadable == len(files):
        raise InputError(f"none of the {len(files)} images could be read")
    return unreadable


class _Table:
    """OUT.partial, which gets the name OUT when it has all rows, for this process alone until `stack` is left.

    OUT.partial.json says what they are rows of and how many are whole; what follows these is cut off.
    """

    def __init__(self, out: str, key: str, stack: ExitStack) -> None:
        self.out, self.path, self.state = Path(out), Path(f"{out}.partial"), Path(f"{out}.partial.json")
        self.key, self.done, self.unreadable = key, 0, 0
        lock = FileLock(f"{out}.lock", timeout=0)
        try:
            stack.enter_context(lock)
        except Timeout:
            raise InputError(f"--out {out} is being written by another process") from None
        stack.callback(os.unlink, lock.lock_file)
        if self.path.exists():
            state: dict[str, Any] = {}
            with suppress(OSError, ValueError):
                state = json.loads(self.state.read_text())
            if state.get("key") != key or state["bytes"] > self.path.stat().st_size:
                raise InputError(
                    f"{self.path} was begun with other weights, images or --top: repeat those, or delete it"
                )
            os.truncate(self.path, state["bytes"])
            self.done, self.unreadable = state["done"], state["unreadable"]

    def add(self, text: str, done: int, unreadable: int) -> None:
        """Writes rows, with which `done` are there, `unreadable` of them errors."""
        try:
            if not self.done:
                self._save(0)  # half a row may be left of the first ones
            with self.path.open("ab") as file:
                file.write(utf8(text))
                size = file.tell()
            self.done, self.unreadable = done, unreadable
            self._save(size)
        except OSError as error:
            go_on = f"the rows so far are in {self.path}: the same command goes on"
            raise OSError(f"cannot write {self.out}: {(error.strerror or str(error)).lower()}; {go_on}") from None

    def _save(self, size: int) -> None:
        state = {"key": self.key, "done": self.done, "unreadable": self.unreadable, "bytes": size}
        with replacing(self.state, durable=False) as unfinished:
            unfinished.write_text(json.dumps(state))

    def finish(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.rename(self.out)
        self.state.unlink()


def _key(weights: str, files: Sequence[str], top: int) -> str:
    """A hash of all that rows depend on: the content of the weight file, the images, the number of classes."""
    content = sha256(Path(weights)) if os.path.isfile(weights) else weights
    return short_hash("\0".join([content, str(top), *files]))


def _csv(rows: Sequence[Prediction], top: int, header: bool) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        ranks = [""] + [f"_{i}" for i in range(2, top + 1)]
        writer.writerow(["path", *(name + rank for rank in ranks for name in ("label", "probability")), "error"])
    for row in rows:
        cells = [cell for label, value in row.top for cell in (label, f"{value:.4f}")]
        writer.writerow([row.path, *cells, *[""] * (2 * top - len(cells)), row.error])
    return text.getvalue()


def _json_line(row: Prediction) -> str:
    value: dict[str, Any] = {"path": row.path}
    if row.error:
        value["error"] = row.error
    else:
        value |= {"label": row.top[0][0], "probability": row.top[0][1], "top": row.top}
    return json.dumps(value, ensure_ascii=False) + "\n"
