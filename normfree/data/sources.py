"""Data sets by what the user calls them: a folder, tar shards, tables, a name; their parts; image files to predict."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from normfree.config import InputError, nearest
from normfree.data.images import (
    IMAGE_SUFFIXES,
    FolderImages,
    ImageSet,
    Parts,
    UnreadableImage,
    hold_out,
    open_image,
)
from normfree.data.named import DATASET_NAMES, find_named
from normfree.data.remote import is_remote
from normfree.data.shards import VALIDATION_WORDS, find_shards, shard_parts
from normfree.data.tables import table_parts

_UNEVEN = 10  # largest class over smallest from which on it is said


def open_dataset(spec: str, *, validation_fraction: float = 0.1, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Training and validation images of a data set; docs/data.md lists the kinds of `spec`.

    A folder holds `train/CLASS/...` beside `validation` (or `val`, `valid`, `test`), or `CLASS/...` alone. Where there
    are no validation images, a share `validation_fraction` (0 to 1, exclusive) of each class is held out, at least one
    image of every class that has two; which ones depends on `seed` and their names only. What is unusual about the
    data stands in the `notes` of the training images. Raises `InputError`.
    """
    _check_share(validation_fraction, "validation")
    parts = _parts(spec)
    if parts.train is None:
        raise InputError(f"{spec} has images to validate on but none to train on; add train/CLASS/IMAGE files")
    train = parts.train()
    _check_trainable(train, spec, parts.folder)
    if parts.validation is not None:
        validation = _onto_classes(parts.validation(), train.class_names, "training images")
        notes = ["its test images serve for validation: the best weights are chosen by them"] if parts.test else []
    else:
        train, validation = hold_out(train, validation_fraction, seed)
        notes = [f"it has no validation images: {validation_fraction:.3g} of each class is held out"]
    return replace(train, notes=(*notes, *describe_classes(train, validation))), validation


def has_validation(spec: str) -> bool:
    """Whether a data set comes with validation images of its own; `InputError` if there is no such data set."""
    return _parts(spec).validation is not None


def open_evaluation(spec: str, class_names: Sequence[str], *, held_out: float | None = None, seed: int = 0) -> ImageSet:
    """The images to evaluate weights on: the validation part of a data set, or all of one without parts.

    Where there is no validation part, `held_out` and `seed` give just the images that `open_dataset` holds out for the
    same `validation_fraction` and `seed`: those that a training on it did not see.
    Targets are indices into `class_names`, the classes that the weights know; a class that is not among them
    raises `InputError`, as does what cannot be read as a data set.
    """
    parts = _parts(spec)
    if parts.validation is not None:
        images = parts.validation()
    elif parts.train is not None and held_out is not None:
        _check_share(held_out, "held-out")
        images = hold_out(parts.train(), held_out, seed)[1]
    elif parts.train is not None and parts.whole:
        images = parts.train()
    else:
        own = f", or give {parts.folder}" if parts.folder else ""
        raise InputError(f"{spec} has images to train on only; add --held-out and --seed as they were in training{own}")
    return _onto_classes(images, class_names, "weights")


def describe_classes(train: ImageSet, validation: ImageSet) -> list[str]:
    """What is unusual about the classes, in a line each; nothing for even classes that all have validation images."""
    names, lines = train.class_names, []
    counts, seen = (np.bincount(images.targets, minlength=len(names)) for images in (train, validation))
    few, many = counts.argmin(), counts.argmax()
    if counts[many] >= _UNEVEN * counts[few]:
        lines.append(
            f"uneven classes: {counts[few]} training images of {names[few]!r}, {counts[many]} of {names[many]!r}"
        )
    if unseen := [repr(name) for name, count in zip(names, seen, strict=True) if not count]:
        listed = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        lines.append(f"{len(unseen)} of {len(names)} classes have no validation images: {listed}")
    if len(validation) < 100:
        lines.append(f"few validation images: one is {100 / len(validation):.3g} % of the accuracy")
    return lines


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


