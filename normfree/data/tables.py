"""Images in tables: Parquet files and data sets of the Hugging Face Hub (by the optional library `datasets`), CSV files
that list image files and labels."""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import parse_qsl

import numpy as np

from normfree.data.images import FolderImages, LabelledImages, Samples, UnreadableImage
from normfree.data.remote import plain_errors
from normfree.data.splits import Splits, named_splits, role_of, split_files
from normfree.errors import InputError

LIST_SUFFIXES = (".csv", ".tsv")

_OPTIONS = ("image", "label", "config")
_NAMES = {  # usual names of columns, by priority
    "image": ("image", "path", "file", "filename", "filepath", "image_path", "image_name", "image_id", "img"),
    "label": ("label", "labels", "class", "cls", "target", "category", "label_name", "class_name"),
    "split": ("split", "set", "subset", "partition"),
}
_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_LABEL_TYPES = {"string", "large_string", "string_view", "bool", *_INTEGERS}
_IMAGE_TYPES = {"struct", "binary", "large_binary", "binary_view", "fixed_size_binary"}


@dataclass(kw_only=True, eq=False)
class TableImages(Samples):
    """Image i is in row `rows[i]` of `table`, a `datasets.Dataset` whose only column holds bytes or paths."""

    table: Any
    column: str
    split: str
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, index: int) -> str | bytes:
        stored = self.table[int(self.rows[index])][self.column] or {}
        if source := stored.get("bytes") or stored.get("path"):
            return source
        raise UnreadableImage(self.name(index), "there is no image in its row")

    def name(self, index: int) -> str:
        return f"{self.split}/{self.rows[index]:07d}"

    def subset(self, indices: Sequence[int]) -> Self:
        return replace(self, rows=self.rows[list(indices)])


def table_splits(where: str | Sequence[str], query: str = "") -> Splits:
    """The splits of `hf://datasets/OWNER/NAME`, or of Parquet files (a pattern or a list).

    `query` may be `image=COLUMN&label=COLUMN&config=NAME`. Raises InputError.
    """
    options = _options(query)
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            'tables and data sets of the Hub need the library datasets: pip install "normfree[data]"'
        ) from None
    if isinstance(where, str) and where.startswith("hf://"):
        name = where.removeprefix("hf://datasets/")
        if name.count("/") != 1:
            raise InputError(f"{where} names no data set on the Hub: write hf://datasets/OWNER/NAME")
        with plain_errors(where):
            loaded = load_dataset(name, options.get("config"))
    else:
        files = sorted(glob.glob(os.path.expanduser(where))) if isinstance(where, str) else where
        if not files:
            raise InputError(f"no such file: {where}")
        by_split = split_files(files)
        with plain_errors(files[0]):
            from pyarrow.parquet import read_metadata  # `datasets` drops splits without rows

            for split, names in by_split.items():
                if not sum(read_metadata(name).num_rows for name in names):
                    raise InputError(f"{names[0]} has no rows, and so no {split} images; add some, or take it away")
            loaded = load_dataset("parquet", data_files=by_split)
    splits = {str(split): table for split, table in loaded.items()}
    return named_splits(splits, lambda split: _images(splits[split], split, options))


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query))
    if unknown := options.keys() - set(_OPTIONS):
        raise InputError(f"?{query}: {min(unknown)!r} is not one of {', '.join(_OPTIONS)}")
    return options


def list_splits(files: Sequence[str], query: str = "") -> Splits:
    """The splits of a data set whose image paths and labels are listed in CSV files with a header.

    Splits come from a column `split` or from the names of the files. Paths are relative to the folder of the list, or
    to a folder in it called like the list, or "images". `query` may be `image=COLUMN&label=COLUMN`. Raises InputError.
    """
    options = _options(query)
    root = os.path.commonpath([os.path.dirname(file) or "." for file in files])
    groups = split_files(files)
    groups = {part: names for part, names in groups.items() if role_of(part)} or groups
    rows: dict[str, list[tuple[str, str]]] = {}
    for group, names in groups.items():
        for part, path, label in (row for file in names for row in _read_list(file, role_of(group) or group, options)):
            rows.setdefault(part, []).append((path, label))
    return named_splits(rows, lambda part: _listed(rows[part], root))


def is_label_list(file: str) -> bool:
    """Whether the header of a CSV file has a column of images and one of labels."""
    with contextlib.suppress(InputError):
        header = next(_rows(file), [])
        return None not in (_named(what, header, {}) for what in ("image", "label"))
    return False


