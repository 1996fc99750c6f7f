"""Accuracy of a classifier, exact for any batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normfree.data import Batch, normalize
from normfree.layers import reuse_weights


@dataclass
class Accuracy:
    """Counts over the images that could be read; `unreadable` lists the others, which count for nothing.

    `confusion[i, j]`: images of class i that were taken for class j, (K, K) int64.
    """

    confusion: Tensor
    top5: int = 0
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
    def balanced_percent(self) -> float:
        """Mean over the classes that have images of the share that is right."""
        images = self.confusion.sum(1)
        shares = self.confusion.diagonal()[images > 0] / images[images > 0]
        return 100 * shares.mean().item() if len(shares) else 0.0

    def per_class(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        """(class, images that were right, images) for every class that has images."""
        rows = zip(names, self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True)
        return [row for row in rows if row[2]]


def class_table(report: Mapping[str, Mapping[str, int]], most: int = 10) -> list[str]:
    """Lines with the accuracy of each class, from worst to best; of more than `most` classes half of it at either end.

    `report[name]`: how many images of a class were "right", and how many "images" it has, at least 1.
    """
    rows = sorted(report.items(), key=lambda row: row[1]["right"] / row[1]["images"])
    heads = {0: "classes"}
    if len(rows) > most:
        heads = {0: "worst", most // 2: "best"}
        rows = rows[: most // 2] + rows[-(most // 2) :]
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for i, (name, row) in enumerate(rows):
        right, images = row["right"], row["images"]
        lines.append(f"{heads.get(i, ''):<8} {name:<{width}}  {100 * right / images:6.2f} %  {right}/{images}")
    return lines


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
                best = logits.topk(min(5, num_classes), 1).indices
                result.top5 += int((best == batch.targets[:, None]).any(1).sum())
                result.confusion.index_put_((batch.targets, best[:, 0]), torch.tensor(1), accumulate=True)
    finally:
        model.train(was_training)
    return result
