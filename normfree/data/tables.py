"""Images in tables: Parquet files and data sets of the Hugging Face Hub, by the optional library `datasets`; CSV files
that list image files and their labels."""

from __future__ import annotations

import contextlib
import csv
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl

import numpy as np

from normfree.config import InputError
from normfree.data.images import FolderImages, ImageSet, Parts, UnreadableImage
from normfree.data.remote import plain_errors
from normfree.data.shards import named_parts, role_of, split_files

LIST_SUFFIXES = (".csv", ".tsv")

_OPTIONS = ("image", "label", "config")
_NAMES = {  # that columns go by, the usual ones first
    "image": ("image", "path", "file", "filename", "filepath", "image_path", "image_name", "image_id", "img"),
    "label": ("label", "labels", "class", "cls", "target", "category", "label_name", "class_name"),
    "split": ("split", "set", "subset", "partition"),
}
_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_LABEL_TYPES = {"string", "large_string", "string_view", "bool", *_INTEGERS}
_IMAGE_TYPES = {"struct", "binary", "large_binary", "binary_view", "fixed_size_binary"}


@dataclass(kw_only=True, eq=False)
class TableImages(ImageSet):
    """Image i is in row `rows[i]` of `table`, a `datasets.Dataset` whose only column has bytes or a path."""

    table: Any
    column: str
    part: str
    rows: np.ndarray

    def source(self, index: int) -> str | bytes:
        stored = self.table[int(self.rows[index])][self.column] or {}
        if source := stored.get("bytes") or stored.get("path"):
            return source
        raise UnreadableImage(self.name(index), "there is no image in its row")

    def name(self, index: int) -> str:
        return f"{self.part}/{self.rows[index]:07d}"

    def subset(self, indices: Sequence[int]) -> Self:
        return replace(self, rows=self.rows[list(indices)], targets=[self.targets[i] for i in indices])


def table_parts(where: str | Sequence[str], query: str = "") -> Parts:
    """The parts of `hf://datasets/OWNER/NAME`, or of Parquet files (a pattern, or their names).

    `query` is `image=COLUMN&label=COLUMN&config=NAME`, as far as it is needed. InputError for all that can go wrong.
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
        by_part = split_files(files)
        with plain_errors(files[0]):
            from pyarrow.parquet import read_metadata  # `datasets` has no parts without rows

            for part, names in by_part.items():
                if not sum(read_metadata(name).num_rows for name in names):
                    raise InputError(f"{names[0]} has no rows, and so no {part} images; add some, or take it away")
            loaded = load_dataset("parquet", data_files=by_part)
    splits = {str(split): table for split, table in loaded.items()}
    return named_parts(splits, lambda split: _images(splits[split], split, options))


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query))
    if unknown := options.keys() - set(_OPTIONS):
        raise InputError(f"?{query}: {min(unknown)!r} is not one of {', '.join(_OPTIONS)}")
    return options


def list_parts(files: Sequence[str], query: str = "") -> Parts:
    """The parts of a data set whose images are listed in CSV files: their paths and labels, under a header.

    A column `split`, or the names of the files, may say which part they are. Paths start at the folder of their list,
    or at one in it that is called as the list, or "images". `query` is `image=COLUMN&label=COLUMN`, where it is needed.
    """
    options = _options(query)
    root = os.path.commonpath([os.path.dirname(file) or "." for file in files])
    groups = split_files(files)
    groups = {part: names for part, names in groups.items() if role_of(part)} or groups
    if len(files) > 1 or _column("split", next(_rows(files[0]), []), {}) is None:
        return named_parts(
            groups, lambda part: _listed([row for file in groups[part] for row in _read_list(file, options)], root)
        )
    by_part: dict[str, list[_Row]] = {}
    for row in _read_list(files[0], options):
        by_part.setdefault(row.part, []).append(row)
    return named_parts(by_part, lambda part: _listed(by_part[part], root))


def is_label_list(file: str) -> bool:
    """Whether the header of a CSV file has a column for images and one for labels."""
    with contextlib.suppress(InputError):
        header = next(_rows(file), [])
        return None not in (_column(what, header, {}) for what in ("image", "label"))
    return False


class _Row(NamedTuple):
    part: str
    path: str
    label: str


def _rows(file: str) -> Iterator[list[str]]:
    """The rows of a CSV file, first its header; commas, semicolons or tabs are between the columns."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            delimiter = max(",;\t", key=lines.readline().count)
            lines.seek(0)
            yield from (row for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True) if any(row))
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read {file} ({reason})") from None


def _column(what: str, header: Sequence[str], options: dict[str, str]) -> int | None:
    """Which column it is: the one that the user names, else the first of the usual names."""
    plain = [name.strip().lower().replace("file_", "file") for name in header]
    if what in options:
        return header.index(options[what]) if options[what] in header else None
    return next((plain.index(name) for name in _NAMES[what] if name in plain), None)


