"""What evaluations write: reports at one or several resolutions, and curves over resolutions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from normfree.config import MAX_PX
from normfree.errors import InputError, check_range
from normfree.files import check_writable, replacing, utf8
from normfree.weights.file import package_version

PLOT_SUFFIXES = (".pdf", ".png", ".svg")
# Okabe and Ito's colours, distinguishable without red-green vision; line styles distinguish them in grey
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"), ("#CC79A7", "-."), ("#000000", "-"), ("#E69F00", "--"))


def check_outputs(px: Sequence[int] | None, out: str | None, plot: str | None) -> None:
    """InputError for resolutions and files of an evaluation that cannot be used. None: the file's own resolution."""
    if px is not None and not px:
        raise InputError("--px needs one or more numbers of pixels, as in --px 96 128 160")
    for side in px or ():
        check_range("px", side, 8, MAX_PX)
    if px and len(set(px)) < len(px):
        raise InputError(f"--px {' '.join(map(str, px))}: give each resolution once")
    if plot is not None and len(px or ()) < 2:
        raise InputError(f"--plot {plot} draws accuracy over pixels: give several, as in --px 96 128 160")
    check_writable(out, endings=(".json", ".csv"))
    check_writable(plot, "--plot", endings=PLOT_SUFFIXES, replace=True)
    if out is not None and out == plot:
        raise InputError(f"--out and --plot are both {out}: give two names")


def save_reports(head: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], out: str | None) -> None:
    """Writes the report of each resolution to the .json or .csv file `out`, if there is one.

    One report: `write_report`, with `head` first. Several: `head` with the list "resolutions", or as .csv a row of
    figures for each.
    """
    if out is None:
        return
    suffix = Path(out).suffix
    with replacing(out) as temporary:
        if len(reports) == 1:
            write_report({**head, **reports[0]}, temporary, suffix)
        elif suffix == ".csv":
            rows = [{k: v for k, v in report.items() if not isinstance(v, dict | list)} for report in reports]
            temporary.write_bytes(_csv(rows[0], (row.values() for row in rows)))
        else:
            write_report({**head, "resolutions": reports}, temporary, suffix)


def write_report(report: Mapping[str, Any], path: Path, suffix: str) -> None:
    """Writes an evaluation's report as JSON, or for the suffix .csv a row for each class.

    The columns of the CSV file are the scores, then the counts of what images of the class were taken for.
    """
    if suffix == ".csv":
        confusion = report["confusion"]
        header = [*report["per_class"][0], *(f"taken for {name}" for name in confusion["classes"])]
        rows = zip(report["per_class"], confusion["rows_true_columns_predicted"], strict=True)
        path.write_bytes(_csv(header, ([*row.values(), *counts] for row, counts in rows)))
        return
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in report.items())
    path.write_bytes(utf8("{\n" + ",\n".join(lines) + "\n}\n"))  # one line for each key


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return utf8(file.getvalue())


def versions(*packages: str) -> dict[str, Any]:
    """Those of normfree, torch and `packages`, for a report."""
    found = {"normfree": package_version(), "torch": torch.__version__}
    return {"versions": found | {name: package_version(name) for name in packages}}


def plot_curves(px: Sequence[int], curves: Mapping[str, Sequence[float]], own_px: int, path: str) -> None:
    """Draws accuracies in percent, label -> one for each of `px`, and marks `own_px`, the pixels of the weights."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (label, values), (color, style) in zip(curves.items(), cycle(LINES)):
        xs, ys = zip(*sorted(zip(px, values, strict=True)), strict=True)
        axes.plot(xs, ys, color=color, linestyle=style, marker=".", markersize=8, label=label)
    if min(px) <= own_px <= max(px):
        axes.axvline(own_px, color="0.7", linewidth=1, zorder=0)
    axes.set_xticks(sorted(px))
    axes.set_xlabel(f"evaluation pixels (of the weights: {own_px})")
    axes.set_ylabel("validation top-1 in %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    if len(curves) > 1:
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format=Path(path).suffix[1:])
