"""Reading one image of any format, and sets of images, with or without a class each."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

ImageSource = str | os.PathLike[str] | bytes | BinaryIO

_SUFFIXES = "jpg jpeg jpe jfif png apng bmp gif webp tif tiff ppm pgm pbm pnm pfm jp2 j2k avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
# Raster formats only: Pillow would hand an EPS file that calls itself .jpg to a PostScript interpreter.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
_MODES = {1: "L", 3: "RGB"}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_PILLOW = re.compile(r"PIL\.")  # its modules
_OVERSHOOT = 1 / 5  # how far resampling may leave the range of a float image, at either end, as a share of it
_LEAST_SHARE = 1 / 16  # the brightest pixel of a float image reaches this share of its range
_CACHE_BYTES = 2**30


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, including HEIF if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif  # type: ignore

        pillow_heif.register_heif_opener()
        return (*_FORMATS, "HEIF")
    return _FORMATS


def image_suffixes() -> frozenset[str]:
    """Suffixes of files that are read as images, in lower case, with the dot."""
    return IMAGE_SUFFIXES | HEIF_SUFFIXES if "HEIF" in _formats() else IMAGE_SUFFIXES


class UnreadableImage(Exception):
    """An image cannot be decoded. `name` is the image, `reason` a short line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_image(source: ImageSource, *, channels: int = 3, min_px: int | None = None) -> Image.Image:
    """Decodes an image of any format and mode, upright, as 8-bit RGB (`channels` 3) or grey (1).

    Transparent pixels are composited on white. 16-bit grey is scaled to 8 bits (Pillow would clip it). So are float and
    32-bit grey, from the smallest range that holds them: 0..1 (floats only), 0..255 or 0..65535. Only the first frame
    of an animation is read. With `min_px` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, much faster, if its short
    side keeps that many pixels. Raises `UnreadableImage`, also for images above Pillow's size limit.
    """
    with _plain_failures(source):
        return _convert(_decode(source, min_px), channels)


def read_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) in pixels as stored, before EXIF rotation, from the header. Raises `UnreadableImage`."""
    with open_image(source) as image:
        return image.size


@contextlib.contextmanager
def open_image(source: ImageSource) -> Iterator[Image.Image]:
    """An image of which only the header is read. Any exception in the context becomes `UnreadableImage`."""
    with _plain_failures(source), _open(source) as image:
        yield image


@contextlib.contextmanager
def _plain_failures(source: ImageSource) -> Iterator[None]:
    """Turns whatever Pillow raises into `UnreadableImage`; its warnings, about odd metadata, are ignored."""
    try:
        # a filter for good: `warnings.catch_warnings` is not safe with threads
        if ("ignore", None, _PILLOW, Warning, 0) not in warnings.filters:
            warnings.filterwarnings("ignore", category=Warning, module=_PILLOW.pattern)
        yield
    except Exception as error:  # decoders raise nearly every type for damaged files
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
        raise UnreadableImage(name, _reason(error, source)) from None


def _open(source: ImageSource) -> Image.Image:
    is_path = isinstance(source, str | os.PathLike)
    if is_path and not os.path.isfile(source) and os.path.exists(source) and not os.path.isdir(source):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file")  # reading it may block for ever
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    # Between one and two times its limit Pillow only warns.
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are more than Pillow's limit")
    return image


def _decode(source: ImageSource, min_px: int | None) -> Image.Image:
    with _open(source) as image:
        if min_px is not None:
            image.draft(None, (min_px, min_px))
        image.load()
        with contextlib.suppress(Exception):  # the pixels may be good though EXIF is damaged
            ImageOps.exif_transpose(image, in_place=True)
        return image


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Any Pillow mode to 8-bit L or RGB."""
    if image.mode == "L" and _tiff_tag(image, _SAMPLE_FORMAT) == (2,):
        raise ValueError("signed 8-bit pixels, which Pillow takes for unsigned ones")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # also for grey: Pillow cannot convert HSV, LAB or palettes to L
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, or of floats, as L, or LA if a value is transparent. ValueError: no known range."""
    values = np.asarray(image).astype(np.float32)
    top = _range(image, values)
    scaled = values * np.float32(255 / top)
    if _tiff_tag(image, _PHOTOMETRIC) == 0:  # 0 is white; Pillow inverts only up to 8 bits
        scaled = 255 - scaled
    grey = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _range(image: Image.Image, values: np.ndarray) -> int:
    """The value of white; black is 0.

    16-bit types imply it. For floats and 32-bit integers, 0..1, 0..255 and 0..65535 are in use, and the smallest that
    holds the values is taken. Values that exceed one range and use little of the next fit neither.
    """
    if image.mode != "F" and (image.mode != "I" or image.format != "TIFF"):  # Pillow scales PGM to 16 bits
        return 4095 if _tiff_tag(image, _BITS) == (12,) else 65535
    kind, ranges = ("float", (1, 255, 65535)) if image.mode == "F" else ("integer", (255, 65535))
    if not np.isfinite(values).all():
        raise ValueError(f"{kind} pixels that are not finite")
    low, high = float(values.min()), float(values.max())
    for top in ranges:
        dim = top != ranges[0] and high < _LEAST_SHARE * top
        if high <= (1 + _OVERSHOOT) * top and low >= -_OVERSHOOT * high and not dim:
            return top
    known = " and ".join(", ".join(f"0..{top}" for top in ranges).rsplit(", ", 1))
    raise ValueError(f"{kind} pixels from {low:g} to {high:g}, where {known} are known")


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    return image.tag_v2.get(tag) if isinstance(image, TiffImageFile) else None


def _reason(error: Exception, source: ImageSource) -> str:
    """A short message for users."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError | KeyError):  # KeyError: a format missing from this build of Pillow
        return "the file is empty" if _is_empty(source) else "not an image in a known format"
    return " ".join(str(error).split())[:160] or type(error).__name__


