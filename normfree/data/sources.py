"""Data sets by what the user calls them: a folder, tar shards, tables, a name; their parts; image files to predict."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from normfree.config import InputError, nearest
from normfree.data.images import (
    HEIF_SUFFIXES,
    FolderImages,
    ImageSet,
    Parts,
    UnreadableImage,
    hold_out,
    image_suffixes,
    open_image,
)
from normfree.data.named import DATASET_NAMES, find_named
from normfree.data.remote import is_remote
from normfree.data.shards import check_roles, find_shards, role_of, shard_parts
from normfree.data.tables import LIST_SUFFIXES, is_label_list, list_parts, table_parts

_UNEVEN = 10  # largest class over smallest from which on it is said
_JUNK = {"__macosx", "@eadir", "lost+found", "__pycache__", "$recycle.bin", "system volume information"}
_JUNK |= {"thumbs.db", "desktop.ini"}  # what systems leave behind, in small letters
_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")


def open_dataset(spec: str, *, validation_fraction: float = 0.1, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Training and validation images of a data set; docs/data.md lists the kinds of `spec`.

    A folder holds `train/CLASS/...` beside `validation` (or `val`, `valid`, `test`), or `CLASS/...` alone. Where there
    are no validation images, about the share `validation_fraction` (0 to 1, exclusive) is held out: by `seed` and its
    name alone an image belongs to one side, but of each class with two images or more, one is on either side. What is
    unusual about the data stands in the `notes` of the training images. Raises `InputError`.
    """
    _check_share(validation_fraction, "validation")
    parts = _parts(spec)
    if parts.train is None:
        raise InputError(f"{spec} has images to validate on but none to train on; add train/CLASS/IMAGE files")
    train = _nonempty(parts.train(), spec, "training ")
    _check_trainable(train, spec, parts.folder)
    notes = list(train.notes)
    if parts.validation is not None:
        validation = _nonempty(parts.validation(), spec, "validation ")
        validation = _onto_classes(validation, train.class_names, "training images")
        notes += [note for note in validation.notes if note not in notes]
        notes += ["its test images serve for validation: the best weights are chosen by them"] if parts.test else []
    else:
        train, validation = hold_out(train, validation_fraction, seed, parts.prefix)
        notes += [f"it has no validation images: about {validation_fraction:.3g} of each class is held out"]
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
    if parts.validation is not None and held_out is not None:
        raise InputError(f"{spec} has validation images of its own, so that none were held out: leave out --held-out")
    if parts.validation is not None:
        images = _nonempty(parts.validation(), spec, "validation ")
    elif parts.train is not None and held_out is not None:
        _check_share(held_out, "held-out")
        images = hold_out(parts.train(), held_out, seed, parts.prefix)[1]
    elif parts.train is not None and parts.whole:
        images = _nonempty(parts.train(), spec, "")
    else:
        own = f", or give {parts.folder}" if parts.folder else ""
        raise InputError(f"{spec} has images to train on only; add --held-out and --seed as they were in training{own}")
    return _onto_classes(images, class_names, "weights", parts.folder)


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


