"""COCO metrics of detections, and masks as run lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from normfree.errors import InputError
from normfree.weights.file import some

_PASTE_BYTES = 64 * 2**20  # of float32 masks at a time
_SIZES = ("small", "medium", "large")


def encode(boxes: Tensor, masks: Tensor, size: tuple[int, int], threshold: float = 0.5) -> list[dict[str, Any]]:
    """Masks (N, M, M), probabilities within `boxes` (N, 4) in pixels, as COCO's run lengths of an image of `size`.

    `size` is (height, width). Equal to torchvision's `paste_masks_in_image(...) >= threshold`, in bounded memory.
    """
    at_once = max(1, _PASTE_BYTES // (4 * size[0] * size[1]))
    found: list[dict[str, Any]] = []
    for part, where in zip(masks.float().split(at_once), boxes.float().split(at_once), strict=True):
        pasted = paste_masks_in_image(part[:, None], where, size)[:, 0] >= threshold
        pixels = np.asfortranarray(pasted.cpu().numpy().view(np.uint8).transpose(1, 2, 0))
        found += ({"size": [*size], "counts": _text(code["counts"])} for code in rle.encode(pixels))
    return found


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def as_results(detections: Mapping[str, Tensor], image_id: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The detections of one image of `size` (height, width), as `Detector.detect` returns them, as COCO results.

    `category_id` is the label, 1 to K; `segmentation` is there if the detections have masks.
    """
    boxes = detections["boxes"].cpu().double()  # MPS has no float64
    rows = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    found = zip(detections["labels"].tolist(), rows, detections["scores"].tolist(), strict=True)
    results = [{"image_id": image_id, "category_id": k, "bbox": box, "score": score} for k, box, score in found]
    if "masks" in detections:
        codes = encode(detections["boxes"], detections["masks"], size)
        results = [result | {"segmentation": code} for result, code in zip(results, codes, strict=True)]
    return results


@dataclass(frozen=True)
class ClassAP:
    """AP and AP50 of one class, 0 to 1 or None without `objects`, which are counted without crowds."""

    name: str
    objects: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True)