def _read_list(file: str, options: dict[str, str]) -> list[_Row]:
    """What a list says. InputError where columns, labels or files are missing."""
    header, *rows = list(_rows(file)) or [[]]
    columns = [_column(what, header, options) for what in _NAMES]
    for what, column in zip(("image", "label"), columns, strict=False):
        if column is None:
            raise InputError(f"which column of {file} is the {what}? add ?{what}=COLUMN; there are {', '.join(header)}")
    if not rows:
        raise InputError(f"{file} lists no images: it needs a row for each, under its header")
    found, missing = [], []
    place, ending = "", None
    for row in rows:
        path, label, part = ("" if c is None or c >= len(row) else row[c] for c in columns)
        part, label = part if columns[2] is None else role_of(part), label.strip()
        if not path or not label or part is None:
            needs = "a path and a label" + (", and a split, train, validation or test" if part is None else "")
            raise InputError(f"{file}: a row needs {needs}: {','.join(row)[:100]!r}")
        if ending is None:
            place, ending = _place(file, path)
        path = os.path.join(place, path + ending)
        if not os.path.isfile(path):
            path = path.replace("\\", "/")
        if not os.path.isfile(path):
            missing.append(path)
        found.append(_Row(part, path, label))
    if missing:
        raise InputError(f"{file} lists {len(missing)} of {len(found)} images that are not there, such as {missing[0]}")
    return found


def _place(file: str, path: str) -> tuple[str, str]:
    """The folder at which the paths of a list start, and what they lack at the end, by the first `path`."""
    folder, name = os.path.split(file)
    for place in (folder, os.path.join(folder, os.path.splitext(name)[0]), os.path.join(folder, "images")):
        for ending in ("", ".jpg", ".jpeg", ".png"):
            if os.path.isfile(os.path.join(place, path + ending)):
                return place, ending
    return folder, ""


def _listed(rows: Sequence[_Row], root: str) -> FolderImages:
    """The images of these rows, each once, whatever the order of the rows."""
    labels: dict[str, str] = {}
    for row in rows:
        path = os.path.relpath(row.path, root).replace(os.sep, "/")
        if labels.setdefault(path, row.label) != row.label:
            raise InputError(f"{path} is listed as {labels[path]!r} and as {row.label!r}: keep one of the rows")
    numbers = all(label.isdecimal() for label in labels.values())
    names = sorted(set(labels.values()), key=lambda label: (int(label) if numbers else 0, label))
    place = {name: target for target, name in enumerate(names)}
    paths = sorted(labels)
    return FolderImages(
        class_names=tuple(names), targets=[place[labels[path]] for path in paths], root=root, paths=paths
    )


def _images(table: Any, part: str, options: dict[str, str]) -> TableImages:
    from datasets import ClassLabel, Image, Value

    image = _choose("image", table, options, {"Image"}, _IMAGE_TYPES)
    label = _choose("label", table, options, {"ClassLabel"}, _LABEL_TYPES)
    written = table[label][:]
    named = isinstance(table.features[label], ClassLabel)
    if None in written or (named and min(written, default=0) < 0):
        raise InputError(f"images of {part} have no label in column {label!r}: use a part, or a column, that has them")
    names = sorted(set(written))
    place = {name: target for target, name in enumerate(names)}
    if isinstance(table.features[image], Value):  # not every kind of bytes can become images by itself
        table = table.cast_column(image, Value("large_binary"))
    return TableImages(
        class_names=tuple(table.features[label].names if named else map(str, names)),
        targets=written if named else [place[label] for label in written],
        table=table.select_columns([image]).cast_column(image, Image(decode=False)),
        column=image,
        part=part,
        rows=np.arange(len(table)),
    )


def _choose(what: str, table: Any, options: dict[str, str], sure: set[str], possible: set[str]) -> str:
    """The column that the user names; else the only one of a type that is `sure`, then of one that is `possible`; else
    the one that is called as it should be."""

    def of(types: set[str]) -> list[str]:
        return [name for name, feature in table.features.items() if _type(feature) in types]

    found = (
        [name for name in of(sure | possible) if name == options[what]] if what in options else of(sure) or of(possible)
    )
    if len(found) > 1:
        found = [column for name in _NAMES[what] for column in found if column.lower() == name][:1]
    if not found:
        columns = ", ".join(f"{name} ({_type(feature)})" for name, feature in table.features.items())
        raise InputError(f"which column is the {what}? add ?{what}=COLUMN; there are {columns}")
    return found[0]


def _type(feature: Any) -> str:
    """The name of a column's type: of `datasets`' class, or of Arrow's type where that is all it is."""
    if isinstance(feature, dict):
        return "struct" if "bytes" in feature else "other"
    return feature.dtype.partition("[")[0] if type(feature).__name__ == "Value" else type(feature).__name__
