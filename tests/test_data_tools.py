"""`normfree data check`, data sets by name, Parquet tables: what they find, and one line for what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.error import URLError

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from normfree.cli import main
from normfree.data import (
    ArrayImages,
    FolderImages,
    TrainTransform,
    UnreadableImage,
    has_validation,
    named,
    open_dataset,
    open_evaluation,
    train_batches,
)
from normfree.data import check as check_module
from normfree.data.check import check, report_lines
from normfree.data.named import DATASET_NAMES
from normfree.data.tables import TableImages
from normfree.errors import InputError
from normfree.files import check_writable


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and an empty cache for tables."""
    monkeypatch.setenv("NORMFREE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    return tmp_path / "data"


def noise(seed: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def plant(root: Path, per_class: int = 3) -> Path:
    """Different pictures in train and val, of cats and dogs."""
    seed = 0
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(per_class):
                Image.fromarray(noise(seed)).save(root / part / name / f"{number}.png")
                seed += 1
    return root


def complaint(call: Any, *args: Any, match: str, **kwargs: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


# --- check ---


def faulty(root: Path) -> Path:
    """One of every fault."""
    cats = plant(root) / "train" / "cat"
    rgb = Image.fromarray(noise(100))
    rgb.convert("CMYK").save(cats / "cmyk.jpg")
    rgb.quantize(16).save(cats / "palette.png")
    Image.fromarray(noise(101)[..., 0].astype(np.uint16) * 200).save(cats / "deep.png")
    clear = Image.fromarray(noise(102))
    clear.putalpha(77)
    clear.save(cats / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise(103)).save(cats / "turned.jpg", exif=turned)
    Image.fromarray(noise(104)).save(
        cats / "film.gif", save_all=True, append_images=[Image.fromarray(noise(105))], duration=50
    )
    Image.fromarray(noise(106, 8)).save(cats / "tiny.png")
    Image.fromarray(np.repeat(noise(107), 10, axis=1)).save(cats / "long.png")
    (cats / "empty.png").write_bytes(b"")
    (cats / "text.jpg").write_bytes(b"this is text")
    (cats / "cut.png").write_bytes((cats / "0.png").read_bytes()[:700])
    shutil.copy(cats / "1.png", cats / "copy.png")
    Image.open(cats / "2.png").save(cats / "same-pixels.webp", lossless=True)
    shutil.copy(cats / "1.png", root / "train" / "dog" / "no-dog.png")
    shutil.copy(root / "train" / "dog" / "0.png", root / "val" / "dog" / "leak.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_check_finds_every_fault(tmp_path: Path, workers: int) -> None:
    report = check(str(faulty(tmp_path / "in")), workers=workers)
    cat, dog = "train/cat/", "train/dog/"
    assert report["images"] == {"train": 20, "validation": 7}
    assert report["unreadable"].keys() == {cat + "empty.png", cat + "text.jpg", cat + "cut.png"}
    assert report["unreadable"][cat + "empty.png"] == "the file is empty"
    assert report["odd"] == {
        "CMYK": [cat + "cmyk.jpg"],
        "transparency": [cat + "clear.png"],
        "16 bit": [cat + "deep.png"],
        "several frames": [cat + "film.gif"],
        "8 times as long as wide": [cat + "long.png"],
        "palette": [cat + "film.gif", cat + "palette.png"],
        "short side below 16 px": [cat + "tiny.png"],
        "rotated by EXIF": [cat + "turned.jpg"],
    }
    assert report["duplicates"] == [
        [cat + "1.png", cat + "copy.png", dog + "no-dog.png"],
        [cat + "2.png", cat + "same-pixels.webp"],
        [dog + "0.png", "val/dog/leak.png"],
    ]
    assert report["leaks"] == [[dog + "0.png", "val/dog/leak.png"]]
    assert report["contradictions"] == [[cat + "1.png", cat + "copy.png", dog + "no-dog.png"]]
    assert report["short_side_px"] == [8, 24, 24]
    lines = report_lines(report)
    assert lines[0] == "27 images: 20 to train on, 7 to validate on"
    assert "unreadable: 3" in lines
    assert "in training and in validation: 1" in lines
    assert f"  {dog}0.png = val/dog/leak.png" in lines


def test_check_of_a_clean_set(tmp_path: Path, data: Path) -> None:
    report = check(str(plant(tmp_path / "in")))
    assert not any(report[key] for key in ("unreadable", "odd", "duplicates", "leaks", "contradictions"))
    assert report["notes"] == ["few validation images: one is 16.7 % of the accuracy"]
    assert not list((data / "checks").iterdir())


def test_check_goes_on_after_a_kill(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = faulty(tmp_path / "in")
    examine = check_module._examine

    def killing(images: Any, index: int) -> Any:
        if images.name(index) == "train/dog/1.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return examine(images, index)

    def one_by_one(images: Any, indices: Any, function: Any, workers: int) -> Any:
        return (function(images, index) for index in indices)

    with monkeypatch.context() as patch:
        patch.setattr(check_module, "_examine", killing)
        patch.setattr(check_module, "each", one_by_one)  # so that all that was examined has been written
        process = multiprocessing.get_context("fork").Process(target=check, args=(str(root),))
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (partial,) = (data / "checks").iterdir()
    with partial.open("a") as file:
        file.write('{"name": "half a li')
    whole = partial.read_text().count("\n")
    assert whole == 17
    Image.fromarray(noise(200)).save(root / "train/cat/1.png")  # mended meanwhile: no longer equal to its copies
    read: list[str] = []

    def noted(images: Any, index: int) -> Any:
        read.append(images.name(index))
        return examine(images, index)

    monkeypatch.setattr(check_module, "_examine", noted)
    shown: list[tuple[int, int]] = []
    resumed = check(str(root), show=lambda *seen: shown.append(seen))
    assert len(read) == 27 - whole + 1
    assert "train/cat/1.png" in read
    assert shown[-1] == (27, 27)
    assert not partial.exists()
    assert resumed == check(str(root))
    assert resumed["contradictions"] == [["train/cat/copy.png", "train/dog/no-dog.png"]]


def run(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return (code, *capsys.readouterr())


def test_check_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clean, bad, report = plant(tmp_path / "clean"), faulty(tmp_path / "bad"), tmp_path / "report.json"
    code, out, _ = run(capsys, "data", "check", clean, "--workers", 0)
    assert (code, out.splitlines()[0]) == (0, "12 images: 6 to train on, 6 to validate on")
    code, out, _ = run(capsys, "data", "check", bad, "--workers", 1, "--out", report)
    assert code == 1
    assert "train/cat/empty.png: the file is empty" in out
    assert json.loads(report.read_text()) == check(str(bad))
    code, out, err = run(capsys, "data", "check", bad, "--out", report)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "exists" in err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere/r.json", "there is no folder .*nowhere; create it first"),
        ("file/r.json", "cannot be written: not a directory"),
        ("folder", "is a folder and exists; nothing was written"),
        ("file", "exists; nothing was written"),
        ("dangling", "exists; nothing was written"),
        ("locked/r.json", "cannot be written: permission denied"),
        ("n" * 300, "cannot be written: file name too long"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_the_work(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for folder in ("folder", "locked"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.rglob("*"))
    really_open = open

    def forbid(path: Any, *args: Any, **kwargs: Any) -> Any:  # a root user may write everywhere
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", forbid)
    out = str(tmp_path / name)
    complaint(check_writable, out, match=f"^--out {out} .*{reason}$")
    complaint(check_writable, out, "--json", match=f"^--json {out} ")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_results_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "new.json")
    check_writable(str(tmp_path / "file"), replace=True)
    check_writable(str(tmp_path / "many/more/folders/"), parents=True)
    complaint(check_writable, str(tmp_path / "file/folder/x"), parents=True, match="not a directory")
    complaint(check_writable, str(tmp_path), parents=True, match="exists; nothing was written")
    complaint(check_writable, str(tmp_path), replace=True, match="is a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_every_verb_looks_at_where_it_writes_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nowhere = tmp_path / "nowhere"
    for words in (
        ("data", "check", "no-data", "--out", nowhere / "r.json"),
        ("data", "pack", "no-data", tmp_path),
        ("signal", "no-network", "--json", nowhere / "s.json"),
        ("signal", "no-network", "--plot", nowhere / "s.png"),
        ("convert", "no-weights.npz", nowhere / "w.safetensors"),
    ):
        code, out, err = run(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path) in err


def test_pack_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = plant(tmp_path / "in")
    (root / "train/cat/0.png").write_bytes(b"")
    code, out, err = run(capsys, "data", "pack", root, tmp_path / "out", "--shard-mb", 0.01, "--workers", 0)
    assert (code, err) == (0, "warning: left out: train/cat/0.png: the file is empty\n")
    assert f"normfree train {tmp_path / 'out'}" in out
    assert [len(images) for images in open_dataset(str(tmp_path / "out"))] == [5, 6]
    for words, match in (
        (("pack", root, tmp_path / "out"), "exists"),
        (("pack", root, tmp_path / "two", "--workers", -1), "--workers -1"),
        (("check", tmp_path / "gone"), "no such folder"),
        ((), "there are train, eval, predict, embed, detect train, detect eval, detect predict, data check, data pack"),
        (("chek",), "did you mean 'data check'"),
    ):
        code, out, err = run(capsys, "data", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert match in err


# --- data sets by name ---


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)


def idx(array: np.ndarray) -> bytes:
    """An array in the format of MNIST's files."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def fake_mnist(folder: Path, packed: bool = False) -> dict[str, np.ndarray]:
    """MNIST's four files, with 20 training and 10 test images."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for part, rows in (("train", slice(20)), ("t10k", slice(20, 30))):
        labels = np.arange(30, dtype=np.uint8)[rows] % 10
        for name, array in ((f"{part}-images-idx3-ubyte", pixels[rows]), (f"{part}-labels-idx1-ubyte", labels)):
            content = gzip.compress(idx(array)) if packed else idx(array)
            (folder / (name + ".gz" * packed)).write_bytes(content)
    return {"train": pixels[:20], "test": pixels[20:]}


def test_every_name_has_its_class() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in DATASET_NAMES)
    assert DATASET_NAMES[0] == "mnist5k"
    for name, (cls, train, validation, content) in named._SETS.items():
        parameters = __import__("inspect").signature(getattr(torchvision.datasets, cls)).parameters
        assert {"root", "download"} <= parameters.keys(), name
        assert train is None or ("train" if isinstance(train, bool) else "split") in parameters, name
        assert type(train) is type(validation), name
        assert content is not None or "loader" in parameters, name


def test_arrays_in_torchvisions_layout(data: Path) -> None:
    pixels = fake_mnist(data / "KMNIST" / "raw")
    train, validation = open_dataset("kmnist")
    assert isinstance(train.samples, ArrayImages)
    assert np.array_equal(train.samples.pixels, pixels["train"])
    assert np.array_equal(np.asarray(validation.read(3, channels=1)), pixels["test"][3])
    assert (train.class_names[1], train.name(7)) == ("ki", "kmnist/train/00007")
    assert list(validation.targets) == list(range(10))
    assert "test images serve for validation" in train.notes[0]
    assert has_validation("kmnist")
    assert len(pickle.dumps(train)) < 30_000


def test_what_debian_has(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    pixels = fake_mnist(tmp_path / "debian", packed=True)
    monkeypatch.setattr(named, "FASHION_MNIST_FOLDER", tmp_path / "debian")
    for _ in range(2):  # unpacked, then found
        train, validation = open_dataset("fashion_mnist")
        assert isinstance(train.samples, ArrayImages)
        assert np.array_equal(train.samples.pixels, pixels["train"])
        assert (len(validation), train.class_names[0]) == (10, "T-shirt/top")
        shutil.rmtree(tmp_path / "debian", ignore_errors=True)
    assert not list(data.glob("*.partial"))


@pytest.mark.skipif(not named.FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    train, validation = open_dataset("fashion_mnist")
    assert (len(train), len(validation)) == (60_000, 10_000)
    assert set(Counter(train.targets).values()) == {6000}
    assert train.class_names[train.targets[0]] == "Ankle boot"  # as the data set's own page shows its first image


def test_pets_and_signs_in_torchvisions_layout(data: Path) -> None:
    pets = data / "oxford_pets" / "oxford-iiit-pet"  # as a download leaves it
    (pets / "annotations").mkdir(parents=True)
    (pets / "images").mkdir()
    for part, numbers in (("trainval", (1, 2)), ("test", (3,))):
        rows = [f"{kind}_{n} {label} 1 1" for n in numbers for kind, label in (("Abyssinian", 1), ("basset_hound", 2))]
        (pets / "annotations" / f"{part}.txt").write_text("\n".join(rows))
        for row in rows:
            Image.fromarray(noise(len(row))).save(pets / "images" / f"{row.split()[0]}.jpg")
    train, validation = open_dataset("oxford_pets")
    assert train.class_names == ("Abyssinian", "Basset Hound")
    assert [train.name(i) for i in (0, 1)] == [
        f"oxford-iiit-pet/images/{name}_1.jpg" for name in ("Abyssinian", "basset_hound")
    ]
    assert (train.targets, validation.targets, validation.size(1)) == ([0, 1, 0, 1], [0, 1], (24, 24))

    signs = data / "gtsrb" / "GTSRB"  # in the data folder itself, as torchvision users have it
    for label in range(3):
        (signs / "Training" / f"{label:05d}").mkdir(parents=True)
        Image.fromarray(noise(label)).save(signs / "Training" / f"{label:05d}" / "00000.ppm")
    (signs / "Final_Test" / "Images").mkdir(parents=True)
    (data / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;2\n")
    Image.fromarray(noise(9)).save(signs / "Final_Test" / "Images" / "00000.ppm")
    train, validation = open_dataset("gtsrb")
    assert (train.class_names, train.targets, validation.targets) == (("0", "1", "2"), [0, 1, 2], [2])
    assert np.array_equal(np.asarray(validation.read(0)), noise(9))


def test_files_in_torchvisions_layout(data: Path) -> None:
    textures = data / "dtd" / "dtd"
    (textures / "labels").mkdir(parents=True)
    for part, names in (("train", "banded/1 dotted/1 dotted/2"), ("val", "dotted/3"), ("test", "banded/4")):
        (textures / "labels" / f"{part}1.txt").write_text("\n".join(f"{name}.png" for name in names.split()))
        for name in names.split():
            (textures / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(len(name))).save(textures / "images" / f"{name}.png")
    train, validation = open_dataset("dtd")
    assert isinstance(train.samples, FolderImages)
    assert (train.class_names, train.targets) == (("banded", "dotted"), [0, 1, 1])
    assert (validation.name(0), validation.targets) == ("dtd/dtd/images/dotted/3.png", [1])
    assert not any("test" in note for note in train.notes)
    fields = data / "eurosat" / "2750"
    for name in ("Forest", "River"):
        (fields / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(noise(number)).save(fields / name / f"{name}_{number}.jpg")
    train, validation = open_dataset("eurosat", validation_fraction=0.2)
    assert (len(train) + len(validation), set(validation.targets), has_validation("eurosat")) == (20, {0, 1}, False)
    assert train.notes[0] == "it has no validation images: about 0.2 of each class is held out"


def test_a_folder_with_the_name_of_a_set(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(data / "cifar10")
    train, _ = open_dataset("cifar10")
    assert (train.class_names, train.name(0)) == (("cat", "dog"), "train/cat/0.png")
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / "cifar10", per_class=1)  # what the user sees comes first
    assert len(open_dataset("cifar10")[0]) == 2
    assert len(open_evaluation("cifar10", ["dog", "cat"])) == 2


def test_download_failures_are_one_line(data: Path, no_network: None) -> None:
    for name in ("flowers102", "cifar100", "mnist", "svhn"):
        complaint(
            open_dataset,
            name,
            match=f"{name} is not here and could not be downloaded .*network.*: check the network, or",
        )
    assert not list(data.glob("flowers102"))
    (data / "cifar100.partial" / "half").mkdir(parents=True)  # of an interrupted download
    complaint(open_dataset, "cifar100", match="could not be downloaded")
    complaint(open_dataset, "cifar11", match="did you mean 'cifar10'")


def test_a_download_becomes_the_set_when_it_is_whole(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(dataset: Any) -> None:
        asked.append(dataset.root)
        if not dataset._check_exists():
            fake_mnist(Path(dataset.raw_folder))

    monkeypatch.setattr(torchvision.datasets.KMNIST, "download", download)
    for _ in range(2):
        assert len(open_dataset("kmnist")[0]) == 20
    assert {str(root) for root in asked} == {str(data / "kmnist.partial")}
    assert (data / "kmnist" / "KMNIST" / "raw").is_dir()


def test_damaged_set(data: Path) -> None:
    fake_mnist(data / "KMNIST" / "raw")
    (data / "KMNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"12")
    complaint(open_dataset, "kmnist", match="kmnist in .*data is damaged")


# --- tables ---


def encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(value, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path: Path, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


IMAGES = [{"bytes": encoded(i), "path": None} for i in range(12)]


def test_parquet_written_by_the_library(tmp_path: Path) -> None:
    names = ["ant", "bee", "cow"]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
    for part, kinds in (("train", [0, 1, 0, 1, 2, 2]), ("test", [2, 1])):
        pictures = IMAGES[: len(kinds)]
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": kinds}, features=features)
        table.to_parquet(tmp_path / "in" / f"{part}-00000-of-00001.parquet")
    (tmp_path / "in/docs").mkdir()  # one folder beside tables is none of classes
    train, validation = open_dataset(str(tmp_path / "in"))
    assert isinstance(train.samples, TableImages)
    assert (train.class_names, list(train.targets)) == (tuple(names), [0, 1, 0, 1, 2, 2])
    assert (list(validation.targets), validation.name(1)) == ([2, 1], "test/0000001")
    assert "test images serve" in train.notes[0]
    assert all(np.array_equal(np.asarray(train.read(i)), noise(i, 9)) for i in range(6))
    assert train.read(0, channels=1).mode == "L"
    part = pickle.loads(pickle.dumps(train.subset([4, 1])))
    assert (part.targets, part.source(0), part.size(1)) == ([2, 1], encoded(4), (9, 9))
    assert open_evaluation(str(tmp_path / "in"), ["cow", "bee", "ant"]).targets == [0, 1]


@pytest.mark.parametrize("name", [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["bool_"])
def test_parquet_labels_of_every_integer_type(name: str, tmp_path: Path) -> None:
    labels = pa.array([1, 0] * 6, pa.int64()).cast(getattr(pa, name)())
    images = open_evaluation(
        write_table(tmp_path / "t.parquet", picture=IMAGES, kind=labels),
        ["False", "True"] if name == "bool_" else ["0", "1"],
    )
    assert images.targets == [1, 0] * 6
    wide = open_dataset(
        write_table(tmp_path / "w.parquet", picture=IMAGES, kind=pa.array([2**64 - 1, 9] * 6, pa.uint64()))
    )
    assert wide[0].class_names == ("9", str(2**64 - 1))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_labels_of_every_text_type(kind: Any, tmp_path: Path) -> None:
    labels = pa.array(["b", "a"] * 6)
    labels = labels.dictionary_encode() if pa.types.is_dictionary(kind) else labels.cast(kind)
    spec = write_table(tmp_path / "t.parquet", picture=IMAGES, kind=labels, x=[0.5] * 12)
    assert open_evaluation(spec, ["a", "b"]).targets == [1, 0] * 6


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.binary(), pa.large_binary(), pa.binary_view()),
        *(pa.struct([("bytes", b)]) for b in (pa.binary(), pa.large_binary())),
        pa.struct([("path", pa.string()), ("bytes", pa.binary()), ("width", pa.int32())]),
    ],
    ids=str,
)
def test_parquet_images_of_every_type(kind: Any, tmp_path: Path) -> None:
    pixels = [encoded(i) for i in range(12)]
    column = [{"bytes": b} for b in pixels] if pa.types.is_struct(kind) else pixels
    spec = write_table(tmp_path / "t.parquet", photo=pa.array(column, kind), kind=[i % 2 for i in range(12)])
    images = open_evaluation(spec, ["0", "1"])
    assert [images.source(i) for i in range(12)] == pixels
    assert pickle.loads(pickle.dumps(images.subset([3]))).source(0) == pixels[3]


def test_parquet_images_of_one_size(tmp_path: Path) -> None:
    pixels = [encoded(3)] * 12
    column = pa.array(pixels, pa.binary(len(pixels[0])))
    spec = write_table(tmp_path / "t.parquet", photo=column, kind=[i % 2 for i in range(12)])
    assert open_evaluation(spec, ["0", "1"]).source(5) == pixels[5]


def test_parquet_columns_by_their_names(tmp_path: Path) -> None:
    labels = ["x", "y"] * 6
    spec = write_table(
        tmp_path / "t.parquet", img=IMAGES, mask=IMAGES, cls=labels, seen=pa.array([True] * 12), id=labels
    )
    assert open_evaluation(spec, ["y", "x"]).targets == [1, 0] * 6
    spec = write_table(tmp_path / "u.parquet", img=IMAGES, score=[0.5] * 12)
    complaint(
        open_dataset, spec, match=r"is the label\? add \?label=COLUMN; there are img \(struct\), score \(float64\)"
    )


def test_empty_parts_of_tables(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for part, labels in (("train", [0, 1, 0, 1]), ("validation", [])):
        rows = {"image": IMAGES[: len(labels)], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in" / f"{part}.parquet")
    complaint(open_dataset, f"{tmp_path}/in", match="validation.parquet has no rows, and so no validation images")
    complaint(open_evaluation, f"{tmp_path}/in", ["a", "b"], match="validation.parquet has no rows")
    (tmp_path / "in/train.parquet").unlink()
    (tmp_path / "in/validation.parquet").rename(tmp_path / "in/train.parquet")
    complaint(open_dataset, f"{tmp_path}/in", match="train.parquet has no rows")
    spec = write_table(tmp_path / "e.parquet", image=pa.array([], pa.binary()), label=pa.array([], pa.int8()))
    complaint(open_evaluation, spec, ["a"], match="e.parquet has no rows")


# --- lists ---


def listed(root: Path, names: str, **lists: str) -> Path:
    """Pictures called so, and CSV files."""
    for seed, name in enumerate(names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed)).save(root / name)
    for name, content in lists.items():
        (root / f"{name}.csv").write_bytes(content.encode("utf-8"))
    return root


def labels_of(images: Any) -> dict[str, str]:
    return {images.name(i): images.class_names[target] for i, target in enumerate(images.targets)}


FOUR = {"1.png": "cat", "2.png": "dog", "3.png": "cat", "4.png": "dog"}


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("path,label", "{},{}"),
        ("\ufeffFile_Name, Class", "{}, {} "),
        ("id;category;filename", "7;{1};{0}"),
        ("label\timage", "{1}\t{0}"),
        ('"image","note","label"', '"{}","with, comma","{}"'),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_of_labels(header: str, row: str, end: str, tmp_path: Path) -> None:
    content = end.join([header, *(row.format(name, label) for name, label in FOUR.items()), "", ""])
    root = listed(tmp_path / "in", " ".join(FOUR), labels=content)
    for spec in (root / "labels.csv", root):
        images = open_evaluation(str(spec), ["dog", "cat"])
        assert (labels_of(images), images.targets) == (FOUR, [1, 0, 1, 0])
        train, validation = open_dataset(str(spec))
        assert labels_of(train) | labels_of(validation) == FOUR
        assert (len(train), len(validation), train.size(0)) == (2, 2, (24, 24))
        assert not has_validation(str(spec))


def test_lists_with_parts(tmp_path: Path) -> None:
    split = "path,label,split\n1.png,b,train\n2.png,a,TRAIN\n3.png,a,Val\n4.png,b,test\n"
    root = listed(tmp_path / "column", "1.png 2.png 3.png 4.png", labels=split)
    train, validation = open_dataset(str(root))
    assert (labels_of(train), labels_of(validation)) == ({"1.png": "b", "2.png": "a"}, {"3.png": "a"})
    (root / "labels.csv").write_text(split + "1.png,b,extra\n")
    complaint(open_dataset, str(root), match="needs a path and a label, and in a column split .* '1.png,b,extra'")

    # one list a part, as at Kaggle: paths start at the list, or in a folder called as the list
    lists = dict(train="image_id,label\n1,9\n2,10\n", val="image_id,label\n3,9\n", test="id\n4\n")
    root = listed(tmp_path / "files", "train/1.png train/2.png val/3.png test/4.png", **lists)
    (root / "sample_submission.csv").write_text("image_id,label\n4,0\n")
    train, validation = open_dataset(str(root))
    assert (train.class_names, validation.class_names) == (("9", "10"), ("9", "10"))
    assert labels_of(train) == {"train/1.png": "9", "train/2.png": "10"}
    assert labels_of(validation) == {"val/3.png": "9"}

    # as the library `datasets` has it: a list in each folder
    root = listed(tmp_path / "inner", "train/1.png train/2.png test/images/3.png")
    (root / "train/metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\n")
    (root / "test/metadata.csv").write_text("file_name,label\nimages\\3.png,b\n")  # a path of Windows
    train, validation = open_dataset(str(root))
    assert labels_of(train) == {"train/1.png": "a", "train/2.png": "b"}
    assert labels_of(validation) == {"test/images/3.png": "b"}
    assert "test images serve" in train.notes[0]


def test_lists_beside_folders(tmp_path: Path) -> None:
    paths = [f"images/{kind}/{n}.png" for kind in "ab" for n in range(3)]
    content = "path,label\n" + "".join(f"{path},{n % 2}\n" for n, path in enumerate(paths))
    root = listed(tmp_path / "one", " ".join(paths), labels=content)
    assert open_dataset(str(root))[0].class_names == ("0", "1")
    (root / "images").rename(root / "pictures")
    (root / "labels.csv").write_text(content.replace("images", "pictures"))
    assert open_dataset(str(root))[0].class_names == ("0", "1")
    shutil.move(root / "labels.csv", root / "pictures/labels.csv")  # where there are class folders they count
    (root / "pictures/labels.csv").write_text(content.replace("images/", ""))
    train, _ = open_dataset(str(root / "pictures"))
    assert train.class_names == ("a", "b")
    assert (
        train.notes[0] == f"the class folders count, and not labels.csv: to go by that give {root}/pictures/labels.csv"
    )
    assert open_dataset(f"{root}/pictures/labels.csv")[0].class_names == ("0", "1")


def test_columns_of_lists_are_named(tmp_path: Path) -> None:
    root = listed(tmp_path / "in", " ".join(FOUR), a="code,diagnosis\n1.png,x\n2.png,y\n3.png,x\n4.png,y\n")
    complaint(
        open_dataset, f"{root}/a.csv", match=r"column of .*a.csv is the image\? add \?image=COLUMN; .* code, diagnosis"
    )
    complaint(open_dataset, f"{root}/a.csv?image=code", match=r"is the label\? add \?label=COLUMN")
    assert open_evaluation(f"{root}/a.csv?image=code&label=diagnosis", ["y", "x"]).targets == [1, 0, 1, 0]
    complaint(open_dataset, f"{root}/a.csv?image=code&label=gone", match=r"is the label\?")
    complaint(open_dataset, f"{root}/a.csv?text=code", match="'text' is not one of image, label")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", r"which column of .* is the image\?"),
        ("path,label\n", "lists no images: it needs a row for each"),
        ("path,label\n1.png,a\n9.png,b\n8.png,b\n", "lists 2 of 3 images that are not there, such as .*9.png"),
        ("path,label\n1.png,a\n2.png\n", "a row needs a path and a label.*: '2.png'"),
        ("path,label\n1.png,a\n2.png, \n", "a row needs a path and a label"),
        ("path,label\n1.png,a\n1.png,b\n", "1.png is listed as 'a' and as 'b': keep one of the rows"),
        ("path,label\n1.png,a\n2.png,a\n", "has one class only, 'a'"),
        ("1.png,a\n2.png,b\n", r"which column of .* is the image\? add \?image=COLUMN; there are 1.png, a"),
    ],
)
def test_complaints_about_lists(content: str, match: str, tmp_path: Path) -> None:
    root = listed(tmp_path / "in", "1.png 2.png", labels=content)
    complaint(open_dataset, f"{root}/labels.csv", match=match)
    complaint(open_dataset, f"{root}/gone.csv", match="cannot read .*gone.csv .*[Nn]o such file")


@pytest.mark.parametrize(
    ("columns", "classes", "targets"),
    [
        ({"image": IMAGES, "label": [i % 2 for i in range(12)], "id": list(range(12))}, ("0", "1"), [0, 1]),
        ({"jpg": [i["bytes"] for i in IMAGES], "cls": ["b", "a"] * 6}, ("a", "b"), [1, 0]),
        ({"a": IMAGES, "number": pa.array([7, 30] * 6, pa.int32()), "x": [0.5] * 12}, ("7", "30"), [0, 1]),
    ],
)
def test_parquet_of_others(tmp_path: Path, columns: Any, classes: Any, targets: list[int]) -> None:
    spec = write_table(tmp_path / "table.parquet", **columns)
    images = open_evaluation(spec, classes)
    assert images.class_names == classes
    assert list(images.targets) == targets * 6
    assert np.array_equal(np.asarray(images.read(5)), noise(5, 9))
    train, validation = open_dataset(spec, validation_fraction=0.25)
    assert (len(train) + len(validation), set(train.targets), set(validation.targets)) == (12, {0, 1}, {0, 1})
    assert "no validation images" in train.notes[0]


def test_columns_are_asked_for_and_named(tmp_path: Path) -> None:
    fine, coarse = ["a", "b", "c"] * 4, ["x", "y"] * 6
    spec = write_table(tmp_path / "in/t.parquet", image=IMAGES, mask=IMAGES[::-1], fine=fine, coarse=coarse)
    complaint(
        open_dataset,
        spec,
        match=r"is the label\? add \?label=COLUMN; there are image \(struct\), mask \(struct\), fine",
    )
    assert open_evaluation(f"{spec}?label=coarse", ["x", "y"]).source(0) == encoded(0)
    assert open_evaluation(f"{spec}?label=fine&image=mask", ["a", "b", "c"]).source(0) == encoded(11)
    assert open_evaluation(f"{tmp_path}/in?label=fine", ["a", "b", "c"]).source(0) == encoded(0)
    complaint(open_dataset, f"{spec}?label=other", match="which column is the label")
    complaint(open_dataset, f"{spec}?label=image", match="which column is the label")
    complaint(open_dataset, f"{spec}?labels=fine", match="'labels' is not one of image, label, config")


def test_stream_of_a_table_is_the_same_for_any_workers(tmp_path: Path) -> None:
    spec = write_table(tmp_path / "t.parquet", image=IMAGES, label=[i % 2 for i in range(12)])
    images = open_dataset(spec)[0]

    def stream(workers: int) -> list[Any]:
        steps = dict(batch_size=4, seed=1, start_step=0, stop_step=6)
        return list(train_batches(images, TrainTransform(8), workers=workers, **steps))

    for a, b in zip(stream(0), stream(2), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)


def test_complaints_about_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint(open_dataset, f"{tmp_path}/gone.parquet", match="no such file: .*gone.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table PAR1")
    complaint(open_dataset, f"{tmp_path}/bad.parquet", match="cannot read .*bad.parquet")
    spec = write_table(tmp_path / "t.parquet", image=IMAGES[:3], label=[0, 1, None])
    complaint(open_dataset, spec, match="images of images have no label in column 'label'")
    spec = write_table(tmp_path / "u.parquet", image=[None, {"bytes": b"x", "path": None}], label=[0, 1])
    images = open_evaluation(spec, ["0", "1"])
    with pytest.raises(UnreadableImage, match="images/0000000: there is no image in its row"):
        images.read(0)
    with pytest.raises(UnreadableImage, match="images/0000001: not an image"):
        images.read(1)
    complaint(open_dataset, "hf://datasets/one", match="write hf://datasets/OWNER/NAME")
    complaint(open_dataset, "hf://owner/name", match="write hf://datasets/OWNER/NAME")
    monkeypatch.setitem(sys.modules, "datasets", None)
    complaint(open_dataset, spec, match=r'need the library datasets: pip install "normfree\[data\]"')


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["n", "y"])})
    asked = []

    def load(name: str, config: str | None = None, **options: Any) -> Any:
        asked.append((name, config))
        if name == "an/error":
            raise ConnectionError("Couldn't reach 'an/error' on the Hub\nmore lines")
        rows = {"img": IMAGES[:4], "label": [0, 1, 1, 0]}
        hidden = datasets.Dataset.from_dict({"img": IMAGES[:4], "label": [-1] * 4}, features=features)
        whole = datasets.Dataset.from_dict(rows, features=features)
        return datasets.DatasetDict({"test": hidden, "train": whole} | ({"valid": whole} if config else {}))

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, validation = open_dataset("hf://datasets/owner/name?config=small")
    assert (asked[-1], train.class_names) == (("owner/name", "small"), ("n", "y"))
    assert (validation.name(0), list(validation.targets)) == ("valid/0000000", [0, 1, 1, 0])
    complaint(open_dataset, "hf://datasets/owner/name", match="images of test have no label in column 'label'")
    complaint(open_dataset, "hf://datasets/an/error", match="cannot read hf://datasets/an/error .*Couldn't reach")
