"""The sixteen operations against the authors' outputs, Pillow's meaning of their names, and how they are drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from normfree.config import AugmentStyle
from normfree.data import RandAugment, randaugment, sample_rng
from normfree.data.randaugment import APPLY, OPERATIONS, cutout, strengths
from normfree.errors import InputError

with np.load(Path(__file__).parent / "golden" / "augment_ops.npz") as file:
    GOLDEN = {key: file[key] for key in file.files}
CASES = json.loads(str(GOLDEN["spec"]))
BILINEAR, DEGREES = v2.InterpolationMode.BILINEAR, math.degrees(math.atan(0.3))
STYLES: tuple[AugmentStyle, ...] = ("paper", "pil")


def noise(height: int = 30, width: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


# --- paper ---


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['op']}-{case['args']}-{case['source']}")
def test_authors_operations(case: dict) -> None:
    """To the last grey level."""
    image = Image.fromarray(GOLDEN[case["source"]])
    ours = APPLY["paper"][case["op"]](image, *(case["args"] or [0]))
    assert np.array_equal(np.asarray(ours), GOLDEN[case["key"]])


def test_authors_cases_are_all_there() -> None:
    assert len(CASES) == 59
    assert {case["op"] for case in CASES} | {"Cutout"} == set(OPERATIONS) == set(APPLY["paper"]) | {"Cutout"}
    assert len(OPERATIONS) == 16
    assert set(APPLY["pil"]) == set(APPLY["paper"])


@pytest.mark.parametrize(
    ("magnitude", "degrees", "tangent", "px", "factor", "bits", "threshold", "addition", "half_px"),
    [
        (5, 15, 0.15, 50, 1.0, 2, 128, 55, 20),
        (10, 30, 0.30, 100, 1.9, 4, 0, 110, 40),  # 256 does not fit into uint8
        (15, 45, 0.45, 150, 2.8, 6, 128, 165, 60),  # nor does 384
    ],
)
def test_authors_strengths(magnitude, degrees, tangent, px, factor, bits, threshold, addition, half_px) -> None:
    expected = {"AutoContrast": 0, "Equalize": 0, "Invert": 0, "Rotate": degrees, "ShearX": tangent, "ShearY": tangent}
    expected |= {"TranslateX": px, "TranslateY": px, "Posterize": bits, "Solarize": threshold, "SolarizeAdd": addition}
    expected |= {"Cutout": half_px, **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor)}
    told = strengths(magnitude, "paper", 192, 64)
    assert list(told) == list(OPERATIONS)
    assert told == pytest.approx(expected)


@pytest.mark.parametrize(("magnitude", "kept"), [(0, 1), (2.5, 1), (5, 2), (17.5, 7), (20, 8), (22.5, 1), (30, 1)])
def test_authors_posterize_over_all_magnitudes(magnitude: float, kept: int) -> None:
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    bits = strengths(magnitude, "paper", 1, 1)["Posterize"]
    assert len(np.unique(np.asarray(APPLY["paper"]["Posterize"](levels, bits)))) == 2**kept


# --- pil ---


def test_strengths_grow_with_magnitude_and_picture() -> None:
    assert strengths(0, "pil", 224, 224) == dict.fromkeys(OPERATIONS, 0) | {"Posterize": 8, "Solarize": 256}
    assert strengths(5, "pil", 224, 224) == pytest.approx(
        dict.fromkeys(("AutoContrast", "Equalize", "Invert"), 0)
        | {"Rotate": 15, "ShearX": 0.15, "ShearY": 0.15, "TranslateX": 50, "TranslateY": 50, "Cutout": 20}
        | {"Posterize": 6, "Solarize": 128, "SolarizeAdd": 55}
        | dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 0.45)
    )
    small = strengths(10, "pil", 56, 112)
    assert (small["TranslateX"], small["TranslateY"], small["Cutout"]) == (25, 50, 10)
    assert strengths(15, "pil", 224, 224)["Posterize"] == 2
    assert strengths(30, "pil", 224, 224)["Posterize"] == 1
    assert strengths(15, "pil", 224, 224)["Solarize"] == 0


@pytest.mark.parametrize(
    "name", ["Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness"]
)
def test_pictures_change_more_with_magnitude(name: str) -> None:
    image = Image.fromarray(GOLDEN["image_square"])
    changes = []
    for magnitude in (0, 2, 4, 6, 8, 10):
        changed = APPLY["pil"][name](image, strengths(magnitude, "pil", 96, 96)[name])
        changes.append(np.abs(np.asarray(changed).astype(float) - GOLDEN["image_square"]).mean())
    assert changes[0] == 0
    assert changes == sorted(changes)
    assert changes[-1] > 2 * changes[1] > 0


@pytest.mark.parametrize(
    ("name", "strength", "reference"),
    [
        ("AutoContrast", 0, F.autocontrast),
        ("Equalize", 0, F.equalize),
        ("Invert", 0, F.invert),
        ("Posterize", 3, lambda image: F.posterize(image, 3)),
        ("Solarize", 100, lambda image: F.solarize(image, 100)),
        ("Color", -0.45, lambda image: F.adjust_saturation(image, 0.55)),
        ("Contrast", -0.45, lambda image: F.adjust_contrast(image, 0.55)),
        ("Brightness", 0.45, lambda image: F.adjust_brightness(image, 1.45)),
        ("Brightness", -1.35, lambda image: F.adjust_brightness(image, 0.1)),
        ("Sharpness", -0.45, lambda image: F.adjust_sharpness(image, 0.55)),
        ("TranslateX", 7, lambda image: F.affine(image, 0, [-7, 0], 1, [0, 0], fill=128)),
        ("TranslateY", -5, lambda image: F.affine(image, 0, [0, 5], 1, [0, 0], fill=128)),
        ("Rotate", 30, lambda image: F.rotate(image, 30, BILINEAR, fill=128)),
        ("ShearX", 0.3, lambda image: F.affine(image, 0, [0, 0], 1, [DEGREES, 0], BILINEAR, fill=128, center=[0, 0])),
        ("ShearY", 0.3, lambda image: F.affine(image, 0, [0, 0], 1, [0, DEGREES], BILINEAR, fill=128, center=[0, 0])),
    ],
)
def test_names_keep_their_promise(name: str, strength: float, reference: Callable) -> None:
    """torchvision's operations on tensors, which share no code with Pillow."""
    pixels = GOLDEN["image_square"]
    expected = reference(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    ours = np.asarray(APPLY["pil"][name](Image.fromarray(pixels), strength))
    difference = np.abs(ours.astype(int) - expected)
    assert np.percentile(difference, 98) <= 2  # the rim of a turned picture is blended with the grey in another way
    assert difference.mean() < 1


def test_contrast_keeps_the_mean_where_the_authors_does_not() -> None:
    image = Image.fromarray(GOLDEN["image_square"])
    mean = GOLDEN["image_square"].mean()
    assert abs(np.asarray(APPLY["pil"]["Contrast"](image, -0.8)).mean() - mean) < 3
    assert abs(np.asarray(APPLY["paper"]["Contrast"](image, 0.2)).mean() - (0.8 * 36 + 0.2 * mean)) < 1


# --- both ---


def test_the_table_of_the_documentation() -> None:
    page = Path(__file__).parents[1] / "docs" / "augmentation.md"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text(encoding="utf-8").splitlines()]
    table = {cells[0]: cells[2:] for cells in rows if len(cells) == 8}
    columns = [strengths(magnitude, style, 224, 224) for style in STYLES for magnitude in (5, 10, 15)]
    seen = []
    for names, cells in table.items():
        for name in names.split(", "):
            if name in OPERATIONS:
                seen.append(name)
                assert [float(cell or 0) for cell in cells] == pytest.approx([told[name] for told in columns])
    assert sorted(seen) == sorted(OPERATIONS)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", sorted(APPLY["paper"]))
