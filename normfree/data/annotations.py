"""Annotations of objects, as COCO and Pascal VOC store them: found, and read with every problem counted and named."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from normfree.data.splits import class_key, role_of
from normfree.errors import InputError, one_line

Segmentation = list[Sequence[float]] | dict[str, Any]  # polygons x, y, x, y, ...; or RLE with `counts` as a string
Problems = dict[str, list[str]]  # kind -> lines

_PATTERNS = (  # of the annotation files of a folder; the first pattern that any file matches counts
    "annotations/instances_*.json",
    "*/_annotations.coco.json",
    "instances_*.json",
    "_annotations.coco.json",
    "annotations/*.json",
    "annotations.json",
)
_LEAST_PX = 1e-3  # thinner boxes have no area in float32
_SLACK_PX = 0.5  # boxes may exceed their image by rounding
_BROKEN = "annotations whose mask cannot be used"


class Annotation(NamedTuple):
    """An object: `box` x1, y1, x2, y2 in pixels; `label` 1..K; polygons, or RLE with string counts, or None; crowd."""

    box: tuple[float, float, float, float]
    label: int
    segmentation: Segmentation | None
    crowd: bool
    area: float


class Source(NamedTuple):
    """Annotations that have been found: their file or folder, and the folders in which their images may be."""

    path: Path
    load: Callable[[], dict[str, Any]]
    folders: list[Path]


def find_annotations(spec: str) -> dict[str, Source]:
    """The annotations of a data set by split; "" if no split is named."""
    path = Path(os.path.expanduser(spec))
    if path.is_file():
        beside = [_of_validation(path, word) for word in ("val", "valid", "validation") if _role(path) == "train"]
        files = [path, *[file for file in beside if file.is_file()][:1]]
        return {role: _json_source(file) for role, file in zip(("train", "validation"), files, strict=False)}
    if files := json_files(path):
        by_role: dict[str, Path] = {}
        named = [file for file in files if _role(file)] or files
        for file in named:
            if (other := by_role.setdefault(_role(file), file)) != file:
                raise InputError(f"{spec} has {other.name} and {file.name} for one split: give the path of one of them")
        return {role: _json_source(file) for role, file in by_role.items()}
    folders = voc_folders(path)
    if len(folders) > 1:
        raise InputError(f"{spec} has {' and '.join(folder.name for folder in folders)}: give the path of one of them")
    if folders:
        return {
            role: Source(folders[0], partial(dict, data), [folders[0] / "JPEGImages"])
            for role, data in load_voc(folders[0]).items()
        }
    if not path.exists():
        raise InputError(f"{spec} does not exist: give a folder of images with COCO or Pascal VOC annotations")
    known = "annotations/instances_train.json, train/_annotations.coco.json or Annotations/*.xml"
    raise InputError(f"{spec} has no annotations of objects, such as {known}: add them, or give the JSON file itself")


def json_files(folder: Path) -> list[Path]:
    """The annotation files of a folder, by the usual names."""
    return next((files for pattern in _PATTERNS if (files := sorted(folder.glob(pattern)))), [])


def voc_folders(path: Path) -> list[Path]:
    """The folders with images and annotations of Pascal VOC at or below a path."""
    folders = [path, *sorted(path.glob("VOC2*")), *sorted(path.glob("VOCdevkit/VOC2*"))]
    return [f for f in folders if (f / "JPEGImages").is_dir() and next((f / "Annotations").glob("*.xml"), None)]


def _role(path: Path) -> str:
    """The split that the name of a file or folder says, "" if none; Roboflow's file is named by its folder."""
    name = path.parent.name if path.name.startswith("_annotations") else path.name
    return next((role for word in re.findall("[a-z]+", name.lower()) if (role := role_of(word))), "")


def _of_validation(path: Path, word: str) -> Path:
    """Where the annotations of validation would be if their split is called `word`, for the file of training."""
    exchange = partial(re.sub, "(?i)(?<![a-z])train(ing)?(?![a-z])", word)
    if path.name.startswith("_annotations"):
        return path.parent.with_name(exchange(path.parent.name)) / path.name
    return path.with_name(exchange(path.name))


