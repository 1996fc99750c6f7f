"""Images with annotated objects (COCO's JSON, Roboflow's export, Pascal VOC): found, read, augmented, in batches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from normfree.data.annotations import (
    Annotation,
    Picture,
    Problems,
    Source,
    as_pixels,
    find_annotations,
    json_files,
    read_annotations,
    read_categories,
    voc_folders,
)
from normfree.data.images import FolderImages, UnreadableImage, _Wrapper, open_image
from normfree.data.loader import ordered_batches, stream_batches
from normfree.data.splits import class_key, hold_out
from normfree.errors import InputError, nearest

_MISSING = "images without a file (left out)"
_UNREADABLE = "files that cannot be read"
_OTHER_SIZE = "files whose size is not that in the annotations"
MISFITS = (_UNREADABLE, _OTHER_SIZE)
FILE_PROBLEMS = (_MISSING, *MISFITS)
"""Kinds of `problems` whose images cannot be used; their lines are "name: reason"."""
_MOST_HEADERS = 5000  # images whose files are compared with the annotations when a data set is opened
_MEAN_COLOR = [124, 116, 104]  # of ImageNet: padding is nearly 0 once it is normalized
_ORIENTATION = 0x0112  # EXIF tag
_UNDO = {  # its values that exchange width and height, and what undoes them
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(kw_only=True)
class DetectionImages(_Wrapper):
    """Images with annotated objects. Everything is in the frame of `read`, whose `sizes` are (width, height).

    An image is read upright, except where EXIF turns it and its annotations are those of the file as it is stored.
    `annotations[i]`, `sizes[i]` and `image_ids[i]` belong to image i, `class_names[k - 1]` and `category_ids[k - 1]`
    to label k; a category that the file of the annotations lacks has the id -1.
    """

    annotations: list[list[Annotation]]
    sizes: list[tuple[int, int]]
    image_ids: list[int]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """Lines to show before training on the images."""
    problems: Problems = field(default_factory=dict)
    """What was left out or changed: lines that name file and annotation, by kind. `problem_lines` shortens them."""
    held_out: bool = False
    """Whether the validation images were taken out of these."""
    batch_size: int = 0
    """If positive, `order` keeps wide and tall images apart in batches of this size."""

    def __post_init__(self) -> None:
        self.in_memory = self.samples.in_memory

    @property
    def has_masks(self) -> bool:
        """Whether every annotation has a segmentation."""
        return all(a.segmentation is not None for annotations in self.annotations for a in annotations)

    def subset(self, indices: Sequence[int]) -> Self:
        columns = {name: [getattr(self, name)[i] for i in indices] for name in ("annotations", "sizes", "image_ids")}
        return replace(self, samples=self.samples.subset(indices), **columns)

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        """Image `index` at full size whatever `min_px`. UnreadableImage too if its size is not the annotations'."""
        image = self.samples.read(index, channels)
        if image.size == self.sizes[index]:
            return image
        stored, orientation = _header(self.source(index))
        if stored == self.sizes[index] and orientation in _UNDO:
            return image.transpose(_UNDO[orientation])
        found, expected = ("{} x {}".format(*size) for size in (image.size, self.sizes[index]))
        raise UnreadableImage(self.name(index), f"its size is {found} px, that of its annotations {expected} px")

    def order(self, rng: np.random.Generator, lead: int = 0) -> np.ndarray:
        """A permutation whose batches are wide or tall, except what is left over at the ends of an epoch."""
        order = self.samples.order(rng, lead)
        if not self.batch_size:
            return order
        rest = order[lead:]
        wide = np.array([width >= height for width, height in self.sizes])[rest]
        kinds = rest[wide], rest[~wide]
        whole = [len(kind) - len(kind) % self.batch_size for kind in kinds]
        batches = [kind[:end].reshape(-1, self.batch_size) for kind, end in zip(kinds, whole, strict=True)]
        left_over = [kind[end:] for kind, end in zip(kinds, whole, strict=True)]
        return np.concatenate([order[:lead], rng.permutation(np.concatenate(batches)).ravel(), *left_over])

    def fingerprint(self, index: int) -> bytes:
        """Name, size and annotations."""
        parts = [super().fingerprint(index), repr(self.sizes[index]).encode()]
        for a in self.annotations[index]:
            parts.append(repr((a.box, self.class_names[a.label - 1], a.crowd, a.area)).encode())
            polygons = [] if isinstance(a.segmentation, dict) else a.segmentation or []
            parts += [np.asarray(polygon, dtype="<f8").tobytes() for polygon in polygons]
            parts += [repr(a.segmentation).encode()] if isinstance(a.segmentation, dict) else []
        return b"\0".join(parts)

    def target(self, index: int, masks: bool) -> dict[str, Tensor]:
        """`boxes` (N, 4) float32 x1, y1, x2, y2, `labels` (N,) int64, `masks` (N, H, W) uint8; without crowds."""
        objects = [a for a in self.annotations[index] if not a.crowd]
        boxes = torch.tensor([a.box for a in objects], dtype=torch.float32).reshape(-1, 4)
        found = {"boxes": boxes, "labels": torch.tensor([a.label for a in objects], dtype=torch.int64)}
        if masks:
            width, height = self.sizes[index]
            empty = torch.zeros((0, height, width), dtype=torch.uint8)
            found["masks"] = torch.cat([empty, *(mask[None] for mask in self.each_mask(index))])
        return found

    def each_mask(self, index: int) -> Iterator[Tensor]:
        """The masks of `target`, (H, W), one at a time: all of them may be too large for the memory."""
        for a in self.annotations[index]:
            if not a.crowd:
                assert a.segmentation is not None, f"{self.name(index)} has a box without a mask"
                yield torch.from_numpy(as_pixels(a.segmentation, *self.sizes[index]))

    def ground_truth(self) -> dict[str, Any]:
        """All objects, crowds too, as a COCO file would hold them, for metrics.

        Ids of annotations start at 1, since metrics take a match with 0 for none. Categories are labels, the id of an
        image is its index + 1.
        """
        images, annotations = [], []
        for index, ((width, height), objects) in enumerate(zip(self.sizes, self.annotations, strict=True)):
            images.append({"id": index + 1, "width": width, "height": height, "file_name": self.name(index)})
            for a in objects:
                x, y, right, bottom = a.box
                row: dict[str, Any] = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": a.label}
                row |= {"bbox": [x, y, right - x, bottom - y], "area": a.area, "iscrowd": int(a.crowd)}
                if a.segmentation is not None:
                    given = a.segmentation
                    row["segmentation"] = dict(given) if isinstance(given, dict) else [list(part) for part in given]
                annotations.append(row)
        categories = [{"id": label, "name": name} for label, name in enumerate(self.class_names, 1)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def problem_lines(images: DetectionImages, at_most: int = 3) -> list[str]:
    """A line for each kind of problem: how many, what, and the first `at_most` of them."""
    return [
        f"{len(lines)} {kind}: {'; '.join(lines[:at_most])}{'; ...' if len(lines) > at_most else ''}"
        for kind, lines in images.problems.items()
    ]


def is_detection(spec: str) -> bool:
    """Whether `spec` is a JSON file, or a folder with annotations of COCO, Roboflow or Pascal VOC."""
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        return bool(json_files(Path(path)) or voc_folders(Path(path)))
    return path.lower().endswith(".json") and os.path.isfile(path)


def open_detection(
    spec: str, *, validation_fraction: float = 0.1, seed: int = 0, strict: bool = False
) -> tuple[DetectionImages, DetectionImages]:
    """Training and validation images of a folder, or of a COCO file and the one of validation beside it.

    Without validation images, about the share `validation_fraction` is held out by `hold_out`. Training leaves out
    files that do not fit their annotations. `notes` of the training images and `problems` of both say what is
    unusual. Raises InputError for what cannot be used at all; if `strict`, for any problem.
    """
    sources = find_annotations(spec)
    first = sources.get("train") or sources.get("")
    if first is None:
        raise InputError(f"{spec} has annotations to validate on but none to train on: add a file of train")
    train, misfits = _open(first)
    notes = list(train.notes)
    train = train.subset([index for index in range(len(train)) if index not in misfits])
    known = {a.label for annotations in train.annotations for a in annotations if not a.crowd}
    if not known:
        reasons = "".join(f"; {line}" for line in problem_lines(train, 1))
        raise InputError(f"{first.path} has no objects to train on{reasons}")
    if unknown := [name for label, name in enumerate(train.class_names, 1) if label not in known]:
        some = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        notes.append(f"{len(unknown)} of {len(train.class_names)} classes have no objects to train on: {some}")
    notes += [] if train.has_masks else ["a box detector is trained (Faster R-CNN): not every object has a mask"]
    if second := sources.get("validation") or sources.get("test"):
        validation, _ = _open(second, train.class_names)
        notes += [f"validation: {note}" for note in validation.notes]
        if train.has_masks and not validation.has_masks:
            notes.append("validation: boxes alone are scored, and there are no losses: not every object has a mask")
        is_test = "validation" not in sources
        notes += ["its test images serve for validation: the best weights are chosen by them"] * is_test
    else:
        train, validation = hold_out(replace(train, held_out=True), validation_fraction, seed)
        validation = replace(validation, problems={}, notes=())
        notes += [f"it has no validation images: about {validation_fraction:.3g} of the images are held out"]
    problems = problem_lines(train, 1) + problem_lines(validation, 1)
    if strict and problems:
        total = sum(len(lines) for images in (train, validation) for lines in images.problems.values())
        raise InputError(f"{spec} has {total} problems; {problems[0]}")
    return replace(train, notes=tuple(notes)), validation


def open_detection_split(
    spec: str, class_names: Sequence[str], held_out: float | None = None, seed: int = 0
) -> DetectionImages:
    """The validation images of a data set, or the images of a COCO file, with labels that index `class_names`.

    With `held_out`, those that `open_detection` holds out for this share and `seed`. Raises InputError for a class that
    is not among the names, if there is a split from which nothing was held out, and if a file of an image is missing.
    """
    sources = find_annotations(spec)
    if held_out is not None:
        if len(sources) > 1 or not (source := sources.get("train") or sources.get("")):
            raise InputError(f"{spec} has validation images of its own: leave out --held-out")
        images, misfits = _open(source, class_names)
        return hold_out(images.subset([i for i in range(len(images)) if i not in misfits]), held_out, seed)[1]
    source = next((sources[role] for role in _evaluated(spec) if role in sources), None)
    if source is None:
        remedy = "add --held-out and --seed as they were in training, or give the file of the annotations"
        raise InputError(f"{spec} has images to train on only: {remedy}")
    images, _ = _open(source, class_names)
    if missing := images.problems.get(_MISSING):
        raise InputError(f"{len(missing)} images of {source.path} are not there, the first is {missing[0]}")
    return images


def _evaluated(spec: str) -> tuple[str, ...]:
    return ("train", "") if os.path.isfile(os.path.expanduser(spec)) else ("validation", "test", "")


def _open(source: Source, class_names: Sequence[str] | None = None) -> tuple[DetectionImages, set[int]]:
    """The images of a source and the indices of those whose files do not fit; labels by `class_names` if given."""
    data = source.load()
    names, notes = read_categories(data, source.path)
    class_names = tuple(names.values() if class_names is None else class_names)
    labels = _labels(data, names, class_names, source.path)
    problems: Problems = {}
    files, sizes = _files(data, source.path, problems)
    root, present = _present(source, files, problems)
    pictures = {
        number: Picture(place, file, *(sizes[number] or _upright_size(root / file)))
        for place, (number, file) in enumerate(present.items())
    }
    annotations, found = read_annotations(data["annotations"], dict.fromkeys(files) | pictures, labels)
    ids = {label: number for number, label in labels.items()}
    images = DetectionImages(
        samples=FolderImages(root=str(root), paths=list(present.values())),
        annotations=annotations,
        sizes=[(picture.width, picture.height) for picture in pictures.values()],
        image_ids=list(pictures),
        class_names=class_names,
        category_ids=tuple(ids.get(label, -1) for label in range(1, len(class_names) + 1)),
        problems=problems | found,
    )
    misfits = _compare(images)
    return replace(images, notes=(*notes, *_notes(images))), misfits


def _labels(data: dict[str, Any], names: dict[int, str], class_names: Sequence[str], path: Path) -> dict[int, int]:
    """{category id: label}. InputError for a class with objects that is not among `class_names`."""
    place = {class_key(name): label for label, name in enumerate(class_names, 1)}
    used = {str(raw.get("category_id")) for raw in data["annotations"] if isinstance(raw, dict)}
    for number, name in names.items():
        if name not in place and str(number) in used:
            hint = nearest(name, class_names)
            raise InputError(f"{path}: class {name!r} is not among the {len(place)} of training{hint}")
    return {number: place[name] for number, name in names.items() if name in place}


def _files(data: dict[str, Any], path: Path, problems: Problems) -> tuple[dict[Any, str], dict[Any, Any]]:
    """({image id: file name}, {image id: (width, height), or None if the file does not say})."""
    files: dict[Any, str] = {}
    seen: set[str] = set()
    sizes: dict[Any, tuple[int, int] | None] = {}
    for place, entry in enumerate(data["images"]):
        try:
            number, file = entry["id"], entry["file_name"]
            if not isinstance(number, int | str) or not isinstance(file, str) or not file:
                raise TypeError
        except (KeyError, TypeError):
            raise InputError(f"{path}: entry {place} of its images lacks id or file_name") from None
        if number in files:
            problems.setdefault("image ids that are there twice (the first is kept)", []).append(f"{file}: id {number}")
            continue
        if file in seen:
            problems.setdefault("files that are listed twice (both kept)", []).append(f"{file}: id {number}")
        seen.add(file)
        width, height = entry.get("width"), entry.get("height")
        whole = all(isinstance(v, int | float) and 1 <= v < 2**31 and float(v).is_integer() for v in (width, height))
        files[number], sizes[number] = file, (int(width), int(height)) if whole else None
    if not files:
        raise InputError(f"{path} lists no images")
    return files, sizes


def _present(source: Source, files: dict[Any, str], problems: Problems) -> tuple[Path, dict[Any, str]]:
    """The folder that has most of (a sample of) the files, and the files that it has."""
    listed: dict[str, set[str]] = {}

    def there(folder: Path, file: str) -> bool:
        parent, name = os.path.split(os.path.join(folder, file))
        if parent not in listed:
            try:
                listed[parent] = set(os.listdir(parent))
            except (OSError, ValueError):
                listed[parent] = set()
        return name in listed[parent]

    names = list(files.values())
    sample = names[:: max(1, len(names) // 64)]
    root = max(source.folders, key=lambda folder: sum(there(folder, file) for file in sample))
    present = {number: file for number, file in files.items() if there(root, file)}
    if not present:
        raise InputError(f"none of the {len(files)} images of {source.path} is there, such as {names[0]}, below {root}")
    if missing := [file for number, file in files.items() if number not in present]:
        problems[_MISSING] = [f"{file}: not in {root}" for file in missing]
    return root, present


def _header(source: str | bytes | Path) -> tuple[tuple[int, int], int]:
    """(width, height) as stored, and EXIF's orientation. Raises UnreadableImage."""
    orientation = 1
    with open_image(source) as image:
        with contextlib.suppress(Exception):  # damaged EXIF turns nothing
            orientation = image.getexif().get(_ORIENTATION, 1)
        return image.size, orientation


def _upright_size(path: Path) -> tuple[int, int]:
    """(1, 1) for a file that cannot be read: `_compare` names it."""
    with contextlib.suppress(UnreadableImage):
        size, orientation = _header(path)
        return (size[1], size[0]) if orientation in _UNDO else size
    return 1, 1


def _compare(images: DetectionImages) -> set[int]:
    """Compares files with annotations by their headers, adds to `problems`, and returns the images that cannot be used.

    A sample of a large data set: `normfree data check` reads all, and so does training.
    """
    indices = np.linspace(0, len(images) - 1, min(len(images), _MOST_HEADERS)).round().astype(int).tolist()
    misfits: set[int] = set()
    with ThreadPoolExecutor(8) as pool:
        for index, (kind, detail) in zip(indices, pool.map(partial(_misfit, images), indices), strict=True):
            if kind:
                images.problems.setdefault(kind, []).append(f"{images.name(index)}{detail and f': {detail}'}")
            if detail:
                misfits.add(index)
    return misfits


def _misfit(images: DetectionImages, index: int) -> tuple[str, str]:
    """(kind of problem, detail) of a file; no detail if it can be used, no kind if all is well."""
    try:
        stored, orientation = _header(images.source(index))
    except UnreadableImage as error:
        return _UNREADABLE, error.reason
    expected = images.sizes[index]
    upright = stored[::-1] if orientation in _UNDO else stored
    if upright == expected:
        unclear = orientation in range(2, 9) and stored == upright
        return "files turned by EXIF with annotations taken as upright, which sizes do not tell" if unclear else "", ""
    if stored == expected:
        return "files turned by EXIF that are annotated, and used, as stored", ""
    return _OTHER_SIZE, "{} x {}, not {} x {}".format(*upright, *expected)


def _notes(images: DetectionImages) -> list[str]:
    objects = [a for annotations in images.annotations for a in annotations]
    empty = sum(not annotations for annotations in images.annotations)
    boxes = sum(a.segmentation is None for a in objects)
    crowds = sum(a.crowd for a in objects)
    lines = {
        f"{empty} of {len(images)} images have no objects; they are kept": empty,
        f"{crowds} of {len(objects)} annotations are crowds, or difficult: not trained on, ignored by metrics": crowds,
        f"{boxes} of {len(objects)} annotations have no mask": boxes,
        f"the files of {_MOST_HEADERS} images were compared with the annotations; `normfree data check` compares all": (
            len(images) > _MOST_HEADERS
        ),
    }
    return [line for line, applies in lines.items() if applies]


def resized(width: int, height: int, min_px: int, max_px: int, scale: float = 1.0) -> tuple[int, int]:
    """(width, height) after the resize: the short side is `min_px`, unless the long side would exceed `max_px`.

    `scale` multiplies both limits.
    """
    ratio = scale * min(min_px / min(width, height), max_px / max(width, height))
    return max(1, round(width * ratio)), max(1, round(height * ratio))


@dataclass(frozen=True)
class DetectionTransform:
    """Resizes as `resized` by a factor uniform in `scale`, and flips horizontally with probability 1/2 (`flip`).

    With `crop` (large-scale jitter, Ghiasi et al. 2021), factor 1 fits the image into `min_px` x `min_px`; a random
    window of that size is cut out and padded at the right and the bottom. Boxes are then those of the masks, where
    there are masks. Objects of which less than a pixel is left are dropped.
    """

    min_px: int
    max_px: int
    flip: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    crop: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_px <= self.max_px or not 0 < self.scale[0] <= self.scale[1]:
            raise InputError(f"{self}: min_px is 1 to max_px, scale are two positive numbers in ascending order")

    def __call__(
        self, image: Image.Image, target: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(uint8 (3, h, w), target) of an RGB image with `boxes`, `labels` and perhaps `masks`, which may be lazy."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        scale = rng.uniform(*self.scale) if self.scale[0] < self.scale[1] else self.scale[0]
        longest = self.min_px if self.crop else self.max_px
        width, height = resized(*image.size, self.min_px, longest, scale)
        pixels: Tensor = tv_tensors.Image(F.pil_to_tensor(image))
        size = (image.height, image.width)
        boxes: Tensor = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)  # type: ignore
        parts = [F.resize(pixels, [height, width], antialias=True), F.resize(boxes, [height, width])]
        if "masks" in target:  # F.resize of a Mask would take the nearest pixel's corner, and so shift it
            masks = torch.zeros((len(boxes), height, width), dtype=torch.uint8)
            for place, mask in zip(masks, target["masks"], strict=True):
                place.copy_(F.resize(mask[None], [height, width], InterpolationMode.NEAREST_EXACT)[0])
            parts.append(tv_tensors.Mask(masks))
        if self.flip and rng.random() < 0.5:
            parts = [F.horizontal_flip(part) for part in parts]
        if self.crop:
            top, left = (int(rng.integers(max(side - self.min_px, 0) + 1)) for side in (height, width))
            inside = min(height, self.min_px), min(width, self.min_px)
            parts = [F.crop(part, top, left, *inside) for part in parts]
            pad = [0, 0, self.min_px - inside[1], self.min_px - inside[0]]
            fills = [_MEAN_COLOR, None, 0]
            parts = [F.pad(part, pad, fill=fill) for part, fill in zip(parts, fills, strict=False)]  # type: ignore
        return _cleaned(parts, target, least_px=1.0 if self.crop else 0.0, from_masks=self.crop)


def _cleaned(
    parts: list[Tensor], target: Mapping[str, Any], least_px: float, from_masks: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain tensors, boxes inside the image, without objects that have vanished."""
    image, boxes, *masks = (part.as_subclass(Tensor) for part in parts)
    height, width = image.shape[-2:]
    if masks and from_masks:
        boxes = torch.stack([_mask_box(mask) for mask in masks[0]]) if len(masks[0]) else boxes
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height], dtype=boxes.dtype))
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = (sides > 0).all(1) & (sides >= least_px).all(1)
    kept = {key: value[keep] for key, value in target.items() if key not in ("boxes", "masks")}
    return image, {"boxes": boxes[keep], **kept} | ({"masks": masks[0][keep]} if masks else {})


def _mask_box(mask: Tensor) -> Tensor:
    """(4,) float32 of a mask (H, W), its last row and column included; zeros if it is empty."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return torch.zeros(4)
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).flatten().float()


class DetectionBatch(NamedTuple):
    """`images` uint8 (3, h, w) of different sizes, their targets and indices; `unreadable`: "name: reason".

    `sizes` are (width, height) before the resize, in the pixels of the annotations.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    indices: list[int]
    unreadable: tuple[str, ...]
    sizes: Sequence[tuple[int, int]] = ()


def detection_batches(
    images: DetectionImages,
    transform: DetectionTransform,
    *,
    masks: bool,
    batch_size: int,
    seed: int,
    steps: range,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[DetectionBatch]:
    """`stream_batches` of augmented images, wide and tall ones apart unless they are cropped to a square.

    Raises InputError for a batch larger than the data set.
    """
    if batch_size > len(images):
        most = f"{len(images)} is the largest that fits"
        raise InputError(f"the batch size is {batch_size} but there are {len(images)} training images; {most}")
    images = replace(images, batch_size=0 if transform.crop else batch_size)
    task = _Reading(images, transform, masks)
    return stream_batches(images, task.sample, task.batch, batch_size, seed, steps, workers, pin_memory)


def detection_eval_batches(
    images: DetectionImages, *, min_px: int, max_px: int, masks: bool, batch_size: int, workers: int
) -> Iterator[DetectionBatch]:
    """Every image once, in order, resized alone. Unreadable images are left out of their batch and named there."""
    task = _Reading(images, DetectionTransform(min_px, max_px, flip=False), masks)
    return ordered_batches(images, task.sample, task.batch, batch_size, workers)


@dataclass(frozen=True)
class _Reading:
    images: DetectionImages
    transform: DetectionTransform
    masks: bool

    def __post_init__(self) -> None:
        from torchvision.transforms import v2  # noqa: F401  once, before workers are forked

    def sample(self, index: int, rng: np.random.Generator | None = None) -> tuple[Tensor, dict[str, Tensor], int]:
        image, target = self.images.read(index), dict[str, Any](self.images.target(index, masks=False))
        target |= {"masks": self.images.each_mask(index)} if self.masks else {}
        return *self.transform(image, target, rng or np.random.default_rng(0)), index

    def batch(
        self, samples: list[tuple[Tensor, dict[str, Tensor], int]], unreadable: tuple[str, ...]
    ) -> DetectionBatch:
        images, targets, indices = map(list, zip(*samples, strict=True)) if samples else ([], [], [])
        return DetectionBatch(images, targets, indices, unreadable, [self.images.sizes[index] for index in indices])