class Scores:
    """COCO's twelve numbers, 0 to 1, or None where there is nothing to score, and a row for each class.

    `small`, `medium` and `large` are AP by the area of the objects: below 32 x 32, to 96 x 96, and above. `ar1`, `ar10`
    and `ar100` are the average recall of the best 1, 10 and `max_detections` of an image and class, `ar_small` and so
    on that of all `max_detections` by area. `detections` were scored.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None
    medium: float | None
    large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    per_class: tuple[ClassAP, ...]
    detections: int
    max_detections: int


def coco_scores(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: Literal["bbox", "segm"],
    class_names: Sequence[str],
    max_detections: int = 100,
) -> Scores:
    """COCO metrics of `results` on every image of `ground_truth`, a COCO dict with the classes 1 to K.

    At most `max_detections` of an image and class count, the best by score; of equal scores the first. Neither
    argument is changed. Raises InputError for ground truth that COCO's metrics would silently score wrong.
    """
    truth = [dict(annotation) for annotation in ground_truth["annotations"]]  # the library writes into them
    _check(ground_truth, results, kind, len(class_names))
    key = "bbox" if kind == "bbox" else "segmentation"  # with both, sizes would be those of boxes
    kept = [{name: result[name] for name in ("image_id", "category_id", "score", key)} for result in results]
    categories = [{"id": k, "name": name} for k, name in enumerate(class_names, 1)]
    images = [dict(image) for image in ground_truth["images"]]
    dataset = COCO({"images": images, "annotations": truth, "categories": categories}, print_function=_silent)
    if kept:
        detections = dataset.loadRes(kept)
    else:  # before 1.8, `loadRes` of the library fails
        detections = COCO({"images": images, "annotations": [], "categories": categories}, print_function=_silent)
    run = COCOeval_faster(dataset, detections, kind, print_function=_silent)
    limits = [min(most, max_detections) for most in (1, 10)] + [max_detections]
    run.params.maxDets = sorted(set(limits))
    run.evaluate()
    run.accumulate()
    precision, recall = run.eval["precision"], run.eval["recall"]  # (IoU, recall, class, size, limit), without recall
    places = [run.params.maxDets.index(limit) for limit in limits]
    objects = Counter(annotation["category_id"] for annotation in truth if not annotation.get("iscrowd"))
    rows = (
        ClassAP(name, objects[k + 1], _mean(precision[:, :, k, 0, -1]), _mean(precision[0, :, k, 0, -1]))
        for k, name in enumerate(class_names)
    )
    return Scores(
        *(_mean(precision[part, :, :, 0, -1]) for part in (slice(None), 0, 5)),
        *(_mean(precision[:, :, :, size, -1]) for size in (1, 2, 3)),
        *(_mean(recall[:, :, 0, place]) for place in places),
        *(_mean(recall[:, :, size, -1]) for size in (1, 2, 3)),
        per_class=tuple(rows),
        detections=len(kept),
        max_detections=max_detections,
    )


def _silent(*_: object) -> None:
    pass


def _mean(values: np.ndarray) -> float | None:
    """The mean of what was scored: -1 stands where there is nothing to score."""
    scored = values[values > -1]
    return float(scored.mean()) if scored.size else None


def _check(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: str, num_classes: int) -> None:
    """InputError for ids that the metrics would drop or take for something else, and for objects without masks."""
    truth = ground_truth["annotations"]
    ids = {annotation["id"] for annotation in truth}
    if 0 in ids or len(ids) < len(truth):
        what = "0, which COCO's metrics take for 'no match'" if 0 in ids else "that occur twice"
        raise InputError(f"the ground truth has annotation ids {what}; number them from 1")
    known = {"category_id": set(range(1, num_classes + 1)), "image_id": {row["id"] for row in ground_truth["images"]}}
    for name, rows in (("ground truth has", truth), ("results have", results)):
        for key, allowed in known.items():
            if other := {row[key] for row in rows} - allowed:
                raise InputError(f"the {name} {key} {min(other)}, which is not one of the {len(allowed)} known")
    if kind == "segm" and (bare := sum(not annotation.get("segmentation") for annotation in truth)):
        raise InputError(f"{bare} of {len(truth)} objects have no mask, so masks cannot be scored; score boxes alone")


def score_table(box: Scores, mask: Scores | None, most: int = 20) -> list[str]:
    """Totals of boxes and masks in percent, then a row for each class that has objects.

    With more than `most` such classes: the worst and the best by AP of boxes, half of `most` each.
    """
    columns = [box] if mask is None else [box, mask]
    lines = [f"{'':<9}  {'box':>8}" + f"  {'mask':>8}" * (mask is not None)]
    for name in ("AP", "AP50", "AP75", *_SIZES):
        values = [getattr(scores, name.lower()) for scores in columns]
        empty = "n/a (no objects of this size)" if name in _SIZES else "n/a (no objects)"
        cells = "  ".join(map(_percent, values)) if values[0] is not None else empty
        lines.append(f"{'AP ' * (name in _SIZES) + name:<9}  {cells}")
    if not box.detections:
        lines.append("nothing was detected")
    masks = box.per_class if mask is None else mask.per_class
    rows = [(row, other) for row, other in zip(box.per_class, masks, strict=True) if row.objects]
    cut = most // 2 if len(rows) > most else 0
    if cut:
        rows.sort(key=lambda pair: pair[0].ap or 0)
        rows = rows[:cut] + rows[-cut:]
    width = max((len(row.name) for row, _ in rows), default=0)
    table = [f"{'':<{width}}  {'objects':>7}  {'box AP':>8}  {'box AP50':>8}" + "   mask AP" * (mask is not None)]
    for row, other in rows:
        cells = [_percent(row.ap), _percent(row.ap50), *[_percent(other.ap)] * (mask is not None)]
        table.append(f"{row.name:<{width}}  {row.objects:>7}  {'  '.join(cells)}")
    table = [*table[: cut + 1], "...", *table[cut + 1 :]] if cut else table
    empty = [row.name for row in box.per_class if not row.objects]
    notes = [f"n/a (no objects): {len(empty)} of {len(box.per_class)} classes: {some(empty)}"] if empty else []
    return [*lines, "", *table, *notes]


def _percent(value: float | None) -> str:
    return f"{'n/a' if value is None else f'{100 * value:.2f} %':>8}"


def cap_line(counts: Sequence[int], cap: int) -> str | None:
    """A line if images have as many detections as are kept at most; `counts` has one number for each image."""
    full = sum(count >= cap for count in counts)
    if not full:
        return None
    images = f"{full} of {len(counts)} images {'has' if full == 1 else 'have'}"
    return f"{images} {cap} detections, the most that are kept: further objects are missing if there are any"
