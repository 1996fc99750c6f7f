"""Opens data sets by what the user gives: a folder, tar shards, a table, a name. Finds image files to predict."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from normfree.data.images import (
    HEIF_SUFFIXES,
    FolderImages,
    LabelledImages,
    Samples,
    UnreadableImage,
    image_suffixes,
    open_image,
)
from normfree.data.named import DATASET_NAMES, find_named
from normfree.data.remote import is_remote
from normfree.data.shards import find_shards, shard_splits
from normfree.data.splits import (
    Splits,
    check_roles,
    class_key,
    evaluation_images,
    match_classes,
    named_splits,
    role_of,
    training_images,
)
from normfree.data.tables import LIST_SUFFIXES, is_label_list, list_splits, table_splits
from normfree.errors import InputError, nearest

_JUNK = {"__macosx", "@eadir", "lost+found", "__pycache__", "$recycle.bin", "system volume information"}
_JUNK |= {"thumbs.db", "desktop.ini"}  # files and folders of operating systems, in lower case
_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")


def open_dataset(
    spec: str, *, validation_fraction: float = 0.1, seed: int = 0
) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images of a data set; docs/data.md lists the kinds of `spec`.

    A folder holds `train/CLASS/...` beside `validation` (or `val`, `valid`, `test`), or `CLASS/...` alone. Without
    validation images, about the share `validation_fraction` (0 to 1, exclusive) is held out by `hold_out`. The `notes`
    of the training images say what is unusual about the data. Raises `InputError`.
    """
    splits = _splits(spec)
    if splits.train is None:
        raise InputError(f"{spec} has images to validate on but none to train on; add train/CLASS/IMAGE files")
    train = splits.train()
    _check_trainable(train, spec, splits.folder)
    return training_images(splits, train, validation_fraction, seed)


def has_validation(spec: str) -> bool:
    """Whether a data set has validation images of its own. `InputError` if there is no such data set."""
    return _splits(spec).validation is not None


def open_evaluation(
    spec: str, class_names: Sequence[str], *, held_out: float | None = None, seed: int = 0
) -> LabelledImages:
    """The images to evaluate weights on: the validation split of a data set, or all of an unsplit one.

    Without a validation split, `held_out` and `seed` select the images that `open_dataset` holds out for the same
    `validation_fraction` and `seed`. Targets are indices into `class_names`, the classes of the weights. Raises
    `InputError` for a class that is not among them and if `spec` cannot be read.
    """
    splits = _splits(spec)
    images, folder = evaluation_images(splits, spec, held_out, seed), splits.folder
    probe = "; --probe measures what their features are worth for other classes"
    return match_classes(images, class_names, "weights", lambda: (_suggest(folder) if folder else "") or probe)