def look_at(images: ImageSet, sample: int = 64) -> tuple[int, bool]:
    """Median short side in pixels, and whether all are grey, of at most `sample` evenly spaced images.

    By their headers. Unreadable images are left out; raises `InputError` if not one can be read.
    """
    sides: list[int] = []
    grey = True
    reason = "there are none"
    for index in np.linspace(0, len(images) - 1, min(sample, len(images))).round().astype(int).tolist():
        try:
            with open_image(images.source(index)) as image:
                sides.append(min(image.size))
                grey = grey and (image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"))
        except UnreadableImage as error:
            reason = reason if sides else f"{images.name(index)}: {error.reason}"
    if not sides:
        raise InputError(f"no image of the data set could be read, among them {reason}")
    return int(np.median(sides)), grey


def _parts(spec: str) -> Parts:
    """The parts of what the user calls `spec`; nothing is read yet but names."""
    if spec.endswith(".tar") or (is_remote(spec) and not spec.startswith("hf://")):
        return shard_parts(find_shards(os.path.expanduser(spec)))._replace(whole=True)
    address, _, query = spec.partition("?")
    if address.startswith("hf://") or address.endswith(".parquet"):
        return table_parts(address, query)
    path = Path(address).expanduser()
    if address in DATASET_NAMES and not path.is_dir():
        found = find_named(address)
        if isinstance(found, Parts):
            return found
        path = found
    if not path.is_dir():
        raise InputError(_no_folder(spec))
    if shards := _files(path, ".tar"):
        return shard_parts(shards)
    if tables := _files(path, ".parquet"):
        return table_parts(tables, query)
    train, validation = _split_folders(path)
    return Parts(
        partial(_scan, path, train) if train else None,
        partial(_scan, path, validation) if validation else None,
        test=validation == "test",
        whole=train == ".",
        folder=path / train if train else None,
    )


def _no_folder(spec: str) -> str:
    if Path(spec).exists():
        return f"{spec} is a file; give the folder that holds one folder of images for each class"
    if len(Path(spec).parts) > 1:
        return f"no such folder: {spec}"
    hint = nearest(spec, DATASET_NAMES) or f"; data sets known by name: {', '.join(DATASET_NAMES)}"
    return f"no such folder or data set: {spec!r}{hint}"


def _check_share(share: float, name: str) -> None:
    if not 0 < share < 1:
        raise InputError(f"the {name} share is {share}; it must lie between 0 and 1")


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, suffix: str) -> list[str]:
    """Files of `root`, or of its train/, validation/, ... folders; none where there are class folders."""
    names = _subfolders(root)
    folders = [root / name for name in names if name in ("train", *VALIDATION_WORDS)] if names else [root]
    return sorted(str(file) for folder in folders if not _subfolders(folder) for file in folder.glob(f"*{suffix}"))


def _split_folders(root: Path) -> tuple[str | None, str | None]:
    """Names of the training and the validation folder, None for a missing one; (".", None) for class folders alone."""
    names = _subfolders(root)
    only_splits = bool(names) and set(names) <= {"train", *VALIDATION_WORDS}
    # "train" may be a class beside "bus" and "car": it is a part of the data if it has folders itself.
    if not only_splits and not ("train" in names and _subfolders(root / "train")):
        return ".", None
    validation = next((name for name in VALIDATION_WORDS if name in names), None)
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


def _check_trainable(images: ImageSet, spec: str, folder: Path | None) -> None:
    counts = Counter(images.targets)
    for target, name in enumerate(images.class_names):
        if not counts[target] and folder:
            raise InputError(f"class folder {folder / name} has no images; {_contents(folder / name)}")
        if not counts[target]:
            raise InputError(f"{spec} has no training images of class {name!r}; add some, or leave it out")
    if len(counts) < 2:
        only = ", ".join(images.class_names)
        raise InputError(f"{folder or spec} has one class only, {only!r}; a classifier needs at least two")


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