def find_images(paths: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Image files to predict, in order: files as they are given, folders walked in sorted order.

    Among them are paths that cannot be used, such as a folder that may not be listed: the second value says why, by
    path. Raises `InputError` where there are no others.
    """
    found: list[str] = []
    failed: dict[str, str] = {}
    for path in paths:
        errors: list[OSError] = []
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
            images, others = _walk(Path(path), errors.append) if is_folder else ([], {})
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            found.append(path)
            failed[path] = _said(error)
            continue
        if not is_folder:
            found.append(path)
            continue
        files = {name for names in others.values() for name in names}
        dangling = {name for name in files if not os.path.exists(os.path.join(path, name))}  # folders, perhaps
        others = {suffix: rest for suffix, names in others.items() if (rest := [n for n in names if n not in dangling])}
        failed |= {error.filename: _said(error) for error in errors}
        below = sorted([os.path.join(path, n) for n in (*images, *dangling)] + [error.filename for error in errors])
        if not below:
            failed[path] = f"has no images; {_contents(Path(path))}"
        elif others:
            print(f"warning: {path}: {_unread(others, path)[0]}", file=sys.stderr)
        found += below or [path]
    if all(path in failed for path in found):
        first = f"{found[0]}: {failed[found[0]]}" if found else "give images or folders of images"
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise InputError(f"nothing to predict: {first}{more}")
    return found, failed


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
    address, _, query = spec.partition("?")
    path = Path(os.path.expanduser(address))
    if address.lower().endswith(_ARCHIVES) and (is_remote(address) or path.is_file()):
        raise InputError(
            f"{address} is packed: unpack it and give the folder; shards are tar files without compression"
        )
    if spec.endswith(".tar") or (is_remote(spec) and not spec.startswith("hf://")):
        return shard_parts(find_shards(os.path.expanduser(spec)))._replace(whole=True)
    if address.startswith("hf://") or address.endswith(".parquet"):
        return table_parts(address, query)
    if address.lower().endswith(LIST_SUFFIXES) and not path.is_dir():
        return list_parts([str(path)], query)
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
    return _folder_parts(path)


def _folder_parts(root: Path) -> Parts:
    """Class folders, alone or in folders for training and validation; else what label lists beside images say."""
    names = _subfolders(root)
    inside = {name: len(_subfolders(root / name)) for name in names if role_of(name)}
    # "train" may be a class beside "bus" and "car": it is a part of the data if it has folders itself.
    split = bool(names) and (
        len(inside) == len(names) or any(inside[name] for name in inside if role_of(name) == "train")
    )
    lists = _lists(root)
    if lists and (max(inside.values()) if split else len(names)) < 2:
        return list_parts(lists)
    notes = [f"the class folders count, and not {os.path.basename(file)}: to go by that give {file}" for file in lists]
    notes += [f"{folder.name} is left out: it holds training runs" for folder in _folders(root) if _holds_runs(folder)]
    if not split:
        return Parts(partial(_scan, root, ".", notes), None, whole=True, folder=root)
    roles = check_roles(names, str(root))
    others = [name for name in names if role_of(name) is None]
    notes += [f"{name} is neither for training nor for validation: left out" for name in others[:3]]
    if roles.keys() == {"train", "test"} and not inside[roles["test"]]:
        notes += [f"{roles.pop('test')} is left out: it has no class folders"]
    train, held = roles.get("train"), roles.get("validation") or roles.get("test")
    return Parts(
        partial(_scan, root, train, notes) if train else None,
        partial(_scan, root, held) if held else None,
        test=held is not None and held == roles.get("test"),
        folder=root / train if train else None,
        prefix=f"{train}/",
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


def _nonempty(images: ImageSet, spec: str, kind: str) -> ImageSet:
    if not len(images):
        raise InputError(f"{spec} has no {kind}images; add some, or leave that part of it out")
    return images


def _folders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, without hidden ones and those that systems leave behind."""
    found = (entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name.lower() not in _JUNK)
    return sorted(entry for entry in found if entry.is_dir())


def _subfolders(folder: Path) -> list[str]:
    """The names of the folders that may be classes or parts: those that hold runs are not."""
    return [entry.name for entry in _folders(folder) if not _holds_runs(entry)]


def _holds_runs(folder: Path) -> bool:
    """Whether `folder` is that of a training run, or one like runs/, with runs but no images."""
    if _is_run(folder):
        return True
    found = folder.name == "runs"  # as a run that has failed at once leaves it
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _suffix(entry.name) in image_suffixes():
                return False
            if entry.is_dir():
                found = not entry.is_symlink() and _holds_runs(Path(entry))
                if not found:
                    return False
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in ("log.jsonl", "checkpoints"))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _files(folder: Path, suffix: str) -> list[str]:
    """Files of `folder`, or of its train/, validation/, ... folders; none where there are class folders."""
    names = _subfolders(folder)
    places = [folder / name for name in names if role_of(name)] if names else [folder]
    return _visible(f"*{suffix}", [place for place in places if not _subfolders(place)])


def _lists(folder: Path) -> list[str]:
    """Lists of labels in `folder` and in its train/, validation/, ... folders."""
    places = [folder, *(folder / name for name in _subfolders(folder) if role_of(name))]
    return [file for suffix in LIST_SUFFIXES for file in _visible(f"*{suffix}", places) if is_label_list(file)]


def _visible(pattern: str, folders: Iterable[Path]) -> list[str]:
    return sorted(str(file) for folder in folders for file in folder.glob(pattern) if not file.name.startswith("."))