def _json_source(path: Path) -> Source:
    base = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
    likely, role = path.stem.removeprefix("instances_"), _role(path)
    below = [base]
    for folder in (base, base / "images"):
        with contextlib.suppress(OSError):
            below += sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    # never those of another split, which may have images of the same names
    own = [folder for folder in below if folder == base or not _role(folder) or not role or _role(folder) == role]
    own.sort(key=lambda f: (f.name != likely, f == base or not role or _role(f) != role, f.name != "images", f != base))
    return Source(path, partial(load_json, path), own)


def load_json(path: Path) -> dict[str, Any]:
    """A COCO annotation file. InputError if it is cut off or holds something else."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, or is cut off: {one_line(error)}") from None
    if isinstance(data, list):
        raise InputError(f"{path} is a list, as COCO results are: give the file of the annotations")
    parts = ("images", "annotations", "categories")
    missing = [part for part in parts if not isinstance(data, dict) or not isinstance(data.get(part), list)]
    if missing:
        raise InputError(f"{path} does not hold COCO annotations of objects: it has no list of {' and '.join(missing)}")
    return data


def load_voc(root: Path) -> dict[str, dict[str, Any]]:
    """The splits below a folder of Pascal VOC ("" if no split has a list), as COCO files would hold them.

    VOC counts pixels from 1 and boxes include their last pixel. Difficult objects become crowds: they are ignored.
    """
    lists: dict[str, list[str]] = {}
    for folder in ("Main", "Segmentation"):
        for file in sorted((root / "ImageSets" / folder).glob("*.txt")) if not lists else ():
            if role := role_of(file.stem):
                lists[role] = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    if "validation" in lists:
        lists.pop("test", None)  # its annotations may be secret
    lists = lists or {"": sorted(file.stem for file in (root / "Annotations").glob("*.xml"))}
    splits = {role: [_voc_image(root, *item) for item in enumerate(names, 1)] for role, names in lists.items()}
    names = sorted({obj["name"] for images in splits.values() for image in images for obj in image["objects"]})
    ids = {name: number for number, name in enumerate(names, 1)}
    found = {}
    for role, images in splits.items():
        objects = [(image["id"], obj) for image in images for obj in image["objects"]]
        found[role] = {
            "images": images,
            "annotations": [
                obj | {"id": number, "image_id": image_id, "category_id": ids[obj["name"]]}
                for number, (image_id, obj) in enumerate(objects, 1)
            ],
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }
    return found


def _voc_image(root: Path, number: int, name: str) -> dict[str, Any]:
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
        file = f"{name}.jpg" if (root / "JPEGImages" / f"{name}.jpg").exists() else tree.findtext("filename", name)
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        objects = []
        for obj in tree.findall("object"):
            corners = (float(obj.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax"))
            x1, y1, x2, y2 = corners
            crowd = int(obj.findtext("difficult") or 0)
            bbox = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            objects.append({"name": (obj.findtext("name") or "?").strip(), "bbox": bbox, "iscrowd": crowd})
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path} is not an annotation of Pascal VOC, or is cut off: {one_line(error)}") from None
    return {"id": number, "file_name": file, "width": width, "height": height, "objects": objects}


def read_categories(data: dict[str, Any], where: object) -> tuple[dict[int, str], list[str]]:
    """({id: name} in ascending order, notes).

    A category without annotations that is another's supercategory is left out: it is the root that Roboflow invents.
    Raises InputError for ids and names that are there twice, or are not a number and a text.
    """
    entries = data["categories"]
    for entry in entries:
        known = isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("name"), str)
        if not known or not class_key(entry["name"]):
            raise InputError(f"{where}: every category needs a number as id and a name, and {one_line(entry)} has not")
    owners = {str(raw.get("category_id")) for raw in data["annotations"] if isinstance(raw, dict)}
    found: dict[int, str] = {}
    notes: list[str] = []
    names: dict[str, int] = {}
    for entry in sorted(entries, key=lambda entry: entry["id"]):
        number, name = entry["id"], class_key(entry["name"])
        parent = any(other is not entry and other.get("supercategory") == entry["name"] for other in entries)
        if parent and str(number) not in owners:
            notes.append(f"category {name!r} (id {number}) is left out: it only groups others and has no annotations")
            continue
        if number in found:
            raise InputError(f"{where}: category id {number} is there twice ({found[number]!r} and {name!r})")
        if name in names:
            raise InputError(f"{where}: the name {name!r} belongs to the categories {names[name]} and {number}")
        found[number], names[name] = name, number
    if not found:
        raise InputError(f"{where} has no categories")
    return found, notes


class Picture(NamedTuple):
    """What annotations must know about their image; `width` and `height` in pixels."""

    place: int
    name: str
    width: int
    height: int


def read_annotations(
    raws: list[Any], pictures: dict[Any, Picture | None], labels: dict[Any, int]
) -> tuple[list[list[Annotation]], Problems]:
    """(annotations of each image, problems) of a COCO file; `pictures` and `labels` by the ids of the file.

    Annotations of images that are None, which have been named already, are passed over. What cannot be used is left
    out and named. Boxes are clamped to their image. Polygons of fewer than three points, of an odd number of values,
    or far outside are left out; a mask of which nothing is left makes a box alone if others have no mask either, and
    is left out with its box if all others have one.
    """
    reader = _Reader(pictures, labels)
    found: list[list[Annotation]] = [[] for picture in pictures.values() if picture]
    for reader.raw in raws:
        reader.picture = None
        try:
            if (annotation := reader.annotation()) and reader.picture:
                found[reader.picture.place].append(annotation)
        except _LeftOut as error:
            reader.flag(f"{error.args[0]} (left out)", error.args[1])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            reader.flag("annotations that are not COCO's (left out)", f"{type(error).__name__} {one_line(error)}")
    if lines := reader.problems.pop(_BROKEN, None):
        kept = [a.segmentation for annotations in found for a in annotations if a.segmentation != []]
        leave_out = bool(kept) and None not in kept
        for annotations in found:
            boxes = [a if a.segmentation != [] else a._replace(segmentation=None) for a in annotations]
            annotations[:] = [a for a in boxes if a.segmentation is not None] if leave_out else boxes
        reader.problems[f"{_BROKEN} ({'left out' if leave_out else 'their boxes are kept'})"] = lines
    return found, dict(reader.problems)


class _LeftOut(Exception):
    """An annotation cannot be used: `args` are the kind of problem and a detail."""


class _Reader:
    """Reads the annotation `raw` of the image `picture`."""

    raw: Any
    picture: Picture | None

    def __init__(self, pictures: dict[Any, Picture | None], labels: dict[Any, int]) -> None:
        self.pictures, self.labels = pictures, labels
        self.problems: Problems = defaultdict(list)
        self.ids: set[Any] = set()

    def flag(self, kind: str, detail: object) -> None:
        number = self.raw.get("id") if isinstance(self.raw, dict) else one_line(self.raw, 40)
        words = (self.picture.name if self.picture else "", f"annotation {number}", detail and one_line(detail, 80))
        self.problems[kind].append(": ".join(str(word) for word in words if word))

    def annotation(self) -> Annotation | None:
        raw = self.raw
        if raw["image_id"] not in self.pictures:
            raise _LeftOut("annotations of images that are not listed", f"image {raw['image_id']}")
        self.picture = self.pictures[raw["image_id"]]
        if self.picture is None:
            return None
        if raw["category_id"] not in self.labels:
            raise _LeftOut("annotations of categories that are not listed", f"category {raw['category_id']}")
        segmentation = self._segmentation(raw.get("segmentation"))
        box = self._box(raw.get("bbox"), segmentation)
        area = raw.get("area")
        if not isinstance(area, int | float) or not 0 < area < math.inf:
            area = mask_area(segmentation, self.picture) if segmentation else 0
            area = area or (box[2] - box[0]) * (box[3] - box[1])
        number = raw.get("id")
        if number in self.ids and number is not None:
            self.flag("annotation ids that are there twice (both kept)", "")
        if number == 0:
            self.flag("annotations with id 0 (renumbered)", "")
        self.ids.add(number)
        crowd = bool(int(raw.get("iscrowd") or 0))
        return Annotation(box, self.labels[raw["category_id"]], segmentation, crowd, float(area))

    def _box(self, bbox: Any, segmentation: Segmentation | None) -> tuple[float, float, float, float]:
        assert self.picture
        if not bbox:
            if not segmentation:
                raise _LeftOut("annotations without box and mask", "")
            bbox = _bounds(segmentation)
        try:
            x, y, width, height = map(float, bbox)
        except (TypeError, ValueError, OverflowError):
            raise _LeftOut("boxes that are not four numbers", bbox) from None
        if not all(map(math.isfinite, (x, y, width, height))):
            raise _LeftOut("boxes that are not finite", bbox)
        if min(width, height) <= _LEAST_PX:
            raise _LeftOut(f"boxes of {'negative' if min(width, height) < 0 else 'zero'} size", bbox)
        right, bottom = x + width, y + height
        box = max(x, 0.0), max(y, 0.0), min(right, float(self.picture.width)), min(bottom, float(self.picture.height))
        if min(box[2] - box[0], box[3] - box[1]) <= _LEAST_PX:
            raise _LeftOut("boxes outside the image", bbox)
        if max(-x, -y, right - self.picture.width, bottom - self.picture.height) > _SLACK_PX:
            self.flag("boxes partly outside the image (clamped)", bbox)
        return box

    def _segmentation(self, given: Any) -> Segmentation | None:
        """The mask in a compact form; None if none is given, [] if it cannot be used."""
        if isinstance(given, dict):
            try:
                return _rle(given, self.picture)
            except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
                self.flag("RLE that does not fit its image", error)
                self.flag(_BROKEN, "")
                return []
        parts = [part for part in given or () if part != []]
        polygons = [polygon for part in parts if (polygon := self._polygon(part))]
        if len(polygons) < len(parts):
            detail = f"{len(parts) - len(polygons)} of {len(parts)}"
            self.flag("polygons of fewer than three points, of an odd number of values, or outside", detail)
            if not polygons:
                self.flag(_BROKEN, "")
        return polygons if parts else None

    def _polygon(self, part: Any) -> Sequence[float] | None:
        """None for what would be read as a box (four values), or exhaust memory (not finite, or far outside)."""
        assert self.picture
        most = 2 * max(self.picture.width, self.picture.height)
        try:
            points = array("d", part)
        except (TypeError, OverflowError):
            return None
        usable = len(points) >= 6 and len(points) % 2 == 0 and math.isfinite(sum(points))
        return points if usable and -most <= min(points) and max(points) <= most else None


def _rle(given: dict[str, Any], picture: Picture | None) -> dict[str, Any]:
    """RLE with string counts. Raises ValueError and what the library raises for damaged ones."""
    from faster_coco_eval.core import mask

    assert picture
    size = [picture.height, picture.width]
    if list(given["size"]) != size:
        raise ValueError(f"size {given['size']}, the image has {size} (height, width)")
    counts = given["counts"]
    if isinstance(counts, list):
        runs, counts = counts, mask.frPyObjects([{"size": size, "counts": counts}], *size)[0]["counts"].decode()
    else:
        runs = _runs(str(counts).encode("ascii"))
    if sum(runs) != size[0] * size[1] or min(runs) < 0:
        raise ValueError(f"{sum(runs)} pixels, the image has {size[0] * size[1]}")
    return {"size": size, "counts": counts}


def _runs(counts: bytes) -> list[int]:
    """The run lengths in COCO's string: five bits a character, lowest first; from the fourth on, less the last but one.

    The library, which decodes without looking, must not get a string whose runs do not fill the image.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the character {chr(byte)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the counts are cut off")
    return runs


def as_rle(segmentation: Segmentation, width: int, height: int) -> dict[str, Any]:
    """The mask of an object as RLE, which runs down the columns of an image of `width` x `height` pixels."""
    from faster_coco_eval.core import mask

    if isinstance(segmentation, dict):
        return segmentation
    parts = mask.frPyObjects([list(polygon) for polygon in segmentation], height, width)
    return mask.merge(parts)  # type: ignore


def as_pixels(segmentation: Segmentation, width: int, height: int) -> np.ndarray:
    """The mask of an object, (height, width) uint8, 0 and 1."""
    from faster_coco_eval.core import mask

    return mask.decode(as_rle(segmentation, width, height))


def mask_area(segmentation: Segmentation, picture: Picture) -> int:
    """Pixels of a mask."""
    from faster_coco_eval.core import mask

    return int(mask.area(as_rle(segmentation, picture.width, picture.height)))


def _bounds(segmentation: Segmentation) -> list[float]:
    """x, y, width, height of a mask."""
    from faster_coco_eval.core import mask

    if isinstance(segmentation, dict):
        return mask.toBbox(segmentation).tolist()
    columns, rows = ([v for polygon in segmentation for v in polygon[axis::2]] for axis in (0, 1))
    return [min(columns), min(rows), max(columns) - min(columns), max(rows) - min(rows)]