def find_images(paths: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(files, failed): image files to predict, in the order given, and folders walked in sorted order.

    `files` includes paths that cannot be used, such as a folder without permission; `failed` maps each of them to the
    reason. Raises `InputError` if all of them fail.
    """
    found: list[str] = []
    failed: dict[str, str] = {}
    for path in paths:
        below = [path]
        errors: list[OSError] = []
        try:
            if stat.S_ISDIR(os.stat(path).st_mode):
                images, others = _walk(Path(path), errors.append)
                failed |= {error.filename: _reason(error) for error in errors}
                below = sorted([os.path.join(path, name) for name in images] + [error.filename for error in errors])
                if not below:
                    below, failed[path] = [path], f"has no images; {_unread(others)}"
                elif others:
                    print(f"warning: {path}: {_unread(others)}", file=sys.stderr)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            failed[path] = _reason(error)
        found += below
    if all(path in failed for path in found):
        first = f"{found[0]}: {failed[found[0]]}" if found else "give images or folders of images"
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise InputError(f"no images to read: {first}{more}")
    return found, failed


def look_at(images: Samples, sample: int = 64) -> tuple[int, bool]:
    """(median short side in pixels, whether all are grey) by the headers of at most `sample` evenly spaced images.

    Unreadable images are skipped. Raises `InputError` if none can be read.
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


def _splits(spec: str) -> Splits:
    """The splits of the data set `spec`; only names have been read."""
    address, _, query = spec.partition("?")
    path = Path(os.path.expanduser(address))
    if address.lower().endswith(_ARCHIVES) and (is_remote(address) or path.is_file()):
        raise InputError(
            f"{address} is packed: unpack it and give the folder; shards are tar files without compression"
        )
    if spec.endswith(".tar") or (is_remote(spec) and not spec.startswith("hf://")):
        return shard_splits(find_shards(os.path.expanduser(spec)))._replace(unsplit=True)
    if address.startswith("hf://") or address.endswith(".parquet"):
        return table_splits(address, query)
    if address.lower().endswith(LIST_SUFFIXES) and not path.is_dir():
        return list_splits([str(path)], query)
    if address in DATASET_NAMES and not path.is_dir():
        found = find_named(address)
        if isinstance(found, Splits):
            return found
        path = found
    if path.is_dir():
        return _folder_splits(path, query)
    if path.exists():
        raise InputError(f"{spec} is a file; give the folder that holds one folder of images for each class")
    if len(path.parts) > 1:
        raise InputError(f"no such folder: {spec}")
    hint = nearest(spec, DATASET_NAMES) or f"; data sets known by name: {', '.join(DATASET_NAMES)}"
    raise InputError(f"no such folder or data set: {spec!r}{hint}")


def _folder_splits(root: Path, query: str) -> Splits:
    """The splits of class folders, with or without folders for the splits; else of shards, tables or label lists."""
    names = _subfolders(root)
    inside = {name: len(_subfolders(root / name)) for name in names if role_of(name)}
    # "train" may be a class beside "bus" and "car". It is a split if it has folders, or if it lies beside "test".
    has_train = any(inside[name] for name in inside if role_of(name) == "train")
    split = has_train or len(inside) > 1 or len(inside) == len(names) == 1
    num_classes = max(inside.values()) if split else len(names)
    places = [root, *(root / name for name in inside)]
    if not num_classes and (shards := _files(places, ".tar")):
        return shard_splits(shards)
    if num_classes < 2 and (tables := _files(places, ".parquet")):
        return table_splits(tables, query)
    lists = _lists(*places)
    if num_classes < 2 and lists:
        return list_splits(lists, query)
    notes = [f"the class folders count, and not {os.path.basename(file)}: to go by that give {file}" for file in lists]
    notes += [f"{name} is left out: it holds training runs" for name in _subfolders(root, of_runs=True)]
    if not split:
        return Splits(partial(_scan, root, ".", notes), None, unsplit=True, folder=root)
    roles = check_roles(names, str(root))
    others = [name for name in names if name not in inside]
    notes += [f"{name} is neither for training nor for validation: left out" for name in others[:3]]
    if roles.keys() == {"train", "test"} and not inside[roles["test"]]:
        notes += [f"{roles.pop('test')} is left out: it has no class folders"]
    splits = named_splits(roles.values(), lambda name: _scan(root, name, notes))
    train = roles.get("train")
    return splits._replace(folder=root / train, prefix=f"{train}/") if train else splits


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _subfolders(folder: Path, of_runs: bool = False) -> list[str]:
    """Sorted names of the folders in `folder` that may be classes or splits; or of those that hold training runs."""
    found = sorted(entry for entry in folder.iterdir() if not _is_junk(entry.name) and entry.is_dir())
    return [entry.name for entry in found if _holds_runs(entry) == of_runs]


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in ("log.jsonl", "checkpoints"))


def _holds_runs(folder: Path) -> bool:
    """Whether `folder` is a training run, or has such folders and no images, or is empty and called runs."""
    if _is_run(folder):
        return True
    found = folder.name == "runs"  # a run that fails at once leaves it empty
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found = not entry.is_symlink() and _holds_runs(Path(entry))
            if _is_image(entry.name) or (entry.is_dir() and not found):
                return False
    return found


def _is_image(name: str) -> bool:
    return _suffix(name) in image_suffixes() and not name.startswith(".")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _files(folders: Iterable[Path], *suffixes: str) -> list[str]:
    found = (file for folder in folders for suffix in suffixes for file in folder.glob(f"*{suffix}"))
    return sorted(str(file) for file in found if not _is_junk(file.name))


def _lists(*folders: Path) -> list[str]:
    return [file for file in _files(folders, *LIST_SUFFIXES) if is_label_list(file)]


def _scan(root: Path, split: str, notes: Sequence[str] = ()) -> LabelledImages:
    """The images of `root`/`split`/CLASS/..., classes sorted by name. InputError if there are none at all."""
    folder = root / split
    class_names = _subfolders(folder)
    if not class_names:
        expected = f"expected {folder}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE beside {root}/validation/CLASS/IMAGE"
        what = "has no class folders" if any(folder.iterdir()) else "is empty"
        raise InputError(f"{folder} {what}; {expected}{_suggest(folder)}")
    paths: list[str] = []
    targets: list[int] = []
    others = Counter({"beside the class folders": sum(map(_is_image, os.listdir(folder)))})
    inside: Counter[str] = Counter()  # number of classes that have a folder of this name
    for target, name in enumerate(class_names):
        found, rest = _walk(folder / name)
        prefix = (folder / name).relative_to(root).as_posix()
        paths += [f"{prefix}/{path}" for path in found]
        targets += [target] * len(found)
        others += rest
        if found and all("/" in path for path in found):
            inside.update({path.partition("/")[0].casefold() for path in found})
    if not paths:
        raise InputError(f"{folder} has class folders but no images; {_unread(others)}{_suggest(folder)}")
    common = sorted(name for name, count in inside.items() if count > max(1, len(set(targets)) / 2))
    if len(common) > 1:  # these could as well be the classes, or splits
        raise InputError(
            f"most class folders of {folder} hold the folders {', '.join(common[:3])}: if those are the classes, give "
            f"{folder / class_names[0]}; if they are parts of the data, put them first, as in {folder}/train/CLASS; "
            "if neither, put the images of a class into one folder"
        )
    notes = (*notes, f"in {folder}, {_unread(others)}") if others else tuple(notes)
    samples = FolderImages(root=str(root), paths=paths)
    return LabelledImages(samples=samples, targets=targets, class_names=tuple(class_names), notes=notes)