def _scan(root: Path, part: str, notes: Sequence[str] = ()) -> FolderImages:
    """The images of `root`/`part`/CLASS/..., classes sorted by name; classes may be empty, the whole may not."""
    folder = root / part
    class_names = _subfolders(folder)
    if not class_names:
        expected = f"expected {folder}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE beside {root}/validation/CLASS/IMAGE"
        what = "is empty" if not any(folder.iterdir()) else "has no class folders"
        raise InputError(f"{folder} {what}; {expected}{_suggest(folder)}")
    prefix = "" if part == "." else f"{part}/"
    loose = [name for name in os.listdir(folder) if _suffix(name) in image_suffixes() and not name.startswith(".")]
    paths: list[str] = []
    targets: list[int] = []
    others: dict[str, list[str]] = {}
    inside: dict[str, set[str]] = {}
    for target, name in enumerate(class_names):
        found, rest = _walk(folder / name)
        paths += [f"{prefix}{name}/{path}" for path in found]
        targets += [target] * (len(paths) - len(targets))
        inside[name] = {path.partition("/")[0] if "/" in path else "" for path in found}
        for suffix, names in rest.items():
            others.setdefault(suffix, []).extend(f"{name}/{path}" for path in names)
    if not paths:
        raise InputError(f"{folder} has class folders but no images; {_contents(folder)}{_suggest(folder)}")
    _check_levels(folder, inside)
    lines = [f"{_are(len(loose), 'image')} beside the class folders, where none is read: {loose[0]}"] if loose else []
    lines = [line if part == "." else f"{part}: {line}" for line in (*lines, *_unread(others, folder))]
    notes = (*notes, *lines)
    return FolderImages(class_names=tuple(class_names), targets=targets, notes=notes, root=str(root), paths=paths)


def _check_levels(folder: Path, inside: dict[str, set[str]]) -> None:
    """InputError where classes hold the same folders, `inside` by class: those are the classes, or parts of the data.

    `inside` has "" where images lie in the class folder itself.
    """
    nested = {name: {sub.casefold() for sub in subs} for name, subs in inside.items() if subs and "" not in subs}
    if 2 * len(nested) < sum(map(bool, inside.values())) or len(nested) < 2:
        return
    same, roles = set.intersection(*nested.values()), {role_of(sub) for subs in nested.values() for sub in subs}
    if None not in roles and len(roles) > 1:
        remedy = f"put the parts first, as in {folder}/train/{min(nested)}"
    elif len(same) > 1:
        remedy = (
            f"are those the classes? then give {folder / min(nested)}, or name the parts train and validation; "
            "if not, put the images of a class into one folder"
        )
    else:
        return
    first, second, *more = sorted(nested)
    listed = ", ".join(sorted(same if len(same) > 1 else set.union(*nested.values()))[:3])
    both = f"{first!r}, {second!r}" + ", ..." * bool(more)
    raise InputError(f"in {folder}, {both} all hold the folders {listed}: {remedy}")


def _check_trainable(images: ImageSet, spec: str, folder: Path | None) -> None:
    counts = Counter(images.targets)
    for target, name in enumerate(images.class_names):
        if not counts[target] and folder:
            contents = _contents(folder / name)
            raise InputError(f"class folder {folder / name} has no images; {contents}{_suggest(folder)}")
        if not counts[target]:
            raise InputError(f"{spec} has no training images of class {name!r}; add some, or leave it out")
    if len(counts) < 2:
        only = ", ".join(images.class_names)
        hint = _suggest(folder) if folder else ""
        raise InputError(f"{folder or spec} has one class only, {only!r}; a classifier needs at least two{hint}")
    names: dict[str, str] = {}
    for name in images.class_names:
        if names.setdefault(class_key(name), name) != name:
            raise InputError(f"{spec} has two classes {name!r} that read the same: give one another name, or join them")


def _suggest(folder: Path) -> str:
    """Which other folder looks like a data set, as the end of an error about `folder`; nothing where none does."""
    packed = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(_ARCHIVES))
    if packed:
        return f"; unpack {packed[0]}"
    below = [folder]
    for place in below:  # grows: breadth first
        if place != folder and _looks_right(place):
            return f"; move the folders of {place} into it" if role_of(folder.name) else f"; did you mean {place}?"
        depth = len(place.parts) - len(folder.parts)
        below += _folders(place)[:50] if depth < 3 and len(below) < 500 else []
    return f"; did you mean {folder.parent}?" if _has_images(folder) and _looks_right(folder.parent) else ""


def _looks_right(folder: Path) -> bool:
    """Whether `folder` has shards, tables, lists of labels, a folder of training classes, or two classes or more."""
    with contextlib.suppress(OSError):
        if _lists(folder) or _files(folder, ".tar") or _files(folder, ".parquet"):
            return True
        names = _folders(folder)
        train = any(role_of(place.name) == "train" and _subfolders(place) for place in names)
        return train or sum(map(_has_images, names[:50])) > 1
    return False


