"""Accuracy of a classifier, exact for any batch size."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.data import Batch, EvalTransform, Samples, eval_batches, normalize
from normfree.files import utf8
from normfree.layers import reuse_weights
from normfree.weights import ModelInfo


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
        """Mean over the classes that have images of the share that is right."""
        images = self.confusion.sum(1)
        shares = self.confusion.diagonal()[images > 0] / images[images > 0]
        return 100 * shares.mean().item() if len(shares) else 0.0

    def scores(self, names: Sequence[str]) -> list[ClassScore]:
        """Of every class, those without images too."""
        counts = torch.stack([self.confusion.sum(1), self.confusion.diagonal(), self.confusion.sum(0)], 1).tolist()
        return [ClassScore(name, *row) for name, row in zip(names, counts, strict=True)]

    def mistakes(self, names: Sequence[str], most: int = 5) -> list[str]:
        """Lines with the most frequent confusions of two classes, such as "dog taken for cat 12 times (8 % of dog)"."""
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
        """Everything, as JSON: percents 0 to 100, scores of classes 0 to 1, None where nothing can be divided."""
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
    """Lines with recall, precision and F1 in percent of the classes that occur.

    Of more than `most` classes, those of the lowest and of the highest recall, half of `most` each.
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
    """All of an evaluation's report as JSON, or, where `suffix` is .csv, a row for each class.

    The columns of the CSV file are the scores, then the counts of what images of the class were taken for.
    """
    if suffix == ".csv":
        confusion, file = report["confusion"], StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*report["per_class"][0], *(f"taken for {name}" for name in confusion["classes"])])
        for row, counts in zip(report["per_class"], confusion["rows_true_columns_predicted"], strict=True):
            writer.writerow([*row.values(), *counts])
        text = file.getvalue()
    else:  # a line for each key
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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: str = "float32",
) -> Accuracy:
    """Runs `model` in evaluation mode over `batches`; the mode it was in comes back afterwards."""
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
                    logits = model(prepare(batch.images, mean, std, device)).float().cpu()
                result.loss_sum += F.cross_entropy(logits.double(), batch.targets, reduction="sum").item()
                best = logits.topk(min(5, num_classes), 1).indices
                result.top5 += int((best == batch.targets[:, None]).any(1).sum())
                result.confusion.index_put_((batch.targets, best[:, 0]), torch.tensor(1), accumulate=True)
    finally:
        model.train(was_training)
    return result
