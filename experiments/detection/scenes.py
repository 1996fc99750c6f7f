"""Generated scenes to detect objects in: twelve shapes of any colour, size and rotation, which hide each other in part.

    python experiments/detection/scenes.py OUT [--images 400] [--validation 100] [--px 192] [--seed 0]

Writes a COCO data set: OUT/train, OUT/val, OUT/annotations/instances_train.json and instances_val.json, with masks of
what is visible as run lengths. A scene is a function of (seed, split, number) alone: a larger set begins with the
scenes of a smaller one. Neither colour nor texture tells the class.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import mask as rle
from PIL import Image

SMALLEST, LARGEST = 16, 80  # pixels across
VISIBLE = 0.4  # the least share of an object
FINE = 4  # subpixels along a side
QUALITY = 92


def _polygon(u: np.ndarray, v: np.ndarray, sides: int) -> np.ndarray:
    angle = np.mod(np.arctan2(v, u), 2 * np.pi / sides) - np.pi / sides
    return np.hypot(u, v) * np.cos(angle) < np.cos(np.pi / sides)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angle = np.abs(np.mod(np.arctan2(v, u) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)  # 0 at a tip, pi / 5 in a notch
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    notch_x, notch_y = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
    return notch_y * (1 - x) - (1 - notch_x) * y > 0


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = 1.2 * u, 1.2 * v + 0.1
    return (x**2 + y**2 - 1) ** 3 < x**2 * y**3


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # within the circle of radius 1
    "circle": lambda u, v: np.hypot(u, v) < 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.75,
    "triangle": lambda u, v: _polygon(u, v, 3),
    "star": _star,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) < 0.2,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.25) & (np.maximum(abs(u), abs(v)) < 0.95),
    "ellipse": lambda u, v: np.hypot(u, v / 0.5) < 1,
    "pentagon": lambda u, v: _polygon(u, v, 5),
    "crescent": lambda u, v: (np.hypot(u, v) < 1) & (np.hypot(u - 0.45, v) > 0.75),
    "arrow": lambda u, v: np.where(u < 0, abs(v) < 0.22, abs(v) < 0.8 * (1 - u)) & (u > -0.95),
    "heart": _heart,
    "diamond": lambda u, v: abs(u) + abs(v) / 0.5 < 1,
}
NAMES = tuple(SHAPES)


def texture(rng: np.random.Generator, px: int, colour: np.ndarray, strength: float) -> np.ndarray:
    """(px, px, 3): a colour with stripes, or with clouds of two sizes, and with noise in each pixel."""
    if rng.random() < 0.4:
        rows, columns = np.mgrid[:px, :px]
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 16)
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period + rng.uniform(0, 6))
        pattern = wave[..., None] * rng.normal(0, 1, 3)
    else:
        pattern = np.zeros((px, px, 3))
        for cells in (rng.integers(2, 6), rng.integers(8, 25)):
            coarse = rng.normal(0, 0.7, (3, cells, cells)).astype(np.float32)
            pattern += np.stack([Image.fromarray(c).resize((px, px), Image.Resampling.BICUBIC) for c in coarse], 2)
    return colour + strength * pattern + rng.normal(0, 8, (px, px, 3))


def shape(rng: np.random.Generator, px: int, name: str) -> tuple[np.ndarray, int]:
    """How much of each pixel of a scene a shape covers, 0 to 1, (px, px), and its pixels in and out of the scene."""
    largest = min(LARGEST, px / 2)
    radius = np.exp(rng.uniform(np.log(min(SMALLEST, largest)), np.log(largest))) / 2
    (x, y), angle = rng.uniform(0, px, 2), rng.uniform(0, 2 * np.pi)
    reach = int(radius) + 2  # pixels to either side of the centre; it may lie across the border
    left, top, side = int(x) - reach, int(y) - reach, 2 * reach + 1
    places = (np.arange(side * FINE) + 0.5) / FINE
    across, down = (places[None, :] + left - x) / radius, (places[:, None] + top - y) / radius
    u, v = across * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - across * np.sin(angle)
    cover = SHAPES[name](u, v).reshape(side, FINE, side, FINE).mean((1, 3))
    canvas = np.zeros((px + 2 * side, px + 2 * side))
    canvas[top + side : top + 2 * side, left + side : left + 2 * side] = cover
    return canvas[side : side + px, side : side + px], int((cover >= 0.5).sum())


def scene(rng: np.random.Generator, px: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Pixels (px, px, 3) uint8, and the label 1 to 12 and visible pixels (px, px) of 2 to 8 objects.

    An object is put elsewhere if too little of it, or of those below it, were visible.
    """
    picture = texture(rng, px, rng.uniform(30, 225, 3), rng.uniform(5, 30))
    objects: list[tuple[int, np.ndarray, int]] = []
    wanted = rng.integers(2, 9)
    for _ in range(20 * wanted):
        if len(objects) == wanted:
            break
        label = int(rng.integers(len(NAMES)))
        cover, whole = shape(rng, px, NAMES[label])
        inside = cover >= 0.5
        left = [(k, mask & ~inside, full) for k, mask, full in objects] + [(label + 1, inside, whole)]
        if any(mask.sum() < VISIBLE * full for _, mask, full in left):
            continue
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - picture[inside].mean(0)).max() < 50:  # people could not see it either
            continue
        objects = left
        over = texture(rng, px, colour, rng.uniform(0, 25))
        picture += cover[..., None] * (over - picture)
    return picture.clip(0, 255).astype(np.uint8), [(label, mask) for label, mask, _ in objects]


def annotation(label: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = code["counts"].decode() if isinstance(code["counts"], bytes) else code["counts"]
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    segmentation = {"size": [*mask.shape], "counts": counts}
    return {"category_id": label, "bbox": box, "area": int(mask.sum()), "segmentation": segmentation, "iscrowd": 0}


def write(out: Path, split: int, count: int, px: int, seed: int) -> None:
    """The scenes 1 to `count` of split 0, train, or 1, val."""
    name = ("train", "val")[split]
    (out / name).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        pixels, objects = scene(np.random.default_rng([seed, split, number]), px)
        file = f"{number:05d}.jpg"
        Image.fromarray(pixels).save(out / name / file, quality=QUALITY)
        images.append({"id": number, "file_name": file, "width": px, "height": px})
        for label, mask in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number} | annotation(label, mask))
    categories = [{"id": k, "name": shape_name} for k, shape_name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / "annotations").mkdir(exist_ok=True)
    (out / "annotations" / f"instances_{name}.json").write_text(json.dumps(content) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--px", type=int, default=192, help="side of a scene, at least 64")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    if options.px < 64 or min(options.images, options.validation) < 1:
        parser.error("--px: at least 64; --images and --validation: at least 1")
    for split, count in enumerate((options.images, options.validation)):
        write(options.out, split, count, options.px, options.seed)


if __name__ == "__main__":
    main()