def _has_images(folder: Path) -> bool:
    """Whether an image lies in `folder` itself."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(_suffix(entry.name) in image_suffixes() for entry in entries)
    return False


def _said(error: Exception) -> str:
    return ((isinstance(error, OSError) and error.strerror) or str(error)).lower()


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot read folder {error.filename}: {_said(error)}")


def _walk(folder: Path, onerror: Callable[[OSError], None] = _refuse) -> tuple[list[str], dict[str, list[str]]]:
    """Sorted paths below `folder` of the images in it, and of its other files by suffix.

    Hidden files and folders are skipped, as are those of systems and of training runs. Links are followed, but into no
    folder twice nor into one that holds this one.
    """
    real = folder.resolve()
    entered = {real, *real.parents}
    known = image_suffixes()
    images: list[str] = []
    others: dict[str, list[str]] = {}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=onerror):
        folders.sort()  # which of two links to one folder is taken must not hang on the file system
        for name in list(folders):
            target = Path(parent, name).resolve()
            if name.startswith(".") or name.lower() in _JUNK or target in entered or _is_run(target):
                folders.remove(name)
            entered.add(target)
        prefix = "" if parent == str(folder) else os.path.relpath(parent, folder).replace(os.sep, "/") + "/"
        for name in files:
            suffix = _suffix(name)
            if name.startswith(".") or name.lower() in _JUNK:
                continue
            if suffix in known:
                images.append(prefix + name)
            else:
                others.setdefault(suffix or "without suffix", []).append(prefix + name)
    return sorted(images), others


def _unread(others: dict[str, list[str]], folder: str | os.PathLike[str]) -> list[str]:
    """A line that counts the files below `folder` that are not read, by suffix, and says how they would be."""
    if not others:
        return []
    counted = sorted(((len(paths), suffix) for suffix, paths in others.items()), reverse=True)
    total, more = sum(count for count, _ in counted), ", ..." if len(counted) > 8 else ""
    listed = ", ".join(f"{count} {suffix}" for count, suffix in counted[:8]) + more
    return [f"{_are(total, 'file')} not read: {listed}{_remedies(others, folder)}"]


def _are(count: int, what: str) -> str:
    return f"{count} {what} is" if count == 1 else f"{count} {what}s are"


def _remedies(others: dict[str, list[str]], folder: str | os.PathLike[str]) -> str:
    """How files that are not read would be, if they are images."""
    lines = [f"{suffix} is read after pip install pillow-heif" for suffix in sorted(HEIF_SUFFIXES & others.keys())]
    for suffix, paths in others.items():
        first = min(paths)
        with contextlib.suppress(UnreadableImage), open_image(os.path.join(folder, first)) as image:
            lines.append(f"{first} ({suffix}) is an image: rename such files to .{(image.format or '').lower()}")
    return "".join(f"; {line}" for line in lines[:3])


def _contents(folder: Path) -> str:
    """What a folder without images holds, and what would have counted."""
    others = _walk(folder)[1]
    if not others:
        return "it is empty; put images there or remove it"
    suffixes = ", ".join(sorted(others, key=lambda suffix: -len(others[suffix]))[:3])
    known = "images end in .jpg, .png, .webp, .tif, .bmp, .gif, ..."
    return f"it contains files, but no images: {suffixes} ({known}){_remedies(others, folder)}"


def class_key(name: str) -> str:
    """What class names are compared by: an accent may be written in two ways, and spaces at the ends do not show."""
    return unicodedata.normalize("NFC", name).strip()


def _onto_classes(images: ImageSet, class_names: Sequence[str], whose: str, folder: Path | None = None) -> ImageSet:
    """The same images with targets that are indices into `class_names`; empty classes need not be known."""
    place = {class_key(name): target for target, name in enumerate(class_names)}
    used = sorted(set(images.targets))
    for name in (images.class_names[target] for target in used):
        if class_key(name) not in place:
            hint = nearest(name, class_names) or (_suggest(folder) if folder else "")
            raise InputError(f"class {name!r} is not among the {len(place)} of the {whose}{hint}")
    moved = {target: place[class_key(images.class_names[target])] for target in used}
    return replace(images, class_names=tuple(class_names), targets=[moved[target] for target in images.targets])
