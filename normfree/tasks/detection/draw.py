"""Pictures with boxes, masks, names and scores drawn."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import mask as rle
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from normfree.files import utf8
from normfree.tasks.detection.metrics import encode

_COLOURS = (
    *("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#469990"),
    *("#fabed4", "#9a6324", "#ffe119", "#800000", "#aaffc3", "#808000", "#dcbeff", "#000075", "#ffd8b1"),
)
_OPAQUE = 0.45  # of masks
_CLEAR_PX = 1000
_LONGEST = 32  # characters of a name
# tried in turn for names that are not ASCII: Pillow's own font has the letters of Western Europe alone
_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "Arial.ttf")

Rectangle = tuple[float, float, float, float]


def draw(
    image: Image.Image | Tensor,
    boxes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    scores: Tensor | None = None,
    masks: Tensor | Sequence[Mapping[str, Any]] | None = None,
    min_score: float = 0.0,
) -> Image.Image:
    """A copy of `image` with its objects drawn: `draw(image, **detections, class_names=names)`.

    Each class has a colour of its own; if there is one class alone, each object has.

    Images below 667 pixels are enlarged by a whole number, so that captions do not hide their objects.

    Args:
        image: also a tensor (3, H, W), uint8.
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the image.
        labels: (N,), 1 to K.
        scores: (N,); objects below `min_score` are left out.
        masks: (N, H, W) integers or booleans; (N, M, M) floats, probabilities within the boxes, as `Detector.detect`
            returns them; or COCO's run lengths.
    """
    picture = _picture(image)
    small, zoom = picture.size, max(1, round(_CLEAR_PX / max(picture.size)))
    picture = picture.resize((zoom * small[0], zoom * small[1]))
    keep = [i for i in range(len(boxes)) if scores is None or scores[i] >= min_score]
    corners: list[list[float]] = (boxes * zoom).tolist()
    # large objects lie below small ones
    keep.sort(key=lambda i: -(corners[i][2] - corners[i][0]) * (corners[i][3] - corners[i][1]))
    side = (picture.width * picture.height) ** 0.5
    line = max(1, round(side / 400))
    kinds = [label - 1 for label in labels.tolist()] if len(class_names) > 1 else range(len(labels))
    colours = [_COLOURS[kind % len(_COLOURS)] for kind in kinds]
    if masks is not None:
        pixels = np.array(picture)
        for i, mask in zip(keep, _masks(masks, boxes, keep, small), strict=True):
            _tint(pixels, mask.repeat(zoom, 0).repeat(zoom, 1), colours[i], line)
        picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for i in keep:
        pen.rectangle(_inside(corners[i], picture), outline=colours[i], width=line)
    placed: list[Rectangle] = []
    ranked = keep if scores is None else sorted(keep, key=lambda i: -scores[i].item())
    for i in ranked:
        words = _one_line(class_names[int(labels[i]) - 1])
        words += "" if scores is None else f" {scores[i].item():.2f}"
        _caption(pen, words, _inside(corners[i], picture), colours[i], max(10, round(side / 60)), placed)
    return picture


def side_by_side(
    image: Image.Image | Tensor,
    truth: Mapping[str, Any],
    prediction: Mapping[str, Any],
    class_names: Sequence[str],
    min_score: float = 0.5,
) -> Image.Image:
    """Ground truth, and beside it what was predicted with at least `min_score`; both as arguments of `draw`."""
    left = draw(image, **truth, class_names=class_names)
    right = draw(image, **prediction, class_names=class_names, min_score=min_score)
    font = _font(max(10, round((left.width * left.height) ** 0.5 / 48)))
    top = round(1.5 * font.size)
    both = Image.new("RGB", (2 * left.width + top // 4, left.height + top), "white")
    pen = ImageDraw.Draw(both)
    for words, half, x in (("ground truth", left, 0), ("predicted", right, left.width + top // 4)):
        both.paste(half, (x, top))
        pen.text((x + top // 4, top // 2), words, "black", font, anchor="lm")
    return both


def _picture(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    return image.convert("RGB")


def _masks(masks: Any, boxes: Tensor, keep: Sequence[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The masks `keep`, (H, W) uint8, one at a time, of an image of `size` (width, height)."""
    if isinstance(masks, Tensor) and masks.is_floating_point():
        masks = dict(zip(keep, encode(boxes[[*keep]], masks[[*keep]], (size[1], size[0])), strict=True))
    for i in keep:
        yield masks[i].cpu().numpy().astype(np.uint8) if isinstance(masks, Tensor) else rle.decode(dict(masks[i]))


def _tint(pixels: np.ndarray, mask: np.ndarray, colour: str, line: int) -> None:
    """Lays a translucent mask with an opaque edge over `pixels`, in place."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = mask[part] != 0
    padded = Image.fromarray(np.pad(inside.astype(np.uint8), line))
    core = np.asarray(padded.filter(ImageFilter.MinFilter(2 * line + 1)))[line:-line, line:-line] != 0
    strength = np.where(core, _OPAQUE, 0.9)[..., None] * inside[..., None]
    rgb = np.array(ImageDraw.ImageColor.getrgb(colour))
    pixels[part] = (pixels[part] * (1 - strength) + rgb * strength).round()


def _inside(box: Sequence[float], picture: Image.Image) -> Rectangle:
    """A box whose outline can be seen: within the picture, and not of less than a pixel."""
    x1, y1 = (min(max(round(start), 0), end - 1) for start, end in zip(box[:2], picture.size, strict=True))
    x2, y2 = (min(round(stop) - 1, end - 1) for stop, end in zip(box[2:], picture.size, strict=True))
    return x1, y1, max(x1, x2), max(y1, y2)


def _one_line(name: str) -> str:
    name = " ".join(utf8(name).decode().split())
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."


def _caption(
    pen: ImageDraw.ImageDraw, words: str, box: Rectangle, colour: str, size: int, placed: list[Rectangle]
) -> None:
    """Writes `words` at the box, where they hide other captions least; `placed` are these."""
    font = _font(size, words.isascii())
    width, height = font.getlength(words) + size // 2, round(1.25 * size)
    x1, y1, x2, y2 = box
    edge_x, edge_y = pen.im.size[0] - width, pen.im.size[1] - height
    places = [
        (x1, y1 - height),
        (x1, y1),
        (x1, y2 + 1),
        (x2 - width, y1 - height),
        (x2 - width, y2 + 1),
        (x1, y2 - height),
    ]
    spots = [(max(0, min(x, edge_x)), max(0, min(y, edge_y))) for x, y in places]
    x, y = min(
        spots, key=lambda spot: sum(_overlap((*spot, spot[0] + width, spot[1] + height), other) for other in placed)
    )
    placed.append((x, y, x + width, y + height))
    red, green, blue = ImageDraw.ImageColor.getrgb(colour)[:3]
    ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "white"
    pen.rectangle(placed[-1], colour, ink)
    pen.text((x + size // 4, y + height / 2), words, ink, font, anchor="lm")


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


@functools.cache
def _font(size: int, ascii_only: bool = True) -> Any:
    for name in () if ascii_only else _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
