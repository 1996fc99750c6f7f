"""COCO metrics, losses and pictures of a detector on a set of images."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image

from normfree.data.annotations import as_rle
from normfree.data.coco import (
    DetectionBatch,
    DetectionImages,
    detection_eval_batches,
    open_detection_split,
    problem_lines,
)
from normfree.engine.device import autocast, pick_device
from normfree.engine.log import progress
from normfree.errors import InputError
from normfree.files import check_writable, replacing
from normfree.layers import reuse_weights
from normfree.tasks.accuracy import check_evaluation, pick_workers, warn_of_trained
from normfree.tasks.detection.draw import side_by_side
from normfree.tasks.detection.metrics import ClassAP, Scores, as_results, cap_line, coco_scores, score_table
from normfree.tasks.detection.model import Detector, load_detector

DRAWN_SCORE = 0.5  # detections with a lower score are not drawn


@dataclass
class Evaluated:
    """What an evaluation found. `counts` has the number of detections of each image, `results` all, as COCO results.

    Images that could not be read are in `unreadable`, and neither they nor their objects count.
    """

    box: Scores
    mask: Scores | None
    losses: dict[str, float]
    counts: list[int]
    results: list[dict[str, Any]]
    unreadable: list[str]
    pictures: dict[str, Callable[[], Image]] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Numbers by name: "mask_ap", "box_ap50" and so on, 0 to 1, where there is something to score; and losses."""
        kinds = {"mask": self.mask, "box": self.box}
        names = ("ap", "ap50", "ap75", "small", "medium", "large", "ar100")
        found = {f"{kind}_{name}": getattr(s, name) for kind, s in kinds.items() if s for name in names}
        return {name: value for name, value in found.items() if value is not None} | self.losses

    def cap_line(self) -> str | None:
        """A line if images have as many detections as are kept."""
        return cap_line(self.counts, self.box.max_detections)

    def lines(self) -> list[str]:
        """The scores as tables."""
        line = self.cap_line()
        return [*score_table(self.box, self.mask), *([line] if line else [])]


def evaluate(
    model: Detector,
    images: DetectionImages,
    device: torch.device,
    workers: int,
    precision: str = "float32",
    show: Callable[[int, int], None] = lambda done, total: None,
    num_pictures: int = 0,
) -> Evaluated:
    """Scores of `model` on `images`, which pass one by one, so that no image depends on others through padding.

    `num_pictures` evenly spaced images can be drawn, with their objects beside the detections.
    """
    drawn = set(np.linspace(0, len(images) - 1, min(num_pictures, len(images))).round().astype(int).tolist())
    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    counts: dict[int, int] = {}  # of the images that could be read
    pictures: dict[str, Callable[[], Image]] = {}
    sums: dict[str, float] = {}
    has_losses = images.has_masks or not model.masks
    limits, heads, mode = cast(Any, model.transform), cast(Any, model.roi_heads), model.training
    model.eval()
    try:
        with torch.no_grad(), reuse_weights(model):
            for batch in detection_eval_batches(
                images,
                min_px=limits.min_size[0],
                max_px=limits.max_size,
                masks=model.masks and has_losses,
                batch_size=1,
                workers=workers,
            ):
                unreadable += batch.unreadable
                if batch.images:
                    index, (width, height) = batch.indices[0], batch.sizes[0]
                    pixels, targets = on_device(batch, device)
                    with autocast(device, precision):
                        detections, losses = model.detect(pixels, batch.sizes, targets if has_losses else None)
                    rows = as_results(detections[0], index + 1, (height, width))
                    results += rows
                    counts[index] = len(rows)
                    sums = {name: sums.get(name, 0.0) + value.item() for name, value in losses.items()}
                    if index in drawn:
                        shown = {name: value.cpu() for name, value in detections[0].items()}
                        pictures[f"{index:06d}"] = partial(_picture, images, index, shown)
                show(len(counts) + len(unreadable), len(images))
    finally:
        model.train(mode)
    truth = _only(images.ground_truth(), {index + 1 for index in counts})
    score = partial(coco_scores, truth, results, class_names=images.class_names)
    cap = heads.detections_per_img
    box = score("bbox", max_detections=cap)
    mask = score("segm", max_detections=cap) if model.masks and has_losses else None
    losses = {name: value / len(counts) for name, value in sums.items()}
    return Evaluated(box, mask, losses, list(counts.values()), results, unreadable, pictures)


def on_device(batch: DetectionBatch, device: torch.device) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images and targets of a batch."""
    images = [image.to(device, non_blocking=True) for image in batch.images]
    move = lambda target: {name: value.to(device, non_blocking=True) for name, value in target.items()}  # noqa: E731
    return images, [move(target) for target in batch.targets]


def _only(truth: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The ground truth of these images."""
    images = [image for image in truth["images"] if image["id"] in ids]
    annotations = [each for each in truth["annotations"] if each["image_id"] in ids]
    return truth | {"images": images, "annotations": annotations}


def scores_from(details: Any) -> Scores | None:
    """The scores that `asdict` turned into JSON."""
    if details is None:
        return None
    return Scores(**details | {"per_class": tuple(ClassAP(**row) for row in details["per_class"])})


def evaluate_weights(
    weights: str,
    data: str,
    held_out: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | None = None,
    results: str | None = None,
) -> Evaluated:
    """The function behind `normfree detect eval`. Raises InputError before any work if a file cannot be written."""
    check_writable(out, "--out", endings=(".json",))
    check_writable(results, "--results", endings=(".json",))
    check_evaluation(workers, held_out, seed)
    model = load_detector(weights).float()
    assert model.info is not None
    if not model.info.class_names:
        raise InputError(f"{weights} does not name its classes: give class_names to create_detector")
    place = pick_device(device)
    images = open_detection_split(data, model.info.class_names, held_out, seed or 0)
    for line in (*images.notes, *problem_lines(images)):
        print(f"warning: {data}: {line}", file=sys.stderr)
    warn_of_trained(images, model.info)
    with progress("evaluate") as show:
        found = evaluate(model.to(place), images, place, pick_workers(workers, images), show=show)
    if not found.counts:
        raise InputError(f"none of the {len(images)} images of {data} can be read; the first: {found.unreadable[0]}")
    if out is not None:
        kinds = {"box": asdict(found.box), "mask": found.mask and asdict(found.mask)}
        report = {"weights": weights, "data": data, "held_out": held_out, "seed": seed}
        report |= {"images": len(found.counts), "unreadable": found.unreadable}
        _write(out, report | found.figures() | kinds)
    if results is not None:
        _write(results, _with_their_ids(found.results, images))
    return found


def _with_their_ids(results: Sequence[dict[str, Any]], images: DetectionImages) -> list[dict[str, Any]]:
    """The results with the ids of images and categories in the annotation file."""
    return [
        result
        | {
            "image_id": images.image_ids[result["image_id"] - 1],
            "category_id": images.category_ids[result["category_id"] - 1],
        }
        for result in results
    ]


def _write(path: str, content: Any) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(content) + "\n")


def _picture(images: DetectionImages, index: int, detections: dict[str, torch.Tensor]) -> Image:
    """The objects of an image beside the detections."""
    truth: dict[str, Any] = images.target(index, masks=False)
    if images.has_masks:  # as run lengths: at full size they may be too large for the memory
        objects = (a.segmentation for a in images.annotations[index] if not a.crowd)
        truth["masks"] = [as_rle(segmentation, *images.sizes[index]) for segmentation in objects if segmentation]
    return side_by_side(images.read(index), truth, detections, images.class_names, DRAWN_SCORE)
