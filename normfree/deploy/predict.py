"""Labels for files and folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from normfree.config import MAX_WORKERS
from normfree.data import find_images
from normfree.deploy.rows import read_rows, write_rows
from normfree.engine.device import pick_device
from normfree.errors import InputError, check_range
from normfree.files import check_writable
from normfree.models import load


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

    def best(images: Tensor) -> Iterator[tuple[tuple[str, float], ...]]:
        values, classes = (part.tolist() for part in model(images).float().softmax(1).cpu().topk(top, 1))
        for row_values, row_classes in zip(values, classes, strict=True):
            yield tuple((names[c], v) for c, v in zip(row_classes, row_values, strict=True))

    batches = read_rows(info, files[start:], failed, best, where, workers)
    return ([Prediction(path, found or (), error) for path, found, error in rows] for rows in batches)


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

    def encode(rows: Sequence[Prediction], first: bool) -> str:
        return "".join(map(_json_line, rows)) if as_json else _csv(rows, top, header=first)

    def batches(start: int) -> Iterator[list[Prediction]]:
        return _predict(weights, files, failed, top, device, workers, start)

    return write_rows("predict", weights, files, {"--top": top}, out, batches, encode)


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
