"""Labels for files and folders."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from normfree.config import InputError
from normfree.data import EvalTransform, FolderImages, eval_batches, find_images
from normfree.engine.distributed import pick_device
from normfree.engine.evaluate import prepare
from normfree.engine.log import ProgressBar
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

    Raises:
        InputError: no such file, a folder without images, a weight file that cannot be used.
    """
    where = pick_device(device)
    files = find_images(paths)
    model = load(weights)
    info = model.info
    assert info is not None
    if not info.num_classes:
        raise InputError(f"{weights} has no classifier")
    names = info.class_names or tuple(str(i) for i in range(info.num_classes))
    model = model.to(where).to(memory_format=torch.channels_last)
    transform = EvalTransform(info.eval_px, info.eval_crop, info.crop_fraction)
    images = FolderImages(class_names=names, targets=[0] * len(files), root="", paths=files)
    batches = eval_batches(
        images, transform, batch_size=BATCH, workers=workers, channels=info.in_channels, min_px=transform.min_px
    )

    def run() -> Iterator[Prediction]:
        for number, batch in enumerate(batches):
            chunk = range(number * BATCH, min((number + 1) * BATCH, len(files)))
            results: dict[int, Prediction] = {}
            if len(batch.indices):
                with torch.inference_mode():
                    probability = model(prepare(batch.images, info.mean, info.std, where)).float().softmax(1).cpu()
                values, classes = probability.topk(min(top, info.num_classes), 1)
                for index, row_values, row_classes in zip(
                    batch.indices.tolist(), values.tolist(), classes.tolist(), strict=True
                ):
                    pairs = tuple((names[c], v) for c, v in zip(row_classes, row_values, strict=True))
                    results[index] = Prediction(files[index], pairs)
            reasons = iter(batch.unreadable)
            for index in chunk:
                yield results.get(index) or Prediction(files[index], error=next(reasons))
            show(chunk.stop, len(files))

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

    Raises:
        InputError: as `predict`; `out` exists or has another suffix; no image at all could be read.
    """
    if out is not None and Path(out).suffix not in (".csv", ".jsonl"):
        raise InputError(f"--out {out}: the name must end in .csv or .jsonl")
    if out is not None and Path(out).exists():
        raise InputError(f"--out {out} exists; nothing was written")
    files = find_images(paths)
    bar = None if out is None else ProgressBar("predict", len(files), unit="images")
    rows = predict(weights, files, top, device, workers, show=lambda n, _: bar.update(n) if bar else None)
    unreadable = total = 0
    try:
        with _target(out) as file:
            write = _json_writer(file) if out is not None and out.endswith(".jsonl") else _csv_writer(file, top)
            for row in rows:
                write(row)
                total += 1
                if row.error:
                    unreadable += 1
                    print(f"warning: {row.error}", file=sys.stderr)
    finally:
        if bar is not None:
            bar.close()
    if unreadable == total:
        raise InputError(f"none of the {total} images could be read")
    return unreadable


@contextmanager
def _target(out: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that has its name only when it is whole."""
    if out is None:
        yield sys.stdout
        return
    partial = Path(f"{out}.partial")
    try:
        with partial.open("w", newline="") as file:
            yield file
        partial.rename(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _csv_writer(file: TextIO, top: int) -> Callable[[Prediction], None]:
    writer = csv.writer(file, lineterminator="\n")
    ranks = [""] + [f"_{i}" for i in range(2, top + 1)]
    writer.writerow(["path", *(name + rank for rank in ranks for name in ("label", "probability")), "error"])

    def write(row: Prediction) -> None:
        cells = [cell for label, value in row.top for cell in (label, f"{value:.4f}")]
        writer.writerow([row.path, *cells, *[""] * (2 * top - len(cells)), row.error])

    return write


def _json_writer(file: TextIO) -> Callable[[Prediction], None]:
    def write(row: Prediction) -> None:
        value: dict[str, Any] = {"path": row.path}
        if row.error:
            value["error"] = row.error
        else:
            value |= {"label": row.top[0][0], "probability": row.top[0][1], "top": row.top}
        file.write(json.dumps(value, ensure_ascii=False) + "\n")

    return write
