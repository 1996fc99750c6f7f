"""Accuracy of a classifier, exact for any batch size."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.config import MAX_PX, MAX_SEED, MAX_WORKERS
from normfree.data import (
    Batch,
    EvalTransform,
    LabelledImages,
    Samples,
    count_sampled,
    eval_batches,
    normalize,
    open_evaluation,
)
from normfree.engine.device import autocast, pick_device
from normfree.engine.log import progress
from normfree.errors import InputError, check_range
from normfree.files import check_writable, replacing, utf8
from normfree.layers import reuse_weights
from normfree.models import load
from normfree.weights import ModelInfo
from normfree.weights.file import package_version

EVAL_BATCH = 64


@dataclass
class Accuracy:
    """Counts over the images that could be read; `unreadable` lists the others, which count for nothing.

    `confusion[i, j]`: images of class i that were taken for class j, (K, K) int64. `loss_sum`: cross-entropy in nats,
    without smoothing, summed over the images.
    """

    confusion: Tensor
    top5: int = 0
    loss_sum: float = 0.0
    unreadable: list[str] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1_percent(self) -> float:
        return 100 * int(self.confusion.diagonal().sum()) / max(self.num_images, 1)

    @property
    def top5_percent(self) -> float:
        return 100 * self.top5 / max(self.num_images, 1)

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.num_images, 1)

    @property
    def balanced_percent(self) -> float:
        """Mean recall of the classes that have images."""
        images = self.confusion.sum(1)
        shares = self.confusion.diagonal()[images > 0] / images[images > 0]
        return 100 * shares.mean().item() if len(shares) else 0.0

    def scores(self, names: Sequence[str]) -> list[ClassScore]:
        """One for every class, even without images."""
        counts = torch.stack([self.confusion.sum(1), self.confusion.diagonal(), self.confusion.sum(0)], 1).tolist()
        return [ClassScore(name, *row) for name, row in zip(names, counts, strict=True)]

    def mistakes(self, names: Sequence[str], most: int = 5) -> list[str]:
        """The most frequent confusions of two classes, such as "dog taken for cat 12 times (8 % of dog)"."""
        wrong = self.confusion - torch.diag(self.confusion.diagonal())
        counts, places = wrong.flatten().sort(descending=True, stable=True)
        lines = []
        for count, place in zip(counts[:most].tolist(), places[:most].tolist(), strict=True):
            if count:
                true, taken = divmod(place, len(names))
                share = 100 * count / int(self.confusion[true].sum())
                percent = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
                times = "once" if count == 1 else f"{count} times"
                lines.append(f"{names[true]} taken for {names[taken]} {times} ({percent} % of {names[true]})")
        return lines

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """Everything, as JSON: percents 0 to 100, scores of classes 0 to 1, None for 0 / 0."""
        return {
            "images": self.num_images,
            "top1": self.top1_percent,
            "top5": self.top5_percent if len(names) > 5 else None,
            "balanced": self.balanced_percent,
            "loss": self.loss,
            "per_class": [score.row() for score in self.scores(names)],
            "confusion": {"classes": list(names), "rows_true_columns_predicted": self.confusion.tolist()},
            "unreadable": self.unreadable,
        }


@dataclass(frozen=True)
class ClassScore:
    """`images` of a class, how many of them were `right`, and how many images, of any class, were `predicted` as it."""

    name: str
    images: int
    right: int
    predicted: int

    @property
    def recall(self) -> float | None:
        return self.right / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        return self.right / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall."""
        return 2 * self.right / (self.images + self.predicted) if self.images + self.predicted else None

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"precision": self.precision, "recall": self.recall, "f1": self.f1}


def score_table(scores: Iterable[ClassScore], most: int | None = None) -> list[str]:
    """A table of recall, precision and F1 in percent, for the classes that occur.

    With more than `most` classes: the worst and the best by recall, half of `most` each.
    """
    rows = [score for score in scores if score.images or score.predicted]
    cut = most // 2 if most is not None and len(rows) > most else 0
    if cut:
        rows.sort(key=lambda score: score.recall or 0)
        rows = rows[:cut] + rows[-cut:]
    width = max((len(score.name) for score in rows), default=0)
    lines = [f"{'':<{width}}  {'recall':>8}  {'precision':>9}  {'F1':>8}  right"]
    for score in rows:
        recall, precision, f1 = (
            "-" if value is None else f"{100 * value:.2f} %" for value in (score.recall, score.precision, score.f1)
        )
        lines.append(f"{score.name:<{width}}  {recall:>8}  {precision:>9}  {f1:>8}  {score.right}/{score.images}")
    return [*lines[: cut + 1], "...", *lines[cut + 1 :]] if cut else lines


def write_report(report: Mapping[str, Any], path: Path, suffix: str) -> None:
    """Writes an evaluation's report as JSON, or for the suffix .csv a row for each class.

    The columns of the CSV file are the scores, then the counts of what images of the class were taken for.
    """
    if suffix == ".csv":
        confusion, file = report["confusion"], StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*report["per_class"][0], *(f"taken for {name}" for name in confusion["classes"])])
        for row, counts in zip(report["per_class"], confusion["rows_true_columns_predicted"], strict=True):
            writer.writerow([*row.values(), *counts])
        text = file.getvalue()
    else:  # one line for each key
        lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in report.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
    path.write_bytes(utf8(text))


def eval_transform(info: ModelInfo) -> EvalTransform:
    return EvalTransform(info.eval_px, info.eval_crop, info.crop_fraction)


