"""Crops against the authors' TensorFlow code, torchvision and their own formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from normfree.data import EvalTransform, TrainTransform, normalize, sample_rng
from normfree.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "preprocess.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture
def photograph(golden: dict[str, np.ndarray]) -> Image.Image:
    return Image.fromarray(golden["image"])


# --- evaluation ---


@pytest.mark.parametrize("px", [64, 96])
@pytest.mark.parametrize(("crop", "key"), [("resize_crop", "resize_crop_32"), ("crop_resize", "crop_resize")])
def test_authors_crops(crop, key: str, px: int, golden: dict[str, np.ndarray], photograph: Image.Image) -> None:
    expected = torch.from_numpy(golden[f"{key}_{px}"]).permute(2, 0, 1)
    ours = normalize(EvalTransform(px, crop)(photograph)[None], MEAN, STD)[0]
    assert ours.dtype == torch.float32
    value_range = float(expected.max() - expected.min())
    assert float((ours - expected).abs().max()) < 5e-7 * value_range


def test_authors_crops_overshoot() -> None:
    """Nothing is clamped: beside a hard edge the cubic kernel leaves 0..255."""
    edge = Image.fromarray(np.repeat(np.where(np.arange(40) < 20, 0, 255).astype(np.uint8)[None], 40, axis=0))
    ours = EvalTransform(64, "resize_crop")(edge)
    assert float(ours.min()) < -5
    assert float(ours.max()) > 260


@pytest.mark.parametrize("size", [(97, 61), (61, 97), (300, 200), (40, 40), (33, 500)])
@pytest.mark.parametrize(("px", "fraction"), [(32, 0.875), (24, 1.0), (31, 0.8)])
def test_center_is_torchvisions_resize_and_crop(size: tuple[int, int], px: int, fraction: float) -> None:
    # No values near 0 and 255: Pillow clips between its two passes, and may take them in another order for a box.
    image = Image.fromarray(np.random.default_rng(0).integers(80, 176, (*size[::-1], 3), dtype=np.uint8))
    both = v2.Compose([v2.Resize(round(px / fraction), v2.InterpolationMode.BICUBIC), v2.CenterCrop(px)])
    expected = v2.functional.pil_to_tensor(both(image))
    ours = EvalTransform(px, crop_fraction=fraction)(image)
    assert ours.dtype == torch.uint8
    assert int((ours.int() - expected.int()).abs().max()) <= 2  # and rounds there, too


def test_center_of_a_line_stays_small() -> None:
    """Resizing first would make 256 x 5,120,000 pixels of it."""
    assert EvalTransform(224)(Image.new("RGB", (1, 20_000), "white")).float().mean() == 255


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 70), height=st.integers(1, 70), px=st.integers(1, 40), grey=st.integers(0, 255))
def test_every_size_gives_the_asked_shape_and_flat_stays_flat(width: int, height: int, px: int, grey: int) -> None:
    image = Image.new("L", (width, height), grey)
    for transform in (EvalTransform(px), EvalTransform(px, "resize_crop"), EvalTransform(px, "crop_resize")):
        tensor = transform(image)
        assert tensor.shape == (1, px, px)
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor.float(), torch.full((1, px, px), float(grey)), rtol=1e-5, atol=1e-4)
    tensor = TrainTransform(px)(image, sample_rng(0, 0, width))
    assert tensor.shape == (1, px, px)
    assert tensor.dtype == torch.uint8
    assert tensor.unique().tolist() == [grey]
    tensor = TrainTransform(px, style="shift")(image, sample_rng(0, 0, width))
    assert (tensor.shape, tensor.dtype) == ((1, px, px), torch.uint8)
    assert tensor.unique().tolist() == [grey]
    tensor = TrainTransform(px, style="paper")(image, sample_rng(0, 0, width))
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor, torch.full((1, px, px), float(grey)), rtol=1e-5, atol=1e-4)


def test_wrong_settings() -> None:
    with pytest.raises(InputError, match="crop_fraction in"):
        EvalTransform(32, crop_fraction=0)
    with pytest.raises(InputError, match="must be center, resize_crop or crop_resize"):
        EvalTransform(32, "centre")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="min_area in"):
        TrainTransform(32, min_area=0)
    with pytest.raises(InputError, match=r"style pil, paper or shift$"):
        TrainTransform(32, style="PIL")  # pyright: ignore[reportArgumentType]


# --- training ---


def test_sample_rng_is_a_function_of_its_key() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 5, 10**9)]
    draws = {key: sample_rng(*key).random(4).tolist() for key in keys}
    assert all(sample_rng(*key).random(4).tolist() == draws[key] for key in keys)
    assert len({tuple(draw) for draw in draws.values()}) == len(keys)
    assert sample_rng(0, 0, 0, stream=1).random() != sample_rng(0, 0, 0).random()


def test_first_draws_of_neighbouring_keys_are_uniform() -> None:
    draws = np.sort([sample_rng(0, epoch, index).random() for epoch in range(4) for index in range(1000)])
    distance = np.abs(draws - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 1.63 / math.sqrt(4000)  # Kolmogorov-Smirnov at 1%


@pytest.mark.parametrize(("flip", "chi_square"), [(True, 85.4), (False, 51.2)])  # 0.1 % of 49, of 24 degrees of freedom
def test_shifts_are_the_evaluated_picture_moved_and_reflected(flip: bool, chi_square: float) -> None:
    """As torchvision's RandomCrop of it with its edges reflected, and each of those crops about as often."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 33, 3), dtype=np.uint8)
    image, px, most = Image.fromarray(pixels), 32, 2
    around = v2.functional.pad(EvalTransform(px, crop_fraction=1.0)(image), [most], padding_mode="reflect")
    crops = {}
    for y, x, mirrored in itertools.product(range(2 * most + 1), range(2 * most + 1), range(1 + flip)):
        crop = around[:, y : y + px, x : x + px]
        crops[(crop.flip(2) if mirrored else crop).numpy().tobytes()] = 0
    transform, draws = TrainTransform(px, flip=flip, style="shift"), 40 * len(crops)
    for index in range(draws):
        crops[transform(image, sample_rng(0, 0, index)).numpy().tobytes()] += 1  # KeyError: is none of them
    assert len(crops) == 25 * (1 + flip)
    assert sum((count - 40) ** 2 / 40 for count in crops.values()) < chi_square