def test_grey_pictures_are_treated_as_the_channels_of_coloured_ones(name: str, style: AugmentStyle) -> None:
    grey = Image.fromarray(noise(channels=1)[..., 0])
    strength = strengths(7, style, *grey.size)[name]
    of_grey = APPLY[style][name](grey, strength)
    assert (of_grey.mode, of_grey.size) == ("L", grey.size)
    of_rgb = np.asarray(APPLY[style][name](grey.convert("RGB"), strength))
    assert np.array_equal(of_rgb, np.repeat(np.asarray(of_grey)[..., None], 3, axis=2))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (1, 9)])
def test_tiny_pictures(size: tuple[int, int], style: AugmentStyle) -> None:
    pixels = noise(*size)
    for name in APPLY[style]:
        assert APPLY[style][name](Image.fromarray(pixels), strengths(15, style, *size[::-1])[name]).size == size[::-1]


def test_cutout_is_a_grey_square_as_far_as_it_is_inside() -> None:
    expected = noise()
    image = Image.fromarray(expected)
    assert np.array_equal(np.asarray(cutout(image, 0, 20, 15)), expected)
    for x, y in ((20, 15), (0, 29), (39, 2)):
        changed = expected.copy()
        changed[max(0, y - 6) : y + 6, max(0, x - 6) : x + 6] = 128
        assert np.array_equal(np.asarray(cutout(image, 6, x, y)), changed)
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_pictures_in_array_out(channels: int, style: AugmentStyle) -> None:
    pixels = noise(channels=channels)
    augment = RandAugment(4, 10, style)
    for index in range(20):
        ours = augment(pixels, sample_rng(0, 0, index))
        assert ours.shape == pixels.shape
        assert ours.dtype == np.uint8
        image = Image.fromarray(pixels.squeeze())
        assert np.array_equal(augment(image, sample_rng(0, 0, index)), ours)
    assert np.array_equal(pixels, noise(channels=channels))
    assert np.array_equal(RandAugment(0)(pixels, sample_rng(0, 0, 0)), pixels)


