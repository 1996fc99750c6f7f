"""Detection: recipes for COCO, and the choice of what `normfree detect train DATA` is not given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from normfree.config import DetectionData, DetectionRun, DetectorConfig, OptimConfig, spell, with_options
from normfree.errors import InputError
from normfree.recipes.small import Given, Reason

MINUTES = 30  # length of a run on a CPU
LEAST_EPOCHS, MOST_EPOCHS = 3, 200
MAX_LR = 0.3  # for batches of more than 6
UNCLIPPED_LR = 0.02 / 16  # an image, torchvision's; our own diverges without clipping (experiments/detection)
SEEN = 20_000  # images of a run, where there is time
EVALUATIONS = 8
BACKBONES = (*(f"nfnet_f{size}" for size in range(5)), "nf_resnet50", "bn_resnet50")


def one_x(backbone: str, path: str) -> DetectionRun:
    """Mask R-CNN on COCO 2017 for about 90,000 steps of 16 images, the field's 1x schedule.

    Source: the paper's ICML version, of which we could not obtain the numbers; detectron2's 1x schedule for batch,
    length, pixels and learning rate, with a cosine in place of the steps, and AGC's λ for 16 images by the rule of
    `recipes.imagenet`. BN backbones train without AGC and need many images on a device: that is the point.
    Command: `normfree detect train COCO --recipe coco_nfnet_f0 --init F0_haiku.npz`.
    Cost: 12.3 epochs of 118,287 images at 800 px.
    Expected: with ResNet-50 and frozen BN, box AP 38.6 and mask AP 35.2 (published by detectron2); not reproduced.
    """
    norm = backbone.startswith("bn_")
    return DetectionRun(
        DetectionData(path, px=800, max_px=1333),
        DetectorConfig(backbone),
        OptimConfig(
            epochs=12.3,
            batch_size=16,
            lr=0.02,
            warmup_epochs=0.14,
            weight_decay=1e-4 if norm else 2e-5,
            clip="none" if norm else "agc",
            clipping=None if norm else 0.08,
        ),
        precision="bfloat16",
    )


def small(path: str) -> DetectionRun:
    """A light detector for small data sets, in minutes on a CPU.

    Source: our measurements on penn-fudan, docs/detection.md.
    Command: `normfree detect train DATA --recipe detect_small`, or without a recipe, which adapts it to the data.
    Cost: 102 images at 320 px, 100 epochs: about 30 minutes on two cores.
    Expected: what docs/detection.md shows.
    """
    return DetectionRun(
        DetectionData(path, px=320, max_px=640, scale=(0.8, 1.25)),
        DetectorConfig("nfnet_micro", stochastic_depth=0.0, channels=64, anchor_px=16, rois=128),
        OptimConfig(epochs=100, batch_size=2, lr=0.1, warmup_epochs=2.0, clipping=0.04),
    )


DETECTION_RECIPES: dict[str, Callable[[str], DetectionRun]] = {
    "detect_small": small,
    **{f"coco_{name}": partial(one_x, name) for name in BACKBONES},
}


@dataclass(frozen=True)
class Scenes:
    """What the choice needs to know of a data set.

    `short_px`: median short side of the images; `small_px`: the side, as the root of the area, that nine of ten objects
    exceed, in pixels of the images; `masks`: whether all objects have one.
    """

    num_train: int
    num_classes: int
    num_objects: int
    short_px: int
    small_px: float
    masks: bool


@dataclass(frozen=True)
class Place:
    """Where a run is to be made: device ("cpu", "cuda" or "mps"), and a function that measures images/s of a run."""

    device: str
    images_per_s: Callable[[DetectionRun], float] | None = None


def choose_detection(
    given: Given, scenes: Scenes, place: Place, implied: Given, base: DetectionRun | None = None
) -> tuple[DetectionRun, tuple[Reason, ...]]:
    """The given options, and all others as they suit these, the images and the machine; with the reasons.

    Args:
        given: options of the run by name, its path among them.
        implied: options that the weights of --init imply.
        base: a recipe; None: the rules for data and machine.

    Raises:
        InputError: two given options contradict each other.
    """
    for pair in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        if all(given.get(name) is not None for name in pair):
            raise InputError(f"{' and '.join(spell(name, given[name]) for name in pair)}: give one of them")
    for name in implied.keys() & given.keys():
        if implied[name] != given[name]:
            raise InputError(f"{spell(name, given[name])}: the weights of --init are for {spell(name, implied[name])}")
    if given.get("masks") and not scenes.masks:
        raise InputError("--masks needs a mask for each training object, and some have boxes alone")
    fixed = dict(implied) | dict(given)
    run = start = base or small(str(given["path"]))
    reasons: list[Reason] = []

    def take(text: str | None, **options: Any) -> None:
        """Sets options that are neither given nor implied."""
        nonlocal run
        options = {name: value for name, value in options.items() if name not in fixed}
        run = with_options(run, options)
        if options and text:
            reasons.append(Reason(tuple(options), text))

    run = with_options(run, fixed)
    if brought := {name: value for name, value in implied.items() if name not in given}:
        text = " ".join(spell(name, value) for name, value in brought.items())
        reasons.append(Reason(tuple(brought), f"{text}: what the weights of --init are for"))
    if not scenes.masks:
        take("boxes alone, without a mask head: not every object has a mask", masks=False)
    if base is None:
        _network(run, scenes, place, take)
        _batch(scenes, place, take)
    px, max_px = (base.data.px, base.data.max_px) if base else _pixels(scenes, place)
    if "px" in fixed:
        px, max_px = fixed["px"], round(max_px * fixed["px"] / px)
    px = min(px, fixed.get("max_px", px))
    changed = base is None or (px, max_px) != (base.data.px, base.data.max_px)
    take(
        f"short side {px} px, long side up to {fixed.get('max_px', max_px)} px" if changed else None,
        px=px,
        max_px=max_px,
    )
    if base is None:  # the smallest anchors are half as long as what nine of ten objects exceed
        take(None, anchor_px=min(max(round(scenes.small_px * px / scenes.short_px / 8) * 4, 8), 32))
    _update(run, start, take)
    _rate(run, start, base is None, take)
    if run.optim.steps is None and "epochs" not in fixed and base is None:
        _length(run, scenes, place, take)
    o = run.optim
    epochs = o.epochs if o.steps is None else o.steps * o.batch_size / scenes.num_train
    if o.warmup_steps is None and o.warmup_epochs > epochs / 10:
        take(None, warmup_epochs=epochs / 10)
    take(None, eval_every=max(1.0, float(round(epochs / EVALUATIONS))))
    return run, tuple(reasons)


def _network(run: DetectionRun, scenes: Scenes, place: Place, take: Callable[..., None]) -> None:
    """Backbone, and heads that suit it."""
    gpu = place.device == "cuda"
    what = f"images with a short side of {scenes.short_px} px, on {place.device}"
    take(f"{'nfnet_f0' if gpu else 'nfnet_micro'}: {what}", backbone="nfnet_f0" if gpu else "nfnet_micro")
    if gpu:
        take(None, stochastic_depth=None, channels=256, rois=512, precision="bfloat16")


def _pixels(scenes: Scenes, place: Place) -> tuple[int, int]:
    """Short side and longest side."""
    px = max(32, min(scenes.short_px, 800 if place.device == "cuda" else 320))
    return px, 2 * px


def _batch(scenes: Scenes, place: Place, take: Callable[..., None]) -> None:
    """Batch."""
    size = 8 if place.device == "cuda" else small("").optim.batch_size
    take(None, batch_size=min(size, scenes.num_train))


def _update(run: DetectionRun, start: DetectionRun, take: Callable[..., None]) -> None:
    """λ, or the largest norm, for another kind of clipping; weight decay for AdamW."""
    clip = run.optim.clip
    if clip != start.optim.clip:
        clipping = {"agc": small("").optim.clipping, "norm": 1.0, "none": None}[clip]
        take(f"clipping {clipping:g} for {spell('clip', clip)}" if clipping else None, clipping=clipping)
    if run.optim.optimizer == "adamw" != start.optim.optimizer:
        take("weight decay 0.05 for --optimizer adamw", weight_decay=0.05)


def _rate(run: DetectionRun, start: DetectionRun, by_rule: bool, take: Callable[..., None]) -> None:
    """Learning rate for batch, optimizer and clipping; without `by_rule`, a recipe's in proportion to the batch."""
    o, size = run.optim, run.optim.batch_size
    lr = start.optim.lr * size / start.optim.batch_size
    why = f"batches of {size}"
    if o.optimizer == "adamw" != start.optim.optimizer:  # for 16 images 1e-4, as detectors of transformers are trained
        lr, why = 1e-4 * math.sqrt(size / 16), f"--optimizer adamw and {why}"
    elif by_rule:
        unclipped = o.clipping is None
        lr, why = (UNCLIPPED_LR * size, f"{why}, as nothing is clipped") if unclipped else (min(lr, MAX_LR), why)
    if lr != start.optim.lr:
        take(f"learning rate {lr:.3g} for {why}", lr=lr)


def _length(run: DetectionRun, scenes: Scenes, place: Place, take: Callable[..., None]) -> None:
    """Epochs: some twenty thousand images, as far as there is time on a CPU."""
    epochs = round(min(max(LEAST_EPOCHS, SEEN / scenes.num_train), MOST_EPOCHS))
    text = f"{epochs} epochs: {epochs * scenes.num_train / 1000:.3g} thousand images seen"
    if place.images_per_s is not None:
        speed = place.images_per_s(run)
        allowed = int(0.72 * 60 * MINUTES * speed / scenes.num_train)
        if allowed < epochs:
            epochs = max(LEAST_EPOCHS, allowed)
            text = f"{epochs} epochs: what {MINUTES} minutes allow at {speed:.2g} images/s"
            if epochs > allowed:
                text = f"{epochs} epochs, the least that is useful, at {speed:.2g} images/s"
    take(text, epochs=float(epochs))
