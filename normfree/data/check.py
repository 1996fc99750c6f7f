"""Reads every image of a data set once and reports unreadable, unusual and duplicate ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from normfree.data.coco import FILE_PROBLEMS, DetectionImages, is_detection, open_detection
from normfree.data.images import FolderImages, LabelledImages, UnreadableImage, inventory, open_image, read_image
from normfree.data.pack import Show, each
from normfree.data.remote import data_folder, short_hash
from normfree.data.sources import open_dataset

Facts = dict[str, Any]  # about an image: split, name, class, file_ns; error, or pixels (a hash), short_px, odd

_MODES = {"P": "palette", "1": "1 bit", "F": "float pixels", "I": "16 bit or more", "I;16": "16 bit", "I;16B": "16 bit"}
_SMALL_PX, _LONG, _HUGE_PIXELS = 16, 8, 50e6  # extreme sizes: short side, ratio of the sides, area
_ORIENTATION = 0x0112  # EXIF tag
_MEDIUM_PX, _LARGE_PX = 32, 96  # COCO's classes of size: the area of an object is compared with these squares


def check(spec: str, *, workers: int = 0, show: Show = lambda done, total: None) -> dict[str, Any]:
    """Reads every image and returns a report that can be written as JSON; `report_lines` formats it as text.

    Keys: `images` (number by split), `unreadable` (name: reason), `odd` (kind: names), `duplicates` (lists of names
    with equal pixels), `leaks` (duplicates in training and validation), `contradictions` (duplicates of different
    classes), `short_side_px` (smallest, median, largest), `notes`. For annotated objects also `objects` (number by
    class), `object_sizes` (number of small, medium and large ones) and `problems` (kind: lines). An interrupted check
    resumes. Raises InputError.
    """
    detection = is_detection(spec)
    opened = open_detection(spec) if detection else open_dataset(spec)
    splits: dict[str, Any] = dict(zip(("train", "validation"), opened, strict=True))
    annotated = json.dumps(inventory(**splits)) if detection else ""
    partial = data_folder() / "checks" / f"{short_hash(os.path.abspath(spec) + annotated)}.jsonl"
    partial.parent.mkdir(parents=True, exist_ok=True)
    known = _whole_lines(partial)
    total = sum(len(images) for images in splits.values())
    everything: list[Facts] = []
    done = 0
    with partial.open("a", buffering=1) as file:
        for split, images in splits.items():
            found = [known.get((images.name(index), _file_ns(images, index))) for index in range(len(images))]
            rest = [index for index, facts in enumerate(found) if facts is None]
            done += len(found) - len(rest)
            for index, facts in zip(rest, each(images, rest, _examine, workers), strict=True):
                done += 1
                found[index] = facts
                file.write(json.dumps(facts) + "\n")
                show(done, total)
            everything += ({"split": split} | facts for facts in found if facts)
    partial.unlink()
    report = _report(everything, splits["train"].notes)
    return _with_objects(report, splits) if detection else report


def report_lines(report: dict[str, Any], at_most: int = 5) -> list[str]:
    """The report as lines of text, with up to `at_most` names of each kind."""
    counts, sides = report["images"], report["short_side_px"]
    lines = [f"{sum(counts.values())} images: {counts['train']} to train on, {counts['validation']} to validate on"]
    if sides:
        lines += [f"short sides are {sides[0]} to {sides[2]} px, the median is {sides[1]} px"]
    if "objects" in report:
        sizes = ", ".join(f"{count} {size}" for size, count in report["object_sizes"].items())
        lines += [f"{sum(report['objects'].values())} objects: {sizes}"]
        lines += ["objects by class: " + ", ".join(f"{name} {count}" for name, count in report["objects"].items())]
    kinds: dict[str, Iterable[Any]] = {
        "unreadable": [f"{name}: {reason}" for name, reason in report["unreadable"].items()],
        "in training and in validation": [" = ".join(names) for names in report["leaks"]],
        "equal pixels, different classes": [" = ".join(names) for names in report["contradictions"]],
        "equal pixels": [" = ".join(names) for names in report["duplicates"]],
    }
    for kind, found in (kinds | report["odd"] | report.get("problems", {})).items():
        found = list(found)
        lines += [f"{kind}: {len(found)}"] if found else []
        lines += [f"  {line}" for line in found[:at_most]] + (["  ..."] if len(found) > at_most else [])
    return [*lines, *(f"note: {note}" for note in report["notes"])]


def _examine(images: LabelledImages | DetectionImages, index: int) -> Facts:
    label = "" if isinstance(images, DetectionImages) else images.class_names[images.targets[index]]
    facts: Facts = {"name": images.name(index), "class": label, "file_ns": _file_ns(images, index)}
    try:
        source = images.source(index)
        with open_image(source) as image:
            width, height = image.size
            mode = _MODES.get(image.mode, image.mode)
            odd = {
                mode: image.mode not in ("RGB", "L", "RGBA", "LA", "PA"),
                "transparency": image.has_transparency_data,
                "several frames": getattr(image, "is_animated", False),
                "rotated by EXIF": image.getexif().get(_ORIENTATION, 1) != 1,
                f"short side below {_SMALL_PX} px": min(width, height) < _SMALL_PX,
                f"{_LONG} times as long as wide": max(width, height) >= _LONG * min(width, height),
                f"over {_HUGE_PIXELS / 1e6:.0f} megapixels": width * height > _HUGE_PIXELS,
            }
        image = images.read(index) if isinstance(images, DetectionImages) else read_image(source)
    except UnreadableImage as error:
        return facts | {"error": error.reason}
    digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
    return facts | {
        "pixels": digest,
        "short_px": min(width, height),
        "odd": [kind for kind, applies in odd.items() if applies],
    }


def _file_ns(images: LabelledImages | DetectionImages, index: int) -> int:
    """When the file of an image was last changed; 0 where it has no file of its own."""
    with contextlib.suppress(OSError):
        if isinstance(images.samples, FolderImages):
            return os.stat(images.samples.source(index)).st_mtime_ns
    return 0


def _whole_lines(path: Path) -> dict[tuple[str, int], Facts]:
    """The facts that an interrupted check has written, by name and time; the last line may be cut off."""
    known = {}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            facts = json.loads(line)
            known[facts["name"], facts["file_ns"]] = facts
    return known


def _report(everything: list[Facts], notes: Iterable[str]) -> dict[str, Any]:
    by_pixels, odd = defaultdict(list), defaultdict(list)
    for facts in everything:
        for kind in facts.get("odd", ()):
            odd[kind].append(facts["name"])
        if "pixels" in facts:
            by_pixels[facts["pixels"]].append(facts)
    groups = [group for group in by_pixels.values() if len(group) > 1]

    def names(key: str) -> list[list[str]]:
        return [[f["name"] for f in group] for group in groups if len({f[key] for f in group}) > 1]

    sides = [facts["short_px"] for facts in everything if "short_px" in facts]
    return {
        "images": {split: sum(f["split"] == split for f in everything) for split in ("train", "validation")},
        "unreadable": {f["name"]: f["error"] for f in everything if "error" in f},
        "leaks": names("split"),
        "contradictions": names("class"),
        "duplicates": [[f["name"] for f in group] for group in groups],
        "odd": dict(odd),
        "short_side_px": [min(sides), int(np.median(sides)), max(sides)] if sides else [],
        "notes": list(notes),
    }


def _with_objects(report: dict[str, Any], splits: dict[str, DetectionImages]) -> dict[str, Any]:
    """Adds what the annotations hold; images that opening found unusable are among `unreadable`."""
    objects = dict.fromkeys(splits["train"].class_names, 0)
    sizes = {"small": 0, "medium": 0, "large": 0}
    problems: dict[str, list[str]] = {}
    for images in splits.values():
        for a in (a for row in images.annotations for a in row if not a.crowd):
            objects[images.class_names[a.label - 1]] += 1
            sizes["small" if a.area < _MEDIUM_PX**2 else "medium" if a.area < _LARGE_PX**2 else "large"] += 1
        for kind, lines in images.problems.items():
            if kind in FILE_PROBLEMS:
                report["unreadable"] |= dict(line.split(": ", 1) for line in lines)
            else:
                problems[kind] = problems.get(kind, []) + lines
    return report | {"objects": objects, "object_sizes": sizes, "problems": problems}
