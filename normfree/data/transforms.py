"""Crops: one decoded image to one tensor of fixed size, for training and for evaluation."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from normfree.config import CropStyle
from normfree.errors import InputError
from normfree.native import library

_CROP_PADDING_PX = 32  # in both evaluation crops of the authors
_MIN_OBJECT_COVERED = 0.1
_KEYS_TABLE_SIZE = 1024
_KERNEL_IS_PILLOWS = PIL.__version__.startswith("13.")  # other versions order the passes differently, or may
_BUFFERS, _CHILDREN = 5, 6  # words of Arrow's struct ArrowArray
_POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

Box = tuple[int, int, int, int]
Taps = tuple[np.ndarray, np.ndarray]


def sample_rng(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """A random generator for one image in one epoch: the same on any worker, machine and resumed run.

    It is counter-based, so the sequences of two keys never overlap. Each argument is in 0..2^64 - 1. `stream` separates
    purposes with the same key: 0 is augmentation, 1 and 2 belong to the loader.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, index, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class TrainTransform:
    """Random crop of `px` x `px`, then a horizontal flip with probability 1/2 (`flip`).

    - `pil`: the area is uniform in [`min_area`, 1] of the image's, the logarithm of width / height uniform between
      those of 1 / `max_ratio` and `max_ratio`, the place uniform (Szegedy et al. 2015, as in torchvision). Resized by
      Pillow's bicubic filter with antialiasing; uint8.
    - `paper`: crops of the released code (`crop_box`), resized by TensorFlow's bicubic filter without antialiasing;
      float32, 0..255 with overshoot, not clamped.
    - `shift`: for small images. The center crop of evaluation, shifted by up to a sixteenth of the side each way (2 of
      32 pixels) and reflected at the edges; uint8. `min_area` and `max_ratio` are ignored.
    """

    px: int
    min_area: float = 0.08
    max_ratio: float = 4 / 3
    flip: bool = True
    style: CropStyle = "pil"

    def __post_init__(self) -> None:
        if self.px < 1 or not 0 < self.min_area <= 1 or self.max_ratio < 1 or self.style not in get_args(CropStyle):
            raise InputError(
                f"{self}: px must be positive, min_area in (0, 1], max_ratio at least 1, style pil, paper or shift"
            )

    @property
    def min_px(self) -> int | None:
        """For `read_image`: the short side at which the smallest crop still has `px` pixels; None (all) for `paper`."""
        if self.style == "shift":
            return self._middle.min_px
        return math.ceil(self.px * math.sqrt(self.max_ratio / self.min_area)) if self.style == "pil" else None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """(C, px, px) from an L or RGB image of any size: float32 for `paper`, else uint8."""
        if self.style == "shift":
            return self._shifted(image, rng)
        box = self.crop_box(image.width, image.height, rng)
        mirrored = self.flip and rng.random() < 0.5
        if self.style == "pil":
            return resample(image, box, self.px, mirrored)
        pixels = _resize_box(image, box, self.px)
        return to_tensor(pixels[:, ::-1] if mirrored else pixels)

    @property
    def _middle(self) -> EvalTransform:
        return EvalTransform(self.px, "center", crop_fraction=1.0)

    def _shifted(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        most, last = self.px // 16, self.px - 1
        places = np.arange(self.px) + rng.integers(-most, most + 1, size=(2, 1))
        rows, columns = last - np.abs(last - np.abs(places))  # -1 is 1, px is px - 2
        if self.flip and rng.random() < 0.5:
            columns = columns[::-1]
        whole = image.size == (self.px, self.px)  # the common case: nothing to resize
        pixels = np.atleast_3d(np.asarray(image)) if whole else self._middle(image).permute(1, 2, 0).numpy()
        return to_tensor(pixels.take(rows, axis=0).take(columns, axis=1))

    def crop_box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """(left, upper, right, lower) in whole pixels of a `pil` or `paper` crop.

        After ten draws that do not fit, `pil` takes the largest central crop and `paper` the evaluation crop
        `crop_resize`. `paper` also takes the latter instead of the whole image.
        """
        return self._pil_box(width, height, rng) if self.style == "pil" else self._paper_box(width, height, rng)

    def _paper_box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """TensorFlow's sample_distorted_bounding_box: width / height is uniform, then the height among those allowed.

        Small areas are therefore likelier than large ones. The area is at least a tenth, whatever `min_area`: that much
        of the "object", here the whole image, must be covered. The last row and column are never reached.
        """
        area = width * height
        for _ in range(10):
            ratio = rng.uniform(1 / self.max_ratio, self.max_ratio)
            lowest = round(math.sqrt(self.min_area * area / ratio))
            highest = min(height, round(math.sqrt(area / ratio)), int((width + 0.5) / ratio))
            h = int(rng.integers(lowest, highest + 1)) if lowest < highest else highest
            w = min(width, round(h * ratio))
            if (w, h) == (width, height):
                break
            if w * h >= max(self.min_area, _MIN_OBJECT_COVERED) * area:
                left = int(rng.integers(width - w)) if w < width else 0
                upper = int(rng.integers(height - h)) if h < height else 0
                return left, upper, left + w, upper + h
        return _padded_center(width, height, self.px)

    def _pil_box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        log_ratio = math.log(self.max_ratio)
        for _ in range(10):
            area = rng.uniform(self.min_area, 1) * width * height
            ratio = math.exp(rng.uniform(-log_ratio, log_ratio))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, upper, left + w, upper + h
        w, h = min(width, round(height * self.max_ratio)), min(height, round(width * self.max_ratio))
        left, upper = (width - w) // 2, (height - h) // 2
        return left, upper, left + w, upper + h


@dataclass(frozen=True)
class EvalTransform:
    """A deterministic center crop of `px` x `px`, of one of three kinds.

    - `center`: the short side is resized to `px / crop_fraction` with antialiasing, then cropped; uint8.
    - `resize_crop` (NFNets): the image is resized to a square of `px` + 32, then cropped.
    - `crop_resize` (NF-ResNets): a square of px / (px + 32) of the short side is cropped, then resized.

    The last two equal the authors' (imagenet_dataset.py of their release) to the last bits of float32: TensorFlow's
    bicubic filter without antialiasing; float32, 0..255 with overshoot, not clamped.
    """

    px: int
    crop: Literal["center", "resize_crop", "crop_resize"] = "center"
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        if self.px < 1 or not 0 < self.crop_fraction <= 1:
            raise InputError(f"{self}: px must be positive, crop_fraction in (0, 1]")
        if self.crop not in ("center", "resize_crop", "crop_resize"):
            raise InputError(f"crop is {self.crop!r}; it must be center, resize_crop or crop_resize")

    @property
    def min_px(self) -> int | None:
        """For `read_image`: twice the short side that `center` resizes to, for antialiasing; else None (all)."""
        return 2 * round(self.px / self.crop_fraction) if self.crop == "center" else None

    def __call__(self, image: Image.Image) -> Tensor:
        """(C, px, px) from an L or RGB image of any size: uint8 for `center`, else float32."""
        if self.crop == "center":
            return resample(image, self._center_box(image), self.px)
        if self.crop == "crop_resize":
            return to_tensor(_resize_box(image, _padded_center(image.width, image.height, self.px), self.px))
        start, size = _CROP_PADDING_PX // 2, self.px + _CROP_PADDING_PX
        middle = slice(start, start + self.px)
        return to_tensor(_resize(image, _keys_taps(image.height, size, middle), _keys_taps(image.width, size, middle)))

    def _center_box(self, image: Image.Image) -> tuple[float, float, float, float]:
        """The box to resize, so that resizing and cropping is one step: an image of 10,000 x 1 pixels must not grow."""
        short = round(self.px / self.crop_fraction)
        box: list[float] = []
        for side in image.size:
            resized = int(short * side / min(image.size))
            start = round((resized - self.px) / 2)
            box.append(start * side / resized)
            box.append((start + self.px) * side / resized)
        left, right, upper, lower = box
        return left, upper, right, lower


def resample(image: Image.Image, box: tuple[float, float, float, float], px: int, mirrored: bool = False) -> Tensor:
    """(C, px, px) uint8: a box of an L or RGB image, resized by Pillow's bicubic filter (by our kernel if it can)."""
    native = library() if _KERNEL_IS_PILLOWS and image.mode in ("L", "RGB") else None
    pixels = _contiguous_pixels(image) if native else None
    if native is None or pixels is None:
        array = np.asarray(image.resize((px, px), Image.Resampling.BICUBIC, box=box))
        return to_tensor(array[:, ::-1] if mirrored else array)
    (width, height), channels = image.size, len(image.getbands())
    result = torch.empty(channels, px, px, dtype=torch.uint8, device="cpu")
    columns_first = height - px > max(0, 2 * (width - px))
    native.normfree_resample(pixels, width, height, channels, *box, px, columns_first, mirrored, result.data_ptr())
    return result


def _contiguous_pixels(image: Image.Image) -> int | None:
    """Their address, L or RGB with a fourth byte, by Arrow's C data interface; None if they are in several blocks."""
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:
        return None
    array = _words(_POINTER(capsule, b"arrow_array"))
    if image.mode == "RGB":
        array = _words(_words(array[_CHILDREN])[0])
    return _words(array[_BUFFERS])[1]


def _words(address: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 7).from_address(address)


def _padded_center(width: int, height: int, px: int) -> Box:
    """The central square that leaves margins of 16 pixels at the scale at which it has `px`."""
    share = np.float32(px / (px + _CROP_PADDING_PX))
    # the authors' code has no max and fails for an image of one pixel
    side = max(1, int(share * np.float32(min(width, height))))
    left, upper = (width - side + 1) // 2, (height - side + 1) // 2
    return left, upper, left + side, upper + side


def _resize_box(image: Image.Image, box: Box, px: int) -> np.ndarray:
    part, everything = image.crop(box), slice(None)
    return _resize(part, _keys_taps(part.height, px, everything), _keys_taps(part.width, px, everything))


def _keys_taps(in_px: int, out_px: int, part: slice) -> Taps:
    """Source indexes and weights, both (outputs, 4), of TensorFlow's bicubic filter for the outputs in `part`.

    As in resize_bicubic_op.cc: Keys' kernel with a = -0.5 at half-pixel centres, from a table of 1,024 steps (which
    changes a photograph by up to 0.07 grey levels). Taps beyond the edge are dropped and the others scaled to sum to 1.
    """
    scale = np.float32(in_px) / np.float32(out_px)
    centre = (np.arange(out_px, dtype=np.float32)[part] + np.float32(0.5)) * scale - np.float32(0.5)
    first = np.floor(centre)
    t = np.rint((centre - first) * _KEYS_TABLE_SIZE)[:, None].astype(np.float64) / _KEYS_TABLE_SIZE
    near, far = np.hstack([t, 1 - t]), np.hstack([1 + t, 2 - t])
    inner = (1.5 * near - 2.5) * near**2 + 1
    outer = ((-0.5 * far + 2.5) * far - 4) * far + 2
    weights = np.stack([outer[:, 0], inner[:, 0], inner[:, 1], outer[:, 1]], axis=1)
    indexes = first[:, None].astype(np.int64) + np.arange(-1, 3)
    weights = np.where((indexes >= 0) & (indexes < in_px), weights, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return indexes.clip(0, in_px - 1), weights.astype(np.float32)


def _resize(image: Image.Image, rows: Taps, columns: Taps) -> np.ndarray:
    """(height, width, C) float32, from the taps of each output row and column."""
    tall = _interpolate(np.atleast_3d(np.asarray(image)), rows)
    return _interpolate(tall.swapaxes(0, 1), columns).swapaxes(0, 1)


def _interpolate(pixels: np.ndarray, taps: Taps) -> np.ndarray:
    """Interpolates along the first axis of three, in float32."""
    indexes, weights = taps
    result = weights[:, 0, None, None] * pixels[indexes[:, 0]]
    for k in range(1, 4):
        result += weights[:, k, None, None] * pixels[indexes[:, k]]
    return result


def to_tensor(pixels: np.ndarray) -> Tensor:
    """A contiguous copy (C, H, W) of pixels (H, W) or (H, W, C)."""
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - 255 mean) / (255 std) as float32, for images (N, C, H, W) in 0..255, uint8 or float, on any device.

    `mean` and `std` have C numbers, as shares of the full range.
    """
    shift, scale = _on_device(mean, images.device), _on_device(std, images.device)
    return (images.float() - shift).div_(scale)


def _on_device(shares: Sequence[float], device: torch.device) -> Tensor:
    """255 times each, (C, 1, 1). Filled on the device: a copy from the host would synchronize with a GPU."""
    return torch.stack([torch.full((1, 1), 255 * share, dtype=torch.float32, device=device) for share in shares])
