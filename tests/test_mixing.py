"""MixUp and CutMix against the authors' masks and their distributions, and the loss against explicit mixed labels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normfree.config import load_config, save_config
from normfree.data import Batch, Mixing, sample_rng
from normfree.data.mixing import cutmix, cutmix_box, mixup
from normfree.engine.loop import Shard
from normfree.errors import InputError
from normfree.recipes.small import mnist5k
from normfree.tasks.classification import build, smoothed_cross_entropy

with np.load(Path(__file__).parent / "golden" / "preprocess.npz") as file:
    GOLDEN = {key: file[key] for key in file.files if key.startswith("cutmix")}
MASKS = json.loads(str(GOLDEN["cutmix_spec"]))


# --- two images to one ---


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case["key"])
def test_authors_masks(case: dict) -> None:
    width, height = case["w"], case["h"]
    box = cutmix_box(width, height, case["r_x"], case["r_y"], case["image1_proportion"])
    mask, ratio = cutmix(torch.ones(3, height, width), torch.zeros(3, height, width), box)
    assert np.array_equal(mask.numpy(), np.broadcast_to(GOLDEN[case["key"]], (3, height, width)))
    assert ratio == case["ratio"]


def test_mixup_is_the_weighted_sum() -> None:
    first, second = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = 0.3 * first.double() + 0.7 * second.double()
    mixed, ratio = mixup(first, second, 0.3)
    assert ratio == 0.3
    assert mixed.dtype == torch.uint8
    assert float((mixed.double() - expected).abs().max()) < 0.5001
    floats, _ = mixup(first.float() - 20, second.float() + 40, 0.3)  # beyond 0..255, as crops of the paper's style are
    torch.testing.assert_close(floats.double(), expected + 22)
    assert torch.equal(mixup(first, second, 1.0)[0], first)
    assert torch.equal(mixup(first, second, 0.0)[0], second)


def test_the_images_are_left_alone() -> None:
    first, second = torch.full((1, 8, 8), 200, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    mixup(first, second, 0.5)
    cutmix(first, second, (0, 0, 8, 8))
    assert int(first.min()) == 200
    assert int(second.max()) == 0


# --- what is drawn ---


def draws(mixing: Mixing, place: int, count: int, px: int = 16) -> tuple[torch.Tensor, np.ndarray]:
    """Mixtures of white and black, (count, px, px), and their ratios."""
    white, black = torch.ones(1, px, px), torch.zeros(1, px, px)
    pairs = [mixing(white, black, place, sample_rng(0, 0, index)) for index in range(count)]
    return torch.cat([image for image, _ in pairs]), np.array([ratio for _, ratio in pairs])


def test_mixup_draws_its_ratios_from_beta() -> None:
    count = 3000
    images, ratios = draws(Mixing(mixup=0.2, cutmix=0), 1, count)
    for bound, share in (
        (0.001, 0.1322),
        (0.01, 0.20978),
        (0.1, 0.33669),
        (0.3, 0.4332),
        (0.5, 0.5),
    ):  # of Beta(.2, .2)
        for part in ((ratios < bound).mean(), (ratios > 1 - bound).mean()):
            assert abs(part - share) < 4 * math.sqrt(share * (1 - share) / count)
    np.testing.assert_allclose(images.flatten(1).mean(1), ratios, atol=1e-6)
    assert float(images.flatten(1).std(1).max()) < 1e-6


def test_cutmix_draws_boxes_uniformly() -> None:
    px, count = 64, 3000
    images, ratios = draws(Mixing(mixup=0, cutmix=1), 0, count, px)
    assert set(images.unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(images.flatten(1).mean(1), ratios, atol=1e-6)
    # a share u of the area is uniform: the side √u px is 2k or 2k + 1 with this probability, and clipped 2k pixels long
    k, centre = np.arange(px // 2), np.arange(px)[:, None]
    probability = ((2 * k + 2) ** 2 - (2 * k) ** 2) / px**2
    length = (np.minimum(centre + k, px) - np.maximum(centre - k, 0)).mean(0)
    assert probability.sum() == pytest.approx(1)
    assert abs(ratios.mean() - (probability * (length / px) ** 2).sum()) < 4 * ratios.std() / math.sqrt(count)
    rows, columns = images.amax(2), images.amax(1)
    for line in (rows, columns):
        first, last = line.argmax(1).numpy(), px - 1 - line.flip(1).argmax(1).numpy()
        inner = (line.amax(1).numpy() > 0) & (first > 0) & (last < px - 1)
        lengths = (last - first + 1)[inner]
        assert (lengths % 2 == 0).all()
        starts = (first[inner] - 0.5) / (px - lengths - 1)  # 1 to px - length - 1, all of them equally likely
        distance = np.abs(np.sort(starts) - (np.arange(len(starts)) + 0.5) / len(starts)).max()
        assert distance < 1.63 / math.sqrt(len(starts))  # Kolmogorov-Smirnov at 1%


def test_halves_of_the_batch() -> None:
    both = Mixing(0.2, 1.0)
    for place in (0, 2, 6):
        assert float(draws(both, place, 50)[0].flatten(1).std(1).max()) < 1e-6  # one grey: MixUp
    for place in (1, 3, 7):
        assert set(draws(both, place, 50)[0].unique().tolist()) == {0.0, 1.0}  # two: CutMix


@pytest.mark.parametrize("wrong", [(0, 0), (-0.1, 1), (0.2, -1)])
def test_wrong_settings(wrong: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="both are at least 0 and one is more"):
        Mixing(*wrong)
    with pytest.raises(InputError, match="pairs is 'rows'; it must be stream or batch"):
        Mixing(pairs="rows")  # type: ignore


# --- loss and configuration ---


def test_loss_is_that_of_the_mixed_and_smoothed_label() -> None:
    generator = torch.Generator().manual_seed(0)
    num_classes, smoothing = 7, 0.1
    logits = (5 * torch.randn(6, num_classes, generator=generator)).double()
    first, second = torch.randint(num_classes, (2, 6), generator=generator)
    ratios = torch.rand(6, generator=generator).double()
    labels = ratios[:, None] * F.one_hot(first, num_classes) + (1 - ratios)[:, None] * F.one_hot(second, num_classes)
    labels = (1 - smoothing) * labels + smoothing / num_classes
    expected = -(labels * logits.log_softmax(1)).sum(1)
    nothing = torch.empty(0)
    batch = Batch(nothing, first, nothing, (), second, ratios)
    torch.testing.assert_close(smoothed_cross_entropy(logits, batch, smoothing), expected.mean(), rtol=1e-14, atol=0)
    plain = Batch(nothing, first, nothing, ())
    alone = smoothed_cross_entropy(logits, batch._replace(ratios=torch.ones(6).double()), smoothing)
    torch.testing.assert_close(smoothed_cross_entropy(logits, plain, smoothing), alone, rtol=1e-14, atol=0)


def test_a_run_with_everything_on(photos: Path, tmp_path: Path) -> None:
    run = mnist5k(str(photos))
    options = dict(
        mixup=0.2, cutmix=1.0, mix_pairs="batch", randaugment_layers=4, randaugment_magnitude=10.0, crop_style="paper"
    )
    run = replace(run, data=replace(run.data, **options), optim=replace(run.optim, batch_size=8))
    save_config(run, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == run
    with pytest.raises(InputError, match=r"--mix-pairs batch .* --batch-size is at least 2"):
        replace(run, optim=replace(run.optim, batch_size=1)).check()
    task = build(run).task
    batch = next(task.batches(range(1), Shard()))
    assert batch.mix_targets is not None
    assert torch.equal(batch.mix_targets, batch.targets.roll(-1))
    assert batch.images.dtype == torch.uint8
    assert batch.mix_targets is not None
    assert batch.ratios is not None
    assert batch.ratios.shape == batch.mix_targets.shape == batch.targets.shape == (8,)
    loss = task.loss(task.model, batch)["loss"]
    loss.backward()
    assert 0.5 < loss.item() < 5
    parts = task.split(batch, 3)
    assert [weight for _, weight in parts] == [3 / 8, 3 / 8, 2 / 8]
    for field in ("images", "targets", "indices", "mix_targets", "ratios"):
        assert torch.equal(torch.cat([getattr(part, field) for part, _ in parts]), getattr(batch, field))
    assert all(math.isfinite(task.loss(task.model, part)["loss"].item()) for part, _ in parts)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"mixup": -0.2}, "--mixup -0.2: at least 0; 0 switches it off, the paper's is 0.2"),
        ({"cutmix": -1.0}, "--cutmix -1.0: at least 0; 0 switches it off, the paper's is 1"),
        ({"mix_pairs": "batch"}, "--mix-pairs batch has no effect without --mixup or --cutmix"),
        ({"randaugment_layers": -1}, "--randaugment-layers -1: at least 0; 0 switches it off"),
        ({"randaugment_magnitude": 40.0}, "--randaugment-magnitude 40.0: 0 to 30"),
    ],
)
def test_wrong_options_in_one_line(wrong: dict, line: str) -> None:
    run = mnist5k("DATA")
    with pytest.raises(InputError) as caught:
        replace(run, data=replace(run.data, **wrong)).check()
    assert str(caught.value) == line