def _is_empty(source: ImageSource) -> bool:
    if isinstance(source, bytes):
        return not source
    if isinstance(source, str | os.PathLike):
        return os.path.getsize(source) == 0
    return source.seek(0, io.SEEK_END) == 0


class Samples(ABC):
    """Images that are read by index, 0..N - 1, whatever is known about them. Picklable."""

    in_memory: bool = False
    """Whether pixels are in memory, so that worker processes would only cost time."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def source(self, index: int) -> str | bytes:
        """The path or the bytes of the file of image `index`. Raises `UnreadableImage`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of image `index` in reports: its path below the data folder, or its place in an array."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> Self:
        """These images, in this order."""

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        """Image `index`, decoded by `read_image`. Raises `UnreadableImage`."""
        try:
            return read_image(self.source(index), channels=channels, min_px=min_px)
        except UnreadableImage as error:
            raise UnreadableImage(self.name(index), error.reason) from None

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, from the header. Raises `UnreadableImage`."""
        return read_size(self.source(index))

    def order(self, rng: np.random.Generator, lead: int = 0) -> np.ndarray:
        """A permutation of the images, (N,): the order of one epoch of training.

        Its first `lead` images complete a batch of the epoch before; subclasses may group the others by batch.
        """
        return rng.permutation(len(self))

    def fingerprint(self, index: int) -> bytes:
        """What `inventory` knows of image `index`, besides its class: its name."""
        return os.fsencode(self.name(index))

    def groups(self) -> dict[str, list[int]]:
        """The indices of the images by class, ascending. Without classes there is one group, ""."""
        return {"": list(range(len(self)))}


AnySamples = TypeVar("AnySamples", bound=Samples)


@dataclass(kw_only=True)
class FolderImages(Samples):
    """Image files: `paths` are relative to `root`, with forward slashes."""

    root: str
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def subset(self, indices: Sequence[int]) -> Self:
        return replace(self, paths=[self.paths[i] for i in indices])


@dataclass(kw_only=True, eq=False)
class ArrayImages(Samples):
    """Images in memory: `pixels` is uint8, (N, H, W) or (N, H, W, 3), and `names` has one for each."""

    pixels: np.ndarray
    names: list[str]
    in_memory = True

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert(_MODES[channels])

    def source(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(buffer, "PNG")
        return buffer.getvalue()

    def name(self, index: int) -> str:
        return self.names[index]

    def subset(self, indices: Sequence[int]) -> Self:
        return replace(self, pixels=self.pixels[list(indices)], names=[self.names[i] for i in indices])


@dataclass(kw_only=True)
class _Wrapper(Samples):
    """Other samples with something added."""

    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def source(self, index: int) -> str | bytes:
        return self.samples.source(index)

    def name(self, index: int) -> str:
        return self.samples.name(index)

    def subset(self, indices: Sequence[int]) -> Self:
        return replace(self, samples=self.samples.subset(indices))

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        return self.samples.read(index, channels, min_px)

    def order(self, rng: np.random.Generator, lead: int = 0) -> np.ndarray:
        return self.samples.order(rng, lead)


@dataclass(kw_only=True)
class LabelledImages(_Wrapper):
    """Samples with a class each: `targets[i]`, an index into `class_names`, belongs to image `i`."""

    targets: Sequence[int]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Lines to show before training on the images."""

    def __post_init__(self) -> None:
        self.in_memory = self.samples.in_memory

    def subset(self, indices: Sequence[int]) -> Self:
        targets = [self.targets[i] for i in indices]
        compact = array("i", targets) if isinstance(self.targets, array) else targets
        return replace(self, samples=self.samples.subset(indices), targets=compact)

    def groups(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {name: [] for name in self.class_names}
        for index, target in enumerate(self.targets):
            found[self.class_names[target]].append(index)
        return found


@dataclass(kw_only=True, eq=False)
class _CachedImages(_Wrapper):
    channels: int
    min_px: int | None
    pixels: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    in_memory = True

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        if (channels, min_px) != (self.channels, self.min_px):
            return self.samples.read(index, channels, min_px)
        if index not in self.pixels:
            self.pixels[index] = np.asarray(self.samples.read(index, channels, min_px))
        return Image.fromarray(self.pixels[index])


def cached(images: AnySamples, channels: int = 3, min_px: int | None = None) -> AnySamples:
    """The same images, each kept as pixels once it has been read with these `channels` and `min_px`.

    A `read` with other arguments decodes each time. Every worker process would keep pixels of its own.
    """
    if isinstance(images, LabelledImages):
        return replace(images, samples=cached(images.samples, channels, min_px))
    if images.in_memory:
        return images
    return _CachedImages(samples=images, channels=channels, min_px=min_px)  # type: ignore


def fits_in_memory(images: Samples, sample: int = 64) -> bool:
    """Whether all decoded pixels take at most 1 GiB and a quarter of the free memory, estimated from some headers.

    The estimate is for three bytes per pixel at full size, from `sample` evenly spaced images.
    """
    indices = np.linspace(0, len(images) - 1, min(sample, len(images))).round().astype(int).tolist()
    room = min(_CACHE_BYTES, _free_bytes() / 4) * len(indices) / max(len(images), 1)
    for index in indices:
        with contextlib.suppress(UnreadableImage):
            room -= 3 * math.prod(images.size(index))
        if room < 0:
            return False
    return True


def _free_bytes() -> float:
    """Free main memory: what Linux calls available, or the limit of the container; infinite on other systems."""
    free = math.inf
    with contextlib.suppress(OSError):
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = 1024 * float(available[1]) if available else free
    with contextlib.suppress(OSError, ValueError):  # not a number: "max"
        free = min(free, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


Inventory = dict[str, dict[str, list]]  # split -> class -> [number of images, hash of their names in order]


def inventory(**splits: Samples) -> Inventory:
    """A fingerprint of names, classes and annotations by split, for `changed`. It can be written as JSON."""
    found: Inventory = {}
    for split, images in splits.items():
        found[split] = {}
        for group, indices in images.groups().items():
            names = b"".join(images.fingerprint(index) + b"\0" for index in indices)
            found[split][group] = [len(indices), hashlib.blake2b(names, digest_size=8).hexdigest()]
    return found


def changed(before: Inventory, now: Inventory) -> str | None:
    """The first difference between two inventories, in words; None if they are equal."""
    old, new = (
        {(split, name): found[split][name] for split in found for name in found[split]} for found in (before, now)
    )
    for split, name in (*old, *new):
        was, is_now = old.get((split, name)), new.get((split, name))
        if was is None or is_now is None:
            return f"class {name!r} is {'new' if was is None else 'gone'}"
        owner = f"class {name!r}" if name else "the data set"
        if was[0] != is_now[0]:
            return f"{owner} has {is_now[0]} {split} images and had {was[0]}"
        if was != is_now:
            objects = "" if name else " or with other annotations"
            return f"{owner} has other {split} images, or the same in another order{objects}"
    return None if list(old) == list(new) else "the classes are in another order"


def content_sample(images: Samples, most: int = 64) -> tuple[str, ...]:
    """`SIZE-HASH` of the stored files of at most `most` evenly spaced images, for `count_sampled`."""
    indices = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int).tolist()
    return tuple(sorted({key for index in indices if (key := _content_key(images, index))}))


def count_sampled(images: Samples, sample: Collection[str]) -> int:
    """How many files of a `content_sample` are among `images`, under any name."""
    sizes = {key.partition("-")[0] for key in sample}
    keys = {_content_key(images, index, sizes) for index in range(len(images))} if sample else set()
    return len(keys & set(sample))


def _content_key(images: Samples, index: int, sizes: Collection[str] | None = None) -> str:
    """`SIZE-HASH` of the file of an image; "" if it cannot be read or its size is not among `sizes`."""
    try:
        source = images.source(index)
        if isinstance(source, str):
            if not os.path.isfile(source) or (sizes is not None and str(os.path.getsize(source)) not in sizes):
                return ""
            source = Path(source).read_bytes()
    except (UnreadableImage, OSError):
        return ""
    return f"{len(source)}-{hashlib.blake2b(source, digest_size=8).hexdigest()}"