def _check_trainable(images: LabelledImages, spec: str, folder: Path | None) -> None:
    """InputError unless there are two or more classes, all with images, no two of the same `class_key`."""
    counts = Counter(images.targets)
    names: dict[str, str] = {}
    for target, name in enumerate(images.class_names):
        if not counts[target] and folder:
            contents = _unread(_walk(folder / name)[1])
            raise InputError(f"class folder {folder / name} has no images; {contents}{_suggest(folder)}")
        if not counts[target]:
            raise InputError(f"{spec} has no training images of class {name!r}; add some, or leave it out")
        if names.setdefault(class_key(name), name) != name:
            raise InputError(f"{spec} has two classes {name!r} that read the same: give one another name, or join them")
    if len(counts) < 2:
        only, hint = ", ".join(images.class_names), _suggest(folder) if folder else ""
        raise InputError(f"{folder or spec} has one class only, {only!r}; a classifier needs at least two{hint}")


def _suggest(folder: Path) -> str:
    """The end of an error about `folder`: which other folder looks like a data set, if one does."""
    if packed := [path.name for path in sorted(folder.iterdir()) if path.name.lower().endswith(_ARCHIVES)]:
        return f"; unpack {packed[0]}"
    places = [folder]
    for place in places:  # breadth first: `places` grows
        with contextlib.suppress(OSError):
            if place != folder and _looks_right(place):
                return f"; did you mean {place}?"
            places += [place / name for name in _subfolders(place)[:50] if len(places) < 500]
    with contextlib.suppress(OSError):
        if _has_images(folder) and _looks_right(folder.parent):
            return f"; did you mean {folder.parent}?"
    return ""


def _looks_right(folder: Path) -> bool:
    """Whether `folder`, or train/ in it, has shards, tables, label lists, or two folders with images."""
    places = [folder / name for name in _subfolders(folder)[:50]]
    if _files([folder], ".tar", ".parquet") or _lists(folder) or sum(map(_has_images, places)) > 1:
        return True
    return any(role_of(place.name) == "train" and _looks_right(place) for place in places)


def _has_images(folder: Path) -> bool:
    return any(_is_image(entry.name) for entry in folder.glob("*"))


def _reason(error: Exception) -> str:
    return ((isinstance(error, OSError) and error.strerror) or str(error)).lower()


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot read folder {error.filename}: {_reason(error)}")


def _walk(folder: Path, onerror: Callable[[OSError], None] = _refuse) -> tuple[list[str], Counter[str]]:
    """Sorted paths of the images below `folder`, relative to it, and the number of other files by suffix.

    Hidden files, files of operating systems and training runs are skipped. Links are followed, but no folder is entered
    twice. A broken link without a suffix counts as an image, so that it is reported.
    """
    known, real = image_suffixes(), folder.resolve()
    entered = {real, *real.parents}
    images: list[str] = []
    others: Counter[str] = Counter()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=onerror):
        folders.sort()  # which of two links to a folder is followed must not depend on the file system
        for name in list(folders):
            target = Path(parent, name).resolve()
            if _is_junk(name) or target in entered or _is_run(target):
                folders.remove(name)
            entered.add(target)
        prefix = "" if parent == str(folder) else os.path.relpath(parent, folder).replace(os.sep, "/") + "/"
        for name in files:
            suffix = _suffix(name)
            if _is_junk(name):
                continue
            if suffix in known or not (suffix or os.path.exists(os.path.join(parent, name))):
                images.append(prefix + name)
            else:
                others[suffix or "without suffix"] += 1
    return sorted(images), others


def _unread(others: Counter[str]) -> str:
    """Which files of a folder are not images, and which suffixes images have."""
    if not others:
        return "it is empty; put images there or remove it"
    counts = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {suffix}" for suffix, count in counts[:8]) + ", ..." * (len(counts) > 8)
    known = ".jpg, .png, .webp, .tif, .bmp, .gif, ..."
    if HEIF_SUFFIXES & others.keys():
        known += "; .heic after pip install pillow-heif"
    total = others.total()
    return f"{total} file{'s are' if total > 1 else ' is'} not read: {listed} (images end in {known})"
