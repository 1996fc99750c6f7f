"""A row for each image of files and folders: reads them in batches, and writes a file that can be continued."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from normfree.data import FolderImages
from normfree.data.remote import short_hash
from normfree.engine.log import progress
from normfree.engine.loop import Interrupted, Signals
from normfree.errors import InputError
from normfree.files import replacing, sha256, utf8
from normfree.tasks.accuracy import batches_for, prepare
from normfree.weights import ModelInfo
from normfree.weights.read import find_file

BATCH = 32

T = TypeVar("T")


class Row(Protocol):
    """What is known of one image; `error` is why there is nothing, or ""."""

    @property
    def error(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Row)


def read_rows(
    info: ModelInfo,
    files: Sequence[str],
    failed: Mapping[str, str],
    compute: Callable[[Tensor], Iterable[T]],
    device: torch.device,
    workers: int,
) -> Iterator[list[tuple[str, T | None, str]]]:
    """(path, result, error) for each of `files`, in order, in batches.

    `compute` takes prepared images (N, C, H, W) on `device` and returns N results. An image that cannot be read has
    None; `failed` says which paths are no files to read, and why.
    """
    images = FolderImages(root="", paths=[*files])
    for number, batch in enumerate(batches_for(info, images, BATCH, workers)):
        found: dict[int, T] = {}
        if len(batch.indices):
            with torch.inference_mode():
                results = compute(prepare(batch.images, info.mean, info.std, device))
                found = dict(zip(batch.indices.tolist(), results, strict=True))
        reasons, rows = iter(batch.unreadable), []
        for index, path in enumerate(files[number * BATCH : (number + 1) * BATCH], number * BATCH):
            error = "" if index in found else next(reasons)
            rows.append((path, found.get(index), f"{path}: {failed[path]}" if path in failed else error))
        yield rows


def pass_rows(
    what: str,
    batches: Iterable[Sequence[AnyRow]],
    write: Callable[[Sequence[AnyRow], int, int], None],
    total: int,
    done: int = 0,
    unreadable: int = 0,
    go_on: str = "",
    bar: bool = True,
) -> int:
    """Calls `write(rows, done, unreadable)`, with the counts after these rows; returns how many were unreadable.

    `done` rows, `unreadable` of them errors, are there already. `go_on` ends the message of an interruption.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
    """
    with progress(what) as show, Signals() as signals:
        for rows in batches:
            if signals.received:
                raise Interrupted(f"stopped after {done} of {total} images{go_on}", 128 + signals.received)
            errors = [row.error for row in rows if row.error]
            done, unreadable = done + len(rows), unreadable + len(errors)
            write(rows, done, unreadable)
            if bar:
                show(done, total)
            for error in errors:
                print(f"warning: {error}", file=sys.stderr)
    return unreadable


def check_readable(unreadable: int, files: Sequence[str]) -> None:
    """InputError if none of `files` could be read."""
    if unreadable == len(files):
        raise InputError(f"none of the {len(files)} images could be read")


def write_rows(
    what: str,
    weights: str,
    files: Sequence[str],
    options: Mapping[str, object],
    out: str | None,
    batches: Callable[[int], Iterable[Sequence[AnyRow]]],
    encode: Callable[[Sequence[AnyRow], bool], str | bytes],
    complete: Callable[[Path], None] = lambda path: None,
) -> int:
    """Writes the rows of all `files` to standard output, or to `out` by a `Table`; returns how many are errors.

    Args:
        what: the word before the progress bar.
        options: what rows depend on, beside weights and images, by the name of the option.
        batches: called with the number of rows that are there already; gives those that follow.
        encode: the rows of a batch as text (or bytes, for a file), and whether they are the first ones.
        complete: called with the path of the rows when all are there, before they get the name `out`.

    Raises:
        InputError: none of the images could be read; and as `Table`.
        OSError: rows could not be written.
        Interrupted: SIGINT or SIGTERM came.
    """
    with ExitStack() as stack:
        table = None if out is None else Table(out, weights, files, options, stack)
        done, unreadable, go_on = (0, 0, "") if table is None else (table.done, table.unreadable, table.go_on)

        def write(rows: Sequence[AnyRow], now: int, errors: int) -> None:
            content = encode(rows, now == len(rows))
            if table is not None:
                table.add(content if isinstance(content, bytes) else utf8(content), now, errors)
            else:
                sys.stdout.write(str(content))

        bar = table is not None
        unreadable = pass_rows(what, batches(done), write, len(files), done, unreadable, go_on, bar)
        if table is not None:
            complete(table.path)
            table.finish()
    check_readable(unreadable, files)
    return unreadable


class Table:
    """OUT.partial, which gets the name OUT when it has all rows, for this process alone until `stack` is left.

    OUT.partial.json says what they are rows of and how many are whole; what follows these is cut off.

    Raises:
        InputError: OUT is being written by another process, or was begun with other weights, images or `options`.
    """

    def __init__(
        self, out: str, weights: str, files: Sequence[str], options: Mapping[str, object], stack: ExitStack
    ) -> None:
        self.out, self.path, self.state = Path(out), Path(f"{out}.partial"), Path(f"{out}.partial.json")
        # all that rows depend on
        self.key = short_hash("\0".join([sha256(find_file(weights)), *map(str, options.values()), *files]))
        self.done = self.unreadable = 0
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
            if state.get("key") != self.key or state["bytes"] > self.path.stat().st_size:
                others = " or ".join(["weights, images", *options])
                raise InputError(f"{self.path} was begun with other {others}: repeat those, or delete it")
            os.truncate(self.path, state["bytes"])
            self.done, self.unreadable = state["done"], state["unreadable"]

    @property
    def go_on(self) -> str:
        """What to say when the work is stopped."""
        return f"; the rows are in {self.path}: the same command goes on"

    def add(self, content: bytes, done: int, unreadable: int) -> None:
        """Writes rows, with which `done` are there, `unreadable` of them errors."""
        try:
            if not self.done:
                self._save(0)  # half a row may be left of the first ones
            with self.path.open("ab") as file:
                file.write(content)
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
        """Gives the file its name."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.rename(self.out)
        self.state.unlink()