def _rows(file: str) -> Iterator[list[str]]:
    """The rows of a CSV file, header included; separated by commas, semicolons or tabs."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            delimiter = max(",;\t", key=lines.readline().count)
            lines.seek(0)
            yield from (row for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True) if any(row))
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read {file} ({reason})") from None


def _named(what: str, names: Sequence[str], options: dict[str, str]) -> str | None:
    """The column that the user chose, else the first one with a usual name; None if there is none."""
    if what in options:
        return options[what] if options[what] in names else None
    plain = {name.strip().lower().replace("file_", "file"): name for name in reversed(names)}
    return next((plain[name] for name in _NAMES[what] if name in plain), None)


def _read_list(file: str, group: str, options: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(split, path, label) of each row of a list; without a column of splits, the split is `group`.

    Raises InputError if columns, labels or files are missing.
    """
    header, *rows = list(_rows(file)) or [[]]
    columns = {what: _named(what, header, options) for what in _NAMES}
    for what in ("image", "label"):
        if columns[what] is None:
            raise InputError(f"which column of {file} is the {what}? add ?{what}=COLUMN; there are {', '.join(header)}")
    if not rows:
        raise InputError(f"{file} lists no images: it needs a row for each, under its header")
    place, ending, missing = "", "", []
    for number, row in enumerate(rows):
        cells = dict(zip(header, map(str.strip, row), strict=False))
        path, label, part = (cells.get(column or "", "") for column in columns.values())
        part = role_of(part) if columns["split"] else group
        if not path or not label or not part:
            needs = "a path and a label, and in a column split train, validation or test"
            raise InputError(f"{file}: a row needs {needs}: {','.join(row)[:100]!r}")
        if not number:
            place, ending = _place(file, path)
        path = os.path.join(place, path + ending)
        path = path if os.path.isfile(path) else path.replace("\\", "/")
        missing += [] if os.path.isfile(path) else [path]
        yield part, path, label
    if missing:
        raise InputError(f"{file} lists {len(missing)} of {len(rows)} images that are not there, such as {missing[0]}")


def _place(file: str, path: str) -> tuple[str, str]:
    """(folder, suffix) that complete the paths of a list, found with the first `path`."""
    folder = os.path.dirname(file)
    folders = (folder, os.path.splitext(file)[0], os.path.join(folder, "images"))
    tried = itertools.product(folders, ("", ".jpg", ".jpeg", ".png"))
    return next((found for found in tried if os.path.isfile(os.path.join(found[0], path + found[1]))), (folder, ""))


def _listed(rows: Sequence[tuple[str, str]], root: str) -> LabelledImages:
    """The images of rows (path, label), each once, sorted by path."""
    labels: dict[str, str] = {}
    for path, label in rows:
        path = os.path.relpath(path, root).replace(os.sep, "/")
        if labels.setdefault(path, label) != label:
            raise InputError(f"{path} is listed as {labels[path]!r} and as {label!r}: keep one of the rows")
    numbers = all(label.isdecimal() for label in labels.values())
    names = sorted(set(labels.values()), key=lambda label: (int(label) if numbers else 0, label))
    place = {name: target for target, name in enumerate(names)}
    paths = sorted(labels)
    targets = [place[labels[path]] for path in paths]
    return LabelledImages(samples=FolderImages(root=root, paths=paths), targets=targets, class_names=tuple(names))


def _images(table: Any, split: str, options: dict[str, str]) -> LabelledImages:
    from datasets import ClassLabel, Image, Value

    image = _choose("image", table, options, {"Image"}, _IMAGE_TYPES)
    label = _choose("label", table, options, {"ClassLabel"}, _LABEL_TYPES)
    if not len(table):
        raise InputError(f"part {split!r} has no rows, and so no images")
    written = table[label][:]
    named = isinstance(table.features[label], ClassLabel)
    if None in written or (named and min(written) < 0):
        raise InputError(f"images of {split} have no label in column {label!r}: use a part, or a column, that has them")
    names = sorted(set(written))
    place = {name: target for target, name in enumerate(names)}
    if isinstance(table.features[image], Value):  # `datasets` cannot cast every bytes type to images
        table = table.cast_column(image, Value("large_binary"))
    samples = TableImages(
        table=table.select_columns([image]).cast_column(image, Image(decode=False)),
        column=image,
        split=split,
        rows=np.arange(len(table)),
    )
    return LabelledImages(
        samples=samples,
        targets=written if named else [place[label] for label in written],
        class_names=tuple(table.features[label].names if named else map(str, names)),
    )


def _choose(what: str, table: Any, options: dict[str, str], sure: set[str], possible: set[str]) -> str:
    """The column that the user chose; else the only one of a type in `sure`, or else in `possible`; else by name."""
    types = {name: _type(feature) for name, feature in table.features.items()}
    found = [] if what in options else [name for name, kind in types.items() if kind in sure]
    found = found or [name for name, kind in types.items() if kind in sure | possible]
    column = found[0] if len(found) == 1 and what not in options else _named(what, found, options)
    if column is None:
        columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise InputError(f"which column is the {what}? add ?{what}=COLUMN; there are {columns}")
    return column


def _type(feature: Any) -> str:
    """The type of a column: a class of `datasets`, or the Arrow type of a plain value."""
    if isinstance(feature, dict):
        return "struct" if "bytes" in feature else "other"
    return feature.dtype.partition("[")[0] if type(feature).__name__ == "Value" else type(feature).__name__
