"""Training and validation splits: what they are called, shares held out, class names that must match."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from normfree.data.images import AnySamples, LabelledImages
from normfree.errors import InputError, nearest

_ROLES = {"train": "train training", "validation": "validation val valid dev eval evaluation", "test": "test testing"}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words.split()}
_UNEVEN = 10  # a note is made if the largest class has this many times the images of the smallest


class Splits(NamedTuple):
    """The splits of a data set, each read when it is called; None if there is none."""

    train: Callable[[], LabelledImages] | None
    validation: Callable[[], LabelledImages] | None
    is_test: bool = False
    """Whether the validation images are called a test set."""
    unsplit: bool = False
    """Whether no images are called a training split, so that all of them may be evaluated."""
    folder: Path | None = None
    """The folder that holds the folders of the training classes."""
    prefix: str = ""
    """What the names of training images begin with, such as "train/", that is not part of their names in `folder`."""


def role_of(name: str) -> str | None:
    """ "train", "validation" or "test" if `name` is a usual name of that split, in any letter case; else None."""
    return _ROLE_OF.get(name.strip().casefold())


def check_roles(names: Iterable[str], where: str) -> dict[str, str]:
    """The names of splits among `names`, by role. InputError if two have the same role, such as train and Training."""
    found: dict[str, str] = {}
    for name in names:
        if (role := role_of(name)) and found.setdefault(role, name) != name:
            raise InputError(f"{where or '.'} has {found[role]!r} and {name!r}, both for {role}: keep one of them")
    return found


def split_files(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by split: by the first word of their names that is one, else by the name of their folder.

    >>> split_files(["a/train-00.tar", "a/train-01.tar", "a/val/00.tar", "a/more.tar"])
    {'train': ['a/train-00.tar', 'a/train-01.tar'], 'val': ['a/val/00.tar'], 'images': ['a/more.tar']}
    """
    found: dict[str, list[str]] = {}
    for file in files:
        folder, name = posixpath.split(file.replace(os.sep, "/"))
        words = (*re.findall("[a-z]+", name.lower()), posixpath.basename(folder).lower())
        split = next((word for word in words if role_of(word)), "images")
        found.setdefault(split, []).append(file)
    check_roles(found, os.path.dirname(files[0]))
    return found


def named_splits(names: Iterable[str], read: Callable[[str], LabelledImages]) -> Splits:
    """The training and the validation split among `names`, usual names first; `read(name)` reads one."""
    names = list(names)
    by_role = {_ROLE_OF[w]: name for w in reversed(_ROLE_OF) for name in names if name.strip().casefold() == w}
    held_out = by_role.get("validation") or by_role.get("test")
    train = by_role.get("train") or next((name for name in names if not role_of(name)), None)
    readers = (partial(read, name) if name else None for name in (train, held_out))
    is_test = "test" in by_role and "validation" not in by_role
    return Splits(*readers, is_test=is_test, unsplit="train" not in by_role)


def name_hash(seed: int, name: str) -> bytes:
    """Eight bytes that depend on `seed` and `name` alone."""
    return hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=8).digest()


def hold_out(images: AnySamples, fraction: float, seed: int, prefix: str = "") -> tuple[AnySamples, AnySamples]:
    """(kept, held out): an image is held out if the hash of (seed, name), scaled to [0, 1), is below `fraction`.

    The side of an image depends on no other image, so added images move none. The exception are classes that would be
    on one side only: of two or more images the lowest hash is always held out and the highest always kept; a single
    image is kept. `prefix` is removed from names first, and both Unicode spellings of an accent count as the same.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the held-out share is {fraction}; it must lie between 0 and 1")
    held_out: set[int] = set()
    for indices in images.groups().values():
        names = (unicodedata.normalize("NFC", images.name(index).removeprefix(prefix)) for index in indices)
        ranked = sorted(zip((int.from_bytes(name_hash(seed, name)) for name in names), indices, strict=True))
        below = sum(number < fraction * 2**64 for number, _ in ranked)
        held_out.update(index for _, index in ranked[: max(0, min(max(1, below), len(ranked) - 1))])
    if not held_out:
        raise InputError("every class has a single image, so that none can be held out for validation; add images")
    kept = [index for index in range(len(images)) if index not in held_out]
    return images.subset(kept), images.subset(sorted(held_out))


def training_images(
    splits: Splits, train: LabelledImages, fraction: float, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """`train` and the validation images, or (kept, held out) of `train` if there are none; notes added to the first."""
    notes = list(train.notes)
    if splits.validation is not None:
        validation = match_classes(splits.validation(), train.class_names, "training images")
        notes += [note for note in validation.notes if note not in notes]
        notes += ["its test images serve for validation: the best weights are chosen by them"] * splits.is_test
    else:
        train, validation = hold_out(train, fraction, seed, splits.prefix)
        notes += [f"it has no validation images: about {fraction:.3g} of each class is held out"]
    return replace(train, notes=(*notes, *_class_notes(train, validation))), validation


def evaluation_images(splits: Splits, spec: str, held_out: float | None, seed: int) -> LabelledImages:
    """The validation images, or the share `held_out` of the training images, or all images of an unsplit data set."""
    if splits.validation is not None:
        if held_out is not None:
            raise InputError(
                f"{spec} has validation images of its own, so that none were held out: leave out --held-out"
            )
        return splits.validation()
    if splits.train is not None and held_out is not None:
        return hold_out(splits.train(), held_out, seed, splits.prefix)[1]
    if splits.train is not None and splits.unsplit:
        return splits.train()
    own = f", or give {splits.folder}" if splits.folder else ""
    raise InputError(f"{spec} has images to train on only; add --held-out and --seed as they were in training{own}")


def _class_notes(train: LabelledImages, validation: LabelledImages) -> list[str]:
    """One line for each thing that is unusual about the classes."""
    names, lines = train.class_names, []
    counts, held_out = (np.bincount(images.targets, minlength=len(names)) for images in (train, validation))
    few, many = counts.argmin(), counts.argmax()
    if counts[many] >= _UNEVEN * counts[few]:
        lines = [f"uneven classes: {counts[few]} training images of {names[few]!r}, {counts[many]} of {names[many]!r}"]
    if missing := [repr(name) for name, count in zip(names, held_out, strict=True) if not count]:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} of {len(names)} classes have no validation images: {listed}")
    if len(validation) < 100:
        lines.append(f"few validation images: one is {100 / len(validation):.3g} % of the accuracy")
    return lines


def class_key(name: str) -> str:
    """The form in which class names are compared: one Unicode spelling of accents, no spaces at the ends."""
    return unicodedata.normalize("NFC", name).strip()


def match_classes(
    images: LabelledImages, class_names: Sequence[str], owner: str, suggest: Callable[[], str] = str
) -> LabelledImages:
    """The same images with targets that are indices into `class_names`, the classes of `owner`.

    Raises InputError if a class with images is not among them; `suggest()` may end the message.
    """
    place = {class_key(name): target for target, name in enumerate(class_names)}
    used = sorted(set(images.targets))
    names = [images.class_names[target] for target in used]
    if unknown := [name for name in names if class_key(name) not in place]:
        if len(unknown) == len(names) > 1:
            listed = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            raise InputError(f"none of the classes {listed} is among the {len(place)} of the {owner}{suggest()}")
        hint = nearest(unknown[0], class_names) or suggest()
        raise InputError(f"class {unknown[0]!r} is not among the {len(place)} of the {owner}{hint}")
    moved = {target: place[class_key(images.class_names[target])] for target in used}
    return replace(images, class_names=tuple(class_names), targets=[moved[target] for target in images.targets])