def boxes(transform: TrainTransform, width: int, height: int, count: int) -> np.ndarray:
    return np.array([transform.crop_box(width, height, sample_rng(0, 0, index)) for index in range(count)])


def test_crop_boxes_follow_the_formula() -> None:
    """Where every crop fits: area uniform, log ratio uniform, place uniform, and the two are independent."""
    crops = boxes(TrainTransform(8, min_area=0.1, max_ratio=1.3), 4000, 4000, 4000)
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    area, log_ratio = width * height / 4000**2, np.log(width / height)
    fits = area < 1 / 1.3  # no crop below this area is ever rejected
    for values, low, high in ((area[fits], 0.1, 1 / 1.3), (log_ratio[fits], -math.log(1.3), math.log(1.3))):
        uniform = (np.sort(values) - low) / (high - low)
        ranks = (np.arange(len(uniform)) + 0.5) / len(uniform)
        assert np.abs(uniform - ranks).max() < 1.63 / math.sqrt(len(uniform))
    assert abs(np.corrcoef(area[fits], log_ratio[fits])[0, 1]) < 0.06
    place = crops[fits, 0] / (4000 - width[fits])
    assert np.abs(np.sort(place) - (np.arange(fits.sum()) + 0.5) / fits.sum()).max() < 1.63 / math.sqrt(fits.sum())
    assert area.min() >= 0.0999
    assert crops.min() >= 0
    assert crops.max() <= 4000


def test_crop_boxes_match_torchvision_where_some_do_not_fit() -> None:
    """On a wide picture many draws are rejected; means and spreads must still be torchvision's."""
    torch.manual_seed(0)
    image = torch.empty(1, 300, 600)
    crop = v2.RandomResizedCrop(8, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), antialias=True)
    drawn = [crop.make_params([image]) for _ in range(3000)]
    theirs = np.array([(p["width"], p["height"], p["left"], p["top"]) for p in drawn], dtype=float)
    ours = boxes(TrainTransform(8), 600, 300, 3000)
    ours = np.stack([ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 0], ours[:, 1]], axis=1).astype(float)
    error = 4 * theirs.std(axis=0) * math.sqrt(2 / 3000)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < error).all()
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.07)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (1, 1, (0, 0, 1, 1))],
)
def test_central_crop_where_nothing_fits(width: int, height: int, box: tuple[int, int, int, int]) -> None:
    assert TrainTransform(8, min_area=1.0).crop_box(width, height, sample_rng(0, 0, 0)) == box


def test_min_px_leaves_the_smallest_crop_enough_pixels() -> None:
    transform = TrainTransform(50)
    crops = boxes(transform, transform.min_px, 2 * transform.min_px, 2000)
    sides = np.minimum(crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1])
    assert sides.min() >= 50
    assert EvalTransform(224, crop_fraction=0.875).min_px == 512
    assert EvalTransform(224, "resize_crop").min_px is None


def test_train_transform_is_its_crop_resized(photograph: Image.Image) -> None:
    transform = TrainTransform(40, flip=False)
    box = transform.crop_box(*photograph.size, sample_rng(1, 2, 3))
    expected = np.asarray(photograph.resize((40, 40), Image.Resampling.BICUBIC, box=box))
    ours = transform(photograph, sample_rng(1, 2, 3))
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), expected)
    assert torch.equal(ours, transform(photograph, sample_rng(1, 2, 3)))
    assert not torch.equal(ours, transform(photograph, sample_rng(1, 2, 4)))