def batches_for(
    info: ModelInfo, images: Samples, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Every image once, in order, as the network of `info` takes them: channels, pixels and crop."""
    transform = eval_transform(info)
    options = {"channels": info.in_channels, "min_px": transform.min_px, "pin_memory": pin_memory}
    return eval_batches(images, transform, batch_size=batch_size, workers=workers, **options)


def prepare(images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """Pixels 0 to 255 of a batch (N, C, H, W) -> normalized float32 on `device`, channels last."""
    images = images.to(device, non_blocking=True)
    return normalize(images, mean, std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: str = "float32",
    forward: Callable[..., Any] | None = None,
) -> Accuracy:
    """Runs `model`, or `forward` in its place, in evaluation mode over `batches`; its mode is restored afterwards."""
    was_training = model.training
    model.eval()
    result = Accuracy(torch.zeros(num_classes, num_classes, dtype=torch.int64))
    try:
        with reuse_weights(model):
            for batch in batches:
                result.unreadable += batch.unreadable
                if not len(batch.targets):
                    continue
                with autocast(device, precision):
                    logits = (forward or model)(prepare(batch.images, mean, std, device)).float().cpu()
                result.loss_sum += F.cross_entropy(logits.double(), batch.targets, reduction="sum").item()
                best = logits.topk(min(5, num_classes), 1).indices
                result.top5 += int((best == batch.targets[:, None]).any(1).sum())
                result.confusion.index_put_((batch.targets, best[:, 0]), torch.tensor(1), accumulate=True)
    finally:
        model.train(was_training)
    return result


def pick_workers(workers: int | None, images: Samples) -> int:
    """Number of reading processes: 0 for images in memory; otherwise one core is left to the network."""
    if workers is not None:
        return workers
    return 0 if images.in_memory else min(8, max(1, (os.cpu_count() or 2) - 1))


def evaluate_images(
    model: nn.Module,
    info: ModelInfo,
    images: LabelledImages,
    device: torch.device,
    workers: int,
    precision: str = "float32",
    show: Callable[[int, int], None] = lambda seen, total: None,
    forward: Callable[..., Any] | None = None,
) -> Accuracy:
    """Accuracy of `model` on `images`, prepared as `info` says; `show(done, total)` takes the progress.

    `forward`: what computes logits in place of `model` itself, such as the model compiled.
    """

    def batches() -> Iterator[Batch]:
        for i, batch in enumerate(batches_for(info, images, EVAL_BATCH, workers, device.type == "cuda"), 1):
            yield batch
            show(min(i * EVAL_BATCH, len(images)), len(images))

    return evaluate(model, batches(), info.num_classes, info.mean, info.std, device, precision, forward)


def check_evaluation(workers: int | None, held_out: float | None, seed: int | None) -> None:
    """InputError for options of an evaluation that are out of range, or without effect."""
    check_range("workers", workers, 0, MAX_WORKERS)
    check_range("seed", seed, 0, MAX_SEED)
    if seed is not None and held_out is None:
        raise InputError(f"--seed {seed} says which images were held out; add --held-out with their share")


def warn_of_trained(images: Samples, info: ModelInfo) -> None:
    """Prints a warning if weights are evaluated on images that they were trained on."""
    if seen := count_sampled(images, info.trained_on):
        what = f"images that the weights were trained on are among these ({seen} of {len(info.trained_on)} looked for)"
        print(f"warning: {what}; see --held-out", file=sys.stderr)


def evaluate_weights(
    weights: str,
    data: str,
    px: int | None = None,
    held_out: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | None = None,
) -> tuple[Accuracy, ModelInfo]:
    """Accuracy of a weight file on a folder or packaged set, at `px` pixels (default: the file's).

    `held_out` and `seed` (default: 0) are those of a training that held images out itself: just these are taken.
    `out`: a new file, .json or .csv, for the whole report (`write_report`). Raises InputError.
    """
    check_range("px", px, 8, MAX_PX)
    check_evaluation(workers, held_out, seed)
    check_writable(out, endings=(".json", ".csv"))
    where = pick_device(device)
    model = load(weights).float()
    assert model.info is not None
    info = replace(model.info, eval_px=px or model.info.eval_px)
    if not info.class_names:
        raise InputError(f"{weights} has no class names, so the classes of {data} cannot be matched to its outputs")
    images = open_evaluation(data, info.class_names, held_out=held_out, seed=seed or 0)
    for note in images.notes:
        print(f"warning: {data}: {note}", file=sys.stderr)
    warn_of_trained(images, info)
    model = model.to(where).to(memory_format=torch.channels_last)
    began = time.monotonic()
    with progress("evaluate") as show:
        accuracy = evaluate_images(model, info, images, where, pick_workers(workers, images), show=show)
    if accuracy.num_images == 0:
        raise InputError(f"none of the {len(images)} images of {data} can be read; the first: {accuracy.unreadable[0]}")
    if out is not None:
        crop = {"px": info.eval_px, "crop": info.eval_crop, "crop_fraction": info.crop_fraction}
        machine = {"precision": "float32", "device": str(where), "seconds": round(time.monotonic() - began, 3)}
        report = {"weights": weights, "data": data, "held_out": held_out, "seed": seed}
        report |= accuracy.report(info.class_names) | {"architecture": info.architecture} | crop | machine
        report |= {"versions": {"normfree": package_version(), "torch": torch.__version__}}
        with replacing(out) as temporary:
            write_report(report, temporary, Path(out).suffix)
    return accuracy, info
