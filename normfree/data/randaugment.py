"""RandAugment (Cubuk et al. 2019): a few operations in a row, drawn from sixteen, in two styles.

`paper` equals the released code (autoaugment.py), oddities included: contrast depends on the number of pixels,
posterization weakens with the magnitude, distances are in pixels at any image size. `pil` is for your own images:
Pillow's operations, all of them stronger with the magnitude, and distances relative to the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from normfree.config import AugmentStyle
from normfree.errors import InputError

OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"),
)
_GEOMETRIC = frozenset(("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"))
_ENHANCING = frozenset(("Color", "Contrast", "Brightness", "Sharpness"))
_SIGNED = {"paper": _GEOMETRIC, "pil": _GEOMETRIC | _ENHANCING}  # their strengths are negated half of the time

_FILL = 128
_REFERENCE_PX = 224  # `pil`: the side at which distances equal the paper's

Operation = Callable[[Image.Image, float], Image.Image]


@dataclass(frozen=True)
class RandAugment:
    """Applies `num_layers` of the sixteen operations, drawn uniformly with replacement.

    `magnitude` is 0 to 30. 10 is full scale; the paper uses 5, 10 and 15 (appendix A.3). `strengths` translates it for
    each operation. Raises `InputError` for numbers out of range.
    """

    num_layers: int = 4
    magnitude: float = 5
    style: AugmentStyle = "paper"

    def __post_init__(self) -> None:
        if self.num_layers < 0 or not 0 <= self.magnitude <= 30 or self.style not in ("paper", "pil"):
            raise InputError(f"{self}: num_layers is at least 0, magnitude 0 to 30, style paper or pil")

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, C) uint8 from an L or RGB image, or from an array (H, W, C) with C = 1 or 3.

        Floating-point pixels are clipped to 0..255 and truncated, as in the released code.
        """
        picture = image if isinstance(image, Image.Image) else _to_image(image)
        strength = strengths(self.magnitude, self.style, picture.width, picture.height)
        for index in rng.integers(len(OPERATIONS), size=self.num_layers):
            name = OPERATIONS[index]
            if name == "Cutout":
                x, y = rng.integers(picture.width), rng.integers(picture.height)
                picture = cutout(picture, int(strength[name]), int(x), int(y))
            else:
                negative = name in _SIGNED[self.style] and rng.random() < 0.5
                picture = APPLY[self.style][name](picture, -strength[name] if negative else strength[name])
        return np.atleast_3d(np.array(picture))


def strengths(magnitude: float, style: AugmentStyle, width: int, height: int) -> dict[str, float]:
    """The argument of each operation at a magnitude, without its sign; 0 for operations without an argument.

    Rotate: degrees. Shear: tangent. Translate: pixels. Cutout: half the side in pixels. Posterize: bits kept. Solarize:
    grey level from which pixels are inverted. SolarizeAdd: grey levels. Color, Contrast, Brightness, Sharpness: in
    `paper` the factor (1 changes nothing), in `pil` its distance from 1.
    """
    level = magnitude / 10
    result = dict.fromkeys(OPERATIONS, 0.0)
    result |= {"Rotate": 30 * level, "ShearX": 0.3 * level, "ShearY": 0.3 * level, "SolarizeAdd": int(level * 110)}
    if style == "paper":
        result |= dict.fromkeys(_ENHANCING, 1.8 * level + 0.1)
        result |= {"TranslateX": 100 * level, "TranslateY": 100 * level, "Cutout": int(level * 40)}
        # a threshold of 256 does not fit into uint8, and NumPy wrapped it
        result |= {"Posterize": int(level * 4), "Solarize": int(level * 256) % 256}
    else:
        result |= dict.fromkeys(_ENHANCING, 0.9 * level)
        result |= {"TranslateX": round(100 * level * width / _REFERENCE_PX)}
        result |= {"TranslateY": round(100 * level * height / _REFERENCE_PX)}
        result |= {"Cutout": round(40 * level * min(width, height) / _REFERENCE_PX)}
        result |= {"Posterize": max(1, 8 - round(4 * level)), "Solarize": max(0, 256 - int(level * 256))}
    return result


def cutout(image: Image.Image, half_px: int, x: int, y: int) -> Image.Image:
    """Paints a square of side 2 `half_px` around (`x`, `y`), clipped to the image, in middle grey."""
    image = image.copy()
    image.paste(_ink(image, _FILL), (x - half_px, y - half_px, x + half_px, y + half_px))
    return image


def _ink(image: Image.Image, level: int) -> tuple[int, ...]:
    """A grey level as a colour in the mode of `image`."""
    return (level,) * len(image.getbands())


def _grey(image: Image.Image, level: int) -> Image.Image:
    """An image of one grey level, of the same size and mode."""
    return Image.new(image.mode, image.size, _ink(image, level))


# --- the same in both styles ---


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    result = _grey(image, _FILL)
    result.paste(image, (-math.floor(x + 0.5), -math.floor(y + 0.5)))
    return result


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    # Beyond magnitude 20, `bits` is above 8 in `paper`: the shift wraps in uint8, and TensorFlow shifts by at most 7.
    shift = min((8 - int(bits)) % 256, 7)
    return _point(image, _LEVELS >> shift << shift)


_LEVELS = np.arange(256)


def _point(image: Image.Image, *tables: np.ndarray) -> Image.Image:
    """Looks pixels up in a table of 256 grey levels, the same for every channel or one for each."""
    channels = len(image.getbands())
    return image.point(np.concatenate(tables if len(tables) == channels else tables * channels).tolist())


