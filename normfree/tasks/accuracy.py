"""Accuracy of a classifier, exact for any batch size."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.config import MAX_SEED, MAX_WORKERS
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
from normfree.layers import reuse_weights
from normfree.models import load
from normfree.tasks.reports import check_outputs, plot_curves, save_reports, versions
from normfree.weights import ModelInfo

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

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Accuracy:
        """Of logits (N, K) for images of the classes `targets` (N,)."""
        accuracy = cls(torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.int64))
        accuracy.count(logits, targets)
        return accuracy

    def count(self, logits: Tensor, targets: Tensor) -> None:
        """Counts images with logits (N, K), on the CPU, and classes (N,)."""
        self.loss_sum += F.cross_entropy(logits.double(), targets, reduction="sum").item()
        best = logits.topk(min(5, logits.shape[1]), 1).indices
        self.top5 += int((best == targets[:, None]).any(1).sum())
        self.confusion.index_put_((targets, best[:, 0]), torch.tensor(1), accumulate=True)

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
                result.count(logits, batch.targets)
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


@dataclass(frozen=True)
class Evaluated:
    """`info` has the classes and pixels of the evaluation, which took `seconds`."""

    accuracy: Accuracy
    info: ModelInfo
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.accuracy.num_images / max(self.seconds, 1e-9)


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
    """`evaluate_resolutions` at one resolution, `px` or that of the file."""
    sides = None if px is None else [px]
    (found,) = evaluate_resolutions(weights, data, sides, held_out, seed, device, workers, out)
    return found.accuracy, found.info


def evaluate_resolutions(
    weights: str,
    data: str,
    px: Sequence[int] | None = None,
    held_out: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | None = None,
    plot: str | None = None,
) -> list[Evaluated]:
    """Accuracy of a weight file on a folder or packaged set, at each of `px` (default: the file's pixels).

    `held_out` and `seed` (default: 0) are those of a training that held images out itself: just these are taken.
    `out`: a new file, .json or .csv, for the whole report (`save_reports`). `plot`: a picture of top-1 over several
    resolutions, .png, .svg or .pdf. Raises InputError.
    """
    check_outputs(px, out, plot)
    check_evaluation(workers, held_out, seed)
    where = pick_device(device)
    model = load(weights).float()
    assert model.info is not None
    info = model.info
    if not info.class_names:
        unmatched = f"the classes of {data} cannot be matched to its outputs"
        raise InputError(f"{weights} has no class names, so {unmatched}; --probe needs none")
    images = open_evaluation(data, info.class_names, held_out=held_out, seed=seed or 0)
    for note in images.notes:
        print(f"warning: {data}: {note}", file=sys.stderr)
    warn_of_trained(images, info)
    model = model.to(where).to(memory_format=torch.channels_last)
    found: list[Evaluated] = []
    for each in (replace(info, eval_px=side) for side in px or (info.eval_px,)):
        began = time.monotonic()
        with progress("evaluate" if len(px or ()) < 2 else f"{each.eval_px} px") as show:
            accuracy = evaluate_images(model, each, images, where, pick_workers(workers, images), show=show)
        if accuracy.num_images == 0:
            raise InputError(
                f"none of the {len(images)} images of {data} can be read; the first: {accuracy.unreadable[0]}"
            )
        found.append(Evaluated(accuracy, each, time.monotonic() - began))
    head = {"weights": weights, "data": data, "held_out": held_out, "seed": seed}
    save_reports(head, [_report(each, where) for each in found], out)
    if plot is not None and px is not None:
        plot_curves(px, {"top-1": [each.accuracy.top1_percent for each in found]}, info.eval_px, plot)
    return found


def resolution_table(results: Sequence[Evaluated]) -> list[str]:
    """Accuracy, loss and speed by resolution, as a table, and which is the best."""
    lines = [f"{'px':>5}  {'top-1':>8}  {'top-5':>8}  {'loss':>7}  images/s"]
    for found in results:
        accuracy = found.accuracy
        top5 = f"{accuracy.top5_percent:.2f} %" if found.info.num_classes > 5 else "-"
        figures = f"{accuracy.top1_percent:>6.2f} %  {top5:>8}  {accuracy.loss:>7.4g}  {found.images_per_second:>8.0f}"
        lines.append(f"{found.info.eval_px:>5}  {figures}")
    best = max(results, key=lambda found: found.accuracy.top1_percent)
    top1 = f"top-1 {best.accuracy.top1_percent:.2f} % at {best.info.eval_px} px"
    return [*lines, f"highest: {top1}, on {best.accuracy.num_images} images"]


def _report(found: Evaluated, device: torch.device) -> dict[str, Any]:
    info = found.info
    crop = {"px": info.eval_px, "crop": info.eval_crop, "crop_fraction": info.crop_fraction}
    machine = {"precision": "float32", "device": str(device), "seconds": round(found.seconds, 3)}
    machine["images_per_second"] = round(found.images_per_second, 1)
    return found.accuracy.report(info.class_names) | {"architecture": info.architecture} | crop | machine | versions()
