"""Pooled features of files and folders, as a table."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.config import MAX_WORKERS
from normfree.data import find_images
from normfree.deploy.rows import check_readable, pass_rows, read_rows, write_rows
from normfree.engine.device import pick_device
from normfree.errors import InputError, check_range
from normfree.files import check_writable, replacing, sha256, utf8
from normfree.tasks import features
from normfree.weights.file import package_version
from normfree.weights.read import find_file

ENDINGS = (".parquet", ".npy", ".csv")
_GROUP = 4096  # rows that Parquet stores together


@dataclass(frozen=True)
class Embedding:
    """The features of one image, (num_features,) float32, or the reason why there are none."""

    path: str
    features: np.ndarray | None
    error: str = ""


def write_embeddings(
    weights: str, paths: Sequence[str], out: str, px: int | None = None, device: str | None = None, workers: int = 0
) -> int:
    """Writes pooled features before the classifier, not normalised, of all images in `paths`, files and folders.

    Rows are in the order of the images. A call with the same arguments continues an interrupted `.csv` or `.npy`, as
    in `write_predictions`; a `.parquet` begins anew.

    Args:
        weights: a weight file of a network, with or without a classifier.
        out: a new file. `.parquet`: columns path, embedding (null for an image that cannot be read) and error; how the
            features were made, as JSON, is the schema's metadata "normfree". `.csv`: path, f0, f1, ..., error. `.npy`:
            (images, num_features) float32, NaN for an image that cannot be read; OUT.json, with `.npy` left out, has
            the paths and numbers of these rows, and how the features were made. (Not a text file of paths: a name may
            have a line break.)
        px: side of the images; None: the file's pixels for evaluation.
        workers: processes that read images.

    Returns:
        how many images could not be read.

    Raises:
        InputError: an argument that cannot be used; no image could be read.
        OSError: a full disk.
        Interrupted: SIGINT or SIGTERM came.
    """
    check_writable(out, endings=ENDINGS)
    kind = Path(out).suffix
    sidecar = Path(out).with_suffix(".json")
    if kind == ".npy":
        check_writable(sidecar, replace=Path(f"{out}.partial").exists())
    arrow = _pyarrow() if kind == ".parquet" else None
    check_range("workers", workers, 0, MAX_WORKERS)
    where = pick_device(device)
    files, failed = find_images(paths)
    model, info = features.load_embedder(weights, px)
    model = model.to(where).to(memory_format=torch.channels_last)
    crop = {"px": info.eval_px, "crop": info.eval_crop, "crop_fraction": info.crop_fraction}
    about = {"weights": weights, "weights_sha256": sha256(find_file(weights)), "architecture": info.architecture}
    about |= crop | {"features": "pooled pre-logits, not normalised", "normfree": package_version()}

    def compute(images: Tensor) -> np.ndarray:
        return features.embed(model, images).cpu().numpy()

    def batches(start: int) -> Iterator[list[Embedding]]:
        for rows in read_rows(info, files[start:], failed, compute, where, workers):
            yield [_checked(*row) for row in rows]

    if arrow is not None:
        return _write_parquet(arrow, out, files, batches(0), model.num_features, about)
    size = (len(files), model.num_features)
    encode = partial(_npy, size) if kind == ".npy" else partial(_csv, model.num_features)
    complete = partial(_describe, files, about, sidecar) if kind == ".npy" else lambda path: None
    return write_rows("embed", weights, files, {"--px": info.eval_px}, out, batches, encode, complete)


def _checked(path: str, row: np.ndarray | None, error: str) -> Embedding:
    """A row whose features are finite, or an error."""
    if row is not None and not np.isfinite(row).all():
        return Embedding(path, None, f"{path}: its features are not finite")
    return Embedding(path, row, error)


def _csv(width: int, rows: Sequence[Embedding], first: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if first:
        writer.writerow(["path", *(f"f{i}" for i in range(width)), "error"])
    for row in rows:  # nine digits give the same float32 back
        values = [""] * width if row.features is None else [f"{value:.9g}" for value in row.features.tolist()]
        writer.writerow([row.path, *values, row.error])
    return text.getvalue()


def _npy(shape: tuple[int, int], rows: Sequence[Embedding], first: bool) -> bytes:
    header = io.BytesIO()
    if first:
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    empty = np.full(shape[1], np.nan, np.float32)
    values = np.stack([empty if row.features is None else row.features for row in rows])
    return header.getvalue() + values.astype("<f4").tobytes()


def _describe(files: Sequence[str], about: Mapping[str, Any], sidecar: Path, array: Path) -> None:
    """Writes the file beside a finished array."""
    missing = np.flatnonzero(np.isnan(np.load(array, mmap_mode="r")[:, 0])).tolist()
    with replacing(sidecar) as temporary:
        temporary.write_bytes(utf8(json.dumps({**about, "unreadable": missing, "paths": files}, ensure_ascii=False)))


def _pyarrow() -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise InputError(
            'Parquet needs the library pyarrow: pip install "normfree[data]"; --out X.csv and X.npy need nothing'
        ) from None


def _write_parquet(
    arrow: Any,
    out: str,
    files: Sequence[str],
    batches: Iterator[list[Embedding]],
    width: int,
    about: Mapping[str, Any],
) -> int:
    """Writes all rows beside `out`, which is renamed when it is whole; returns how many are errors."""
    kinds = [("path", arrow.string()), ("embedding", arrow.list_(arrow.float32(), width)), ("error", arrow.string())]
    schema = arrow.schema(kinds, metadata={"normfree": json.dumps(about)})
    rows: list[Embedding] = []

    def flush() -> None:
        missing = np.array([row.features is None for row in rows])
        values = [np.zeros(width, np.float32) if row.features is None else row.features for row in rows]
        column = arrow.FixedSizeListArray.from_arrays(np.concatenate(values), width, mask=arrow.array(missing))
        paths = arrow.array([utf8(row.path).decode() for row in rows], arrow.string())
        errors = arrow.array([utf8(row.error).decode() or None for row in rows], arrow.string())
        writer.write_table(arrow.Table.from_arrays([paths, column, errors], schema=schema))
        rows.clear()

    def write(new: Sequence[Embedding], done: int, unreadable: int) -> None:
        rows.extend(new)
        if len(rows) >= _GROUP or done == len(files):
            flush()

    with replacing(out) as temporary, arrow.parquet.ParquetWriter(temporary, schema) as writer:
        stopped = f"; {out} was not written"
        unreadable = pass_rows("embed", batches, write, len(files), go_on=stopped)
        check_readable(unreadable, files)
    return unreadable