# --- paper: TensorFlow's operations as the released code calls them ---


def _auto_contrast(image: Image.Image, _: float) -> Image.Image:
    """Stretches each channel to 0..255, in float32 and truncated, where Pillow rounds."""
    extrema = image.getextrema()
    ranges = cast(list[tuple[int, int]], extrema if len(image.getbands()) > 1 else [extrema])
    return _point(image, *(_stretch(low, high) for low, high in ranges))


def _stretch(low: int, high: int) -> np.ndarray:
    if low == high:
        return _LEVELS
    scale = np.float32(255) / np.float32(high - low)
    return (_LEVELS.astype(np.float32) * scale - np.float32(low) * scale).clip(0, 255).astype(np.uint8)


def _color(image: Image.Image, factor: float) -> Image.Image:
    """Blends with tf.image.rgb_to_grayscale: weights other than Pillow's, times 255.5 / 255, truncated."""
    if image.mode == "L":
        return image
    red, green, blue = (weight * 255.5 / 255 for weight in (0.2989, 0.587, 0.114))
    luma = image.convert("L", (red, green, blue, -0.5))  # Pillow adds 0.5 and truncates
    return Image.blend(luma.convert("RGB"), image, factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the grey level pixels / 256, at most 255: the released code averages a histogram's counts."""
    return Image.blend(_grey(image, min(image.width * image.height // 256, 255)), image, factor)


def _smooth(image: Image.Image) -> Image.Image:
    """The mean of 3 x 3 pixels, the middle one counted five times, truncated; the border is left unchanged.

    If the exact mean is an integer, the last bit of a float32 decides the result of truncation. The sum is therefore in
    TensorFlow's order and by its fused multiply-adds, which float64 emulates.
    """
    pixels = np.atleast_3d(np.asarray(image)).astype(np.float64)
    height, width = max(image.height - 2, 0), max(image.width - 2, 0)
    total = np.zeros((height, width, pixels.shape[2]), np.float32)
    for (row, column), count in np.ndenumerate(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)):
        weight = np.float64(count / np.float32(13))
        total = (total + weight * pixels[row : row + height, column : column + width]).astype(np.float32)
    pixels[1 : 1 + height, 1 : 1 + width] = total
    return _to_image(pixels)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (image.width - 1) / 2, (image.height - 1) / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    return _affine(image, (1, x, 0), (y, 1, 0))


def _affine(image: Image.Image, to_x: tuple[float, float, float], to_y: tuple[float, float, float]) -> Image.Image:
    """Output (x, y) is input (a x + b y + c, d x + e y + f) in float32, rounded half away from 0; grey outside."""
    pixels = np.atleast_3d(np.asarray(image))
    height, width, channels = pixels.shape
    column, row = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    x, y = (_round(a * column + b * row + c) for a, b, c in np.array([to_x, to_y], np.float32))
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    source = np.append(pixels.reshape(-1, channels), np.full((1, channels), _FILL, np.uint8), axis=0)
    return _to_image(source.take(np.where(inside, y * width + x, height * width), axis=0))


def _round(values: np.ndarray) -> np.ndarray:
    return (values + np.copysign(np.float32(0.5), values)).astype(np.int32)


def _to_image(pixels: np.ndarray) -> Image.Image:
    """From (H, W, C); floats are clipped and truncated."""
    if pixels.dtype != np.uint8:
        pixels = pixels.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


# --- pil ---


def _factor(change: float) -> float:
    return max(0.1, 1 + change)


def _slant(image: Image.Image, x: float, y: float) -> Image.Image:
    bilinear, fill = Image.Resampling.BILINEAR, _ink(image, _FILL)
    return image.transform(image.size, Image.Transform.AFFINE, (1, x, 0, y, 1, 0), bilinear, fillcolor=fill)


APPLY: dict[AugmentStyle, dict[str, Operation]] = {
    "paper": {
        "AutoContrast": _auto_contrast,
        "Equalize": lambda image, _: ImageOps.equalize(image),
        "Invert": lambda image, _: ImageOps.invert(image),
        "Rotate": _rotate,
        "Posterize": _posterize,
        "Solarize": lambda image, threshold: _point(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS)),
        "Color": _color,
        "Contrast": _contrast,
        "Brightness": lambda image, factor: Image.blend(_grey(image, 0), image, factor),
        "Sharpness": lambda image, factor: Image.blend(_smooth(image), image, factor),
        "ShearX": lambda image, tangent: _shear(image, tangent, 0),
        "ShearY": lambda image, tangent: _shear(image, 0, tangent),
        "TranslateX": lambda image, px: _translate(image, px, 0),
        "TranslateY": lambda image, px: _translate(image, 0, px),
        "SolarizeAdd": lambda image, addition: _point(
            image, np.where(_LEVELS < 128, np.minimum(_LEVELS + int(addition), 255), _LEVELS)
        ),
    }
}
APPLY["pil"] = APPLY["paper"] | {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Rotate": lambda image, degrees: image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=_ink(image, _FILL)),
    "Color": lambda image, change: ImageEnhance.Color(image).enhance(_factor(change)),
    "Contrast": lambda image, change: ImageEnhance.Contrast(image).enhance(_factor(change)),
    "Brightness": lambda image, change: ImageEnhance.Brightness(image).enhance(_factor(change)),
    "Sharpness": lambda image, change: ImageEnhance.Sharpness(image).enhance(_factor(change)),
    "ShearX": lambda image, tangent: _slant(image, tangent, 0),
    "ShearY": lambda image, tangent: _slant(image, 0, tangent),
}
