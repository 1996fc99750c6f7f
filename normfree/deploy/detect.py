"""Objects in files and folders of images."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from faster_coco_eval import mask as rle
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from normfree.config import MAX_WORKERS
from normfree.data import FolderImages, find_images, ordered_batches
from normfree.engine.device import pick_device
from normfree.engine.log import progress
from normfree.engine.loop import Interrupted, Signals
from normfree.errors import InputError, check_range
from normfree.files import check_writable, replacing, utf8
from normfree.layers import reuse_weights
from normfree.tasks.detection.draw import draw
from normfree.tasks.detection.metrics import as_results, cap_line
from normfree.tasks.detection.model import Detector, load_detector

_PICTURES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
_COLUMNS = ("file", "label", "score", "x1", "y1", "x2", "y2", "area", "error")


@dataclass(frozen=True)
class Found:
    """The objects of one image, as COCO results with names, or the reason why it could not be read."""

    path: str
    number: int
    """Its place among the images, from 1."""
    size: tuple[int, int] = (0, 0)
    """Height and width, upright."""
    objects: tuple[dict[str, Any], ...] = ()
    error: str = ""


def write_detections(
    weights: str,
    paths: Sequence[str],
    out: str | None = None,
    pictures: str | None = None,
    min_score: float | None = None,
    draw_score: float = 0.5,
    device: str | None = None,
    workers: int = 0,
) -> int:
    """The objects in all images of `paths`, files and folders, in order; returns how many images were unreadable.

    One image at a time goes through the network, so that no result depends on other images.

    Args:
        out: a new file. `.json`: an array of COCO results, with names of files and classes; `.jsonl`: a line for each
            image; `.csv`: a row for each object, with the pixels of its mask as `area`. It appears when it is whole.
            None: the rows of `.csv` on standard output.
        pictures: a new folder for the images with their objects drawn, under their names below the folder they share.
        min_score: the least score of what is given, 0 to 1; None: the detector's own.
        draw_score: the least score of what is drawn.
        workers: processes that read images.

    Raises:
        InputError: an argument that cannot be used; no image could be read, and nothing was written.
        OSError: a full disk.
        Interrupted: SIGINT or SIGTERM came; OUT was not written.
    """
    check_writable(out, endings=tuple(_FORMS))
    _check_folder(pictures)
    check_range("workers", workers, 0, MAX_WORKERS)
    for option, value in (("min-score", min_score), ("draw-score", draw_score)):
        check_range(option, value, 0, 1)
    where = pick_device(device)
    files, failed = find_images(paths)
    model = load_detector(weights).float().to(where)
    heads: Any = model.roi_heads
    if min_score is not None:
        heads.score_thresh = min_score
    painter = None if pictures is None else _Painter(pictures, files, model, draw_score)
    counts: list[int] = []
    unreadable = 0

    def watched(show: Callable[[int, int], None], signals: Signals) -> Iterator[Found]:
        """Every image, counted; warnings are said before what comes next is written."""
        nonlocal unreadable
        for found in _detect(model, files, failed, where, workers, painter):
            if signals.received:
                kept = "" if out is None else f"; {out} was not written"
                raise Interrupted(f"stopped after {len(counts)} of {len(files)} images{kept}", 128 + signals.received)
            if found.error:
                unreadable += 1
                print(f"warning: {found.error}", file=sys.stderr)
            counts.append(len(found.objects))
            if out is not None:
                show(len(counts), len(files))
            yield found
        if unreadable == len(files):
            raise InputError(f"none of the {len(files)} images could be read")

    with ExitStack() as stack:
        show, signals = stack.enter_context(progress("detect")), stack.enter_context(Signals())
        parts = _FORMS[".csv" if out is None else Path(out).suffix](watched(show, signals))
        if out is None:
            sys.stdout.writelines(parts)
        else:
            file = stack.enter_context(replacing(out)).open("wb")
            with file:
                file.writelines(map(utf8, parts))
    if unreadable and out is not None and out.endswith(".json"):
        print(f"warning: {out} has no place for the {unreadable} images that could not be read", file=sys.stderr)
    if line := cap_line(counts, heads.detections_per_img):
        print(f"warning: {line}", file=sys.stderr)
    return unreadable


def _detect(
    model: Detector,
    files: Sequence[str],
    failed: Mapping[str, str],
    device: torch.device,
    workers: int,
    painter: _Painter | None,
) -> Iterator[Found]:
    assert model.info is not None
    names = _names(model)
    ids = model.info.category_ids or tuple(range(1, len(names) + 1))
    images = FolderImages(root="", paths=[*files])
    batches = ordered_batches(images, partial(_read, images, model.info.in_channels), _alone, 1, workers)
    for number, (path, (image, error)) in enumerate(zip(files, batches, strict=True), 1):
        if image is None:
            yield Found(path, number, error=f"{path}: {failed[path]}" if path in failed else error)
            continue
        with torch.inference_mode(), reuse_weights(model):
            detections = {name: value.cpu() for name, value in model.detect([image.to(device)])[0][0].items()}
        size = (image.shape[-2], image.shape[-1])
        results = as_results(detections, number, size)
        if painter is not None:
            codes = {"masks": [result["segmentation"] for result in results]} if "masks" in detections else {}
            painter.paint(path, image, detections | codes)
        about = [(result.pop("category_id") - 1, result) for result in results]
        objects = ({"category_id": ids[k], "category_name": names[k]} | result for k, result in about)
        yield Found(path, number, size, tuple({"image_id": number, "file_name": path} | row for row in objects))


def _names(model: Detector) -> tuple[str, ...]:
    assert model.info is not None
    return model.info.class_names or tuple(str(label) for label in range(1, model.num_classes + 1))


def _read(images: FolderImages, channels: int, index: int) -> Tensor:
    return pil_to_tensor(images.read(index, channels))


def _alone(images: list[Tensor], unreadable: tuple[str, ...]) -> tuple[Tensor | None, str]:
    """A batch of one image, or the reason why there is none."""
    return (None, unreadable[0]) if unreadable else (images[0], "")


class _Painter:
    """Writes pictures of detections into `folder`, each under the name that its image has among `files`."""

    def __init__(self, folder: str, files: Sequence[str], model: Detector, min_score: float) -> None:
        self.folder, self.names, self.min_score = Path(folder), _names(model), min_score
        whole = [os.path.abspath(path) for path in files]
        root = os.path.commonpath([os.path.dirname(path) for path in whole])
        names = {path: os.path.relpath(file, root) for path, file in zip(files, whole, strict=True)}
        taken = set(names.values())
        self.places = {path: _as_picture(name, taken) for path, name in names.items()}

    def paint(self, path: str, image: Tensor, detections: dict[str, Any]) -> None:
        picture = draw(image.expand(3, -1, -1), **detections, class_names=self.names, min_score=self.min_score)
        place = self.folder / self.places[path]
        with replacing(place, durable=False) as temporary:
            picture.save(temporary, _PICTURES[place.suffix.lower()], quality=90)


def _as_picture(name: str, taken: set[str]) -> str:
    """`name`, with .png added if its format is not written, and again while that is the name of another image."""
    new = name
    while Path(new).suffix.lower() not in _PICTURES or (new != name and new in taken):
        new += ".png"
    return new


def _check_folder(pictures: str | None) -> None:
    """InputError unless `pictures` can be made, or is an empty folder: no image is ever overwritten."""
    if pictures is not None and os.path.isdir(pictures):
        if os.listdir(pictures):
            raise InputError(f"--pictures {pictures} is not empty; name a new folder")
        check_writable(os.path.join(pictures, "x.jpg"), "--pictures")
    else:
        check_writable(pictures, "--pictures", parents=True)


def _json(images: Iterator[Found]) -> Iterator[str]:
    start = "[\n"
    for found in images:
        for row in found.objects:
            yield start + json.dumps(row, ensure_ascii=False)
            start = ",\n"
    yield "[]\n" if start == "[\n" else "\n]\n"


def _jsonl(images: Iterator[Found]) -> Iterator[str]:
    for found in images:
        line: dict[str, Any] = {"image_id": found.number, "file_name": found.path}
        if found.error:
            line["error"] = found.error
        else:
            height, width = found.size
            own = [{key: row[key] for key in row if key not in line} for row in found.objects]
            line |= {"width": width, "height": height, "objects": own}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _csv(images: Iterator[Found]) -> Iterator[str]:
    yield ",".join(_COLUMNS) + "\n"
    for found in images:
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in found.objects:
            x, y, width, height = row["bbox"]
            area = int(rle.area(row["segmentation"])) if "segmentation" in row else ""
            corners = [f"{value:.2f}" for value in (x, y, x + width, y + height)]
            writer.writerow([found.path, row["category_name"], f"{row['score']:.4f}", *corners, area, ""])
        if found.error:
            writer.writerow([found.path, *[""] * (len(_COLUMNS) - 2), found.error])
        yield text.getvalue()


_FORMS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}