def test_floats_are_cut_off() -> None:
    floats = np.array([-7.0, 0.99, 1.0, 254.99, 300.0], np.float32).reshape(1, 5, 1)
    assert RandAugment(0)(floats, sample_rng(0, 0, 0)).ravel().tolist() == [0, 0, 1, 254, 255]


def drawn(monkeypatch: pytest.MonkeyPatch, style: AugmentStyle, count: int) -> tuple[dict[str, list], list]:
    """What `count` pictures are told, by operation, and where Cutout was put."""
    told: dict[str, list] = {name: [] for name in OPERATIONS}
    centres = []

    def record(name: str) -> Callable:
        return lambda image, strength: (told[name].append(strength), image)[1]

    def record_cutout(image: Image.Image, half_px: int, x: int, y: int) -> Image.Image:
        told["Cutout"].append(half_px)
        centres.append((x, y))
        return image

    monkeypatch.setitem(APPLY, style, {name: record(name) for name in APPLY[style]})
    monkeypatch.setattr(randaugment, "cutout", record_cutout)
    for index in range(count):
        RandAugment(4, 5, style)(Image.new("L", (50, 40)), sample_rng(0, 0, index))
    return told, centres


@pytest.mark.parametrize("style", STYLES)
def test_operations_signs_and_places_are_drawn_evenly(style: AugmentStyle, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2000
    told, centres = drawn(monkeypatch, style, count)
    assert sum(map(len, told.values())) == 4 * count  # always applied
    signed = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
    signed |= {"Color", "Contrast", "Brightness", "Sharpness"} if style == "pil" else set()
    for name, expected in strengths(5, style, 50, 40).items():
        values = np.array(told[name])
        deviation = math.sqrt(4 * count * 1 / 16 * 15 / 16)
        assert abs(len(values) - 4 * count / 16) < 4 * deviation
        assert np.allclose(np.abs(values), expected)
        if name in signed:
            assert abs((values < 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(values))
        else:
            assert (values >= 0).all()
    for position, side in zip(np.array(centres).T, (50, 40), strict=True):
        assert (position.min(), position.max()) == (0, side - 1)
        assert abs(position.mean() - (side - 1) / 2) < 4 * side / math.sqrt(12 * len(centres))


@pytest.mark.parametrize("wrong", [{"num_layers": -1}, {"magnitude": 31}, {"magnitude": -1}, {"style": "PIL"}])
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(InputError, match=r"magnitude 0 to 30, style paper or pil$") as caught:
        RandAugment(**wrong)
    assert "\n" not in str(caught.value)