def test_flip_mirrors_half_of_the_images(photograph: Image.Image) -> None:
    plain, flipping = TrainTransform(16, flip=False), TrainTransform(16)
    flips = 0
    for index in range(200):
        straight = plain(photograph, sample_rng(0, 0, index))
        ours = flipping(photograph, sample_rng(0, 0, index))
        flips += torch.equal(ours, straight.flip(2))
        assert torch.equal(ours, straight) or torch.equal(ours, straight.flip(2))
    assert 75 < flips < 125


# --- training as the released code does it ---


def test_papers_crop_boxes_follow_the_formula() -> None:
    """Width / height uniform, then the height among those that ratio and area allow; no crop below a tenth is kept."""
    side, count = 4000, 4000
    crops = boxes(TrainTransform(8, style="paper"), side, side, count)
    width, height = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    area, ratio = width * height / side**2, width / height
    assert 0.1 <= area.min() < 0.105
    assert 0.95 < area.max() < 1

    def heights(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The least that is drawn, the least that is kept, the most."""
        return np.sqrt(0.08 / ratio), np.sqrt(0.1 / ratio), np.minimum(1, 1 / ratio)

    _, low, high = heights(ratio)
    assert distance((height / side - low) / (high - low)) < 1.63 / math.sqrt(count)
    ratios = np.linspace(0.75, 4 / 3, 10_001)
    drawn, low, high = heights(ratios)
    kept = (high - low) / (high - drawn)  # of each ratio, which is uniform before
    assert distance(np.interp(ratio, ratios, kept.cumsum() / kept.sum())) < 1.63 / math.sqrt(count)
    inside = (width < side) & (height < side)
    for place, length in ((crops[inside, 0], width[inside]), (crops[inside, 1], height[inside])):
        assert distance((place + 0.5) / (side - length)) < 1.63 / math.sqrt(inside.sum())
        assert (place < side - length).all()


def distance(values: np.ndarray) -> float:
    """Kolmogorov and Smirnov's, from the uniform distribution on [0, 1]."""
    return float(np.abs(np.sort(values) - (np.arange(len(values)) + 0.5) / len(values)).max())


def test_papers_crop_where_nothing_fits_is_the_evaluation_crop(
    golden: dict[str, np.ndarray], photograph: Image.Image
) -> None:
    transform = TrainTransform(64, min_area=1.0, flip=False, style="paper")
    ours = transform(photograph, sample_rng(0, 0, 0))
    assert ours.dtype == torch.float32
    expected = torch.from_numpy(golden["crop_resize_64"]).permute(2, 0, 1)
    torch.testing.assert_close(normalize(ours[None], MEAN, STD)[0], expected, rtol=0, atol=2e-6)
    flipping = replace(transform, flip=True)
    images = [flipping(photograph, sample_rng(0, 0, index)) for index in range(40)]
    assert all(torch.equal(image, ours) or torch.equal(image, ours.flip(2)) for image in images)
    assert 8 < sum(torch.equal(image, ours) for image in images) < 32


def test_papers_crop_is_resized_without_antialiasing(photograph: Image.Image) -> None:
    """A crop twice as large as its result: the cubic half-way between pixels weighs them -1/16, 9/16, 9/16, -1/16."""
    transform = TrainTransform(20, flip=False, style="paper")
    image = photograph.crop((200, 100, 260, 160))
    crops = boxes(transform, *image.size, 10_000)
    index = next(i for i, (left, upper, right, lower) in enumerate(crops) if right - left == lower - upper == 40)
    left, upper, right, lower = crops[index]
    pixels = np.asarray(image)[upper:lower, left:right].astype(float)
    weights = np.array([-1, 9, 9, -1]) / 16
    rows = sum(weights[k] * pixels[1 + k : 36 + k : 2] for k in range(4))
    expected = sum(weights[k] * rows[:, 1 + k : 36 + k : 2] for k in range(4))
    ours = transform(image, sample_rng(0, 0, index)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours[1:-1, 1:-1], expected, atol=1e-4)
    assert transform.min_px is None


# --- normalization ---


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    expected = (images.numpy() / 255 - mean) / std
    ours = normalize(images, MEAN, STD)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-6, atol=1e-6)
    floats = images.float()
    assert torch.equal(normalize(floats, MEAN, STD), ours)
    assert torch.equal(floats, images.float())  # the argument is left alone
    grey = normalize(images[:, :1], (0.5,), (0.25,))
    assert (float(grey.min()), float(grey.max())) == pytest.approx(
        (int(images[:, 0].min()) / 63.75 - 2, int(images[:, 0].max()) / 63.75 - 2), abs=1e-6
    )
