"""What `normfree train DATA` uses when nothing is said: a run chosen by the images and by the machine.

The rules come from measurements on two CPU cores, which docs/recipes.md keeps with the choices that lost.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from normfree.config import DataConfig, ModelConfig, OptimConfig, RunConfig

MINUTES = (30, 10)  # that small images in colour, and grey ones, are to take on a CPU
LEAST_EPOCHS = 3
UNEVEN = 10  # largest class over smallest from which on classes are balanced
_SYMBOLS = frozenset("0123456789abcdefghijklmnopqrstuvwxyz") | {"left", "right"}


@dataclass(frozen=True)
class Images:
    """What the choice depends on of a data set. `short_px`: median short side; `grey`: none of them has colours.

    `unevenness`: images of the largest class over those of the smallest.
    """

    num_train: int
    class_names: tuple[str, ...]
    short_px: int
    grey: bool
    unevenness: float = 1.0

    @property
    def are_small(self) -> bool:
        return self.short_px < 64

    @property
    def are_symbols(self) -> bool:
        """Whether a mirrored image may be of another class, or of none: digits, letters, left and right."""
        first = [name.lower().split(" ")[0] for name in self.class_names]  # torchvision has "3 - three"
        return all(name in _SYMBOLS for name in first) or {"left", "right"} <= set(first)


@dataclass(frozen=True)
class Machine:
    """Device ("cpu", "cuda" or "mps") and the GiB of memory that it has."""

    device: str
    memory_gib: float


@dataclass(frozen=True)
class Reason:
    """Why the options of these names are what they are."""

    options: tuple[str, ...]
    text: str


def choose(path: str, images: Images, machine: Machine) -> tuple[RunConfig, tuple[Reason, ...]]:
    """The run for these images on this machine, and why it is so."""
    large = not images.are_small and machine.device == "cuda" and images.num_train >= 50_000 and images.short_px >= 160
    choice = (
        _large_photos(machine) if large else _small_images(images) if images.are_small else _photos(images, machine)
    )
    model, data, optim, reasons = choice
    colours = "grey" if images.grey else "in colour"
    why = f"{images.num_train} images {colours}, short side {images.short_px} px, on {machine.device}"
    reasons = (Reason(("model", "train_px", "eval_px"), f"{model.model} at {data.train_px} px: {why}"), *reasons)
    model = replace(model, in_channels=1 if images.grey else 3)
    data = replace(data, path=path)
    if images.are_symbols:
        data = replace(data, flip=False)
        reasons += (Reason(("flip",), "nothing mirrored: the classes are called like digits, letters or sides"),)
    if images.unevenness >= UNEVEN:
        optim = replace(optim, balance=1.0)
        text = f"classes count alike: the largest has {images.unevenness:.0f} times the images of the smallest"
        reasons += (Reason(("balance",), text),)
    return RunConfig(model, data, optim), reasons


def shorten(
    run: RunConfig, reasons: tuple[Reason, ...], images: Images, images_per_s: float
) -> tuple[RunConfig, tuple[Reason, ...]]:
    """The run with as many epochs as `MINUTES` allow where gradients of so many images a second are computed."""
    minutes = MINUTES[images.grey]
    epochs = max(LEAST_EPOCHS, int(run.optim.epochs * images_per_s / fast_enough(run, images)))
    if epochs >= run.optim.epochs:
        return run, reasons
    text = (
        f"{epochs} epochs: what {minutes} minutes allow at {images_per_s:.0f} images/s; more, with --epochs, is better"
    )
    others = tuple(reason for reason in reasons if reason.options != ("epochs",))
    optim = replace(run.optim, epochs=epochs, warmup_epochs=min(run.optim.warmup_epochs, epochs / 10))
    return replace(run, optim=optim), (*others, Reason(("epochs",), text))


def fast_enough(run: RunConfig, images: Images) -> float:
    """Images a second at which `MINUTES` allow all epochs; 28 % are for reading, evaluation and other programs."""
    return run.optim.epochs * images.num_train / (0.72 * 60 * MINUTES[images.grey])


Choice = tuple[ModelConfig, DataConfig, OptimConfig, tuple[Reason, ...]]


def _small_images(images: Images) -> Choice:
    """Up to 63 px: `nfnet_nano`, without dropout and stochastic depth, whose runs are too short to need them."""
    px = max(28, -(-images.short_px // 4) * 4)
    epochs = _between(10 if images.grey else 28, 300_000 / images.num_train, 60)
    optim, reasons = _optim(images, epochs, weight_decay=5e-4)
    return (
        ModelConfig("nfnet_nano", drop_rate=0.0, stochastic_depth=0.0),
        DataConfig(train_px=px, eval_px=px, crop_style="shift"),
        optim,
        reasons,
    )


def _photos(images: Images, machine: Machine) -> Choice:
    """From 64 px up: `nfnet_micro`, trained smaller than it is evaluated, as the paper does."""
    eval_px = min(images.short_px // 16 * 16, 160 if machine.device == "cuda" else 112)
    train_px = max(48, round(eval_px * 0.72 / 16) * 16)
    optim, reasons = _optim(images, _between(15, 100_000 / images.num_train, 120))
    return ModelConfig("nfnet_micro"), DataConfig(train_px=train_px, eval_px=eval_px, min_area=0.25), optim, reasons


def _large_photos(machine: Machine) -> Choice:
    """The paper's F0 with a quarter of its epochs, for 50,000 photographs and more on a GPU. Not measured."""
    micro_batch = None if machine.memory_gib >= 30 else 64
    optim = OptimConfig(epochs=90, batch_size=256, micro_batch=micro_batch, lr=0.1, warmup_epochs=5, clipping=0.08)
    data = DataConfig(train_px=192, eval_px=256, mixup=0.2, cutmix=1.0, randaugment_layers=4)
    return ModelConfig("nfnet_f0"), data, optim, (Reason(("epochs",), "90 epochs, a quarter of the paper's 360"),)


def _optim(images: Images, epochs: int, weight_decay: float = 2e-5) -> tuple[OptimConfig, tuple[Reason, ...]]:
    """Batches that make at least some hundred steps an epoch; λ grows with them."""
    size, lr, clipping = (64, 0.1, 0.1) if images.num_train >= 20_000 else (32, 0.1, 0.04)
    size = min(size, max(2, images.num_train // 8))
    optim = OptimConfig(epochs=epochs, batch_size=size, lr=lr, clipping=clipping, weight_decay=weight_decay)
    return optim, (
        Reason(("batch_size", "lr", "clipping"), f"batches of {size}, learning rate {lr:g}, λ {clipping:g}"),
        Reason(("epochs",), f"{epochs} epochs: {round(epochs * images.num_train / 1000)} thousand images seen"),
    )


def _between(low: int, value: float, high: int) -> int:
    return round(min(max(value, low), high))


def reasons_that_hold(chosen: RunConfig, run: RunConfig, reasons: tuple[Reason, ...]) -> list[str]:
    """The texts of those whose options `run` has as they were chosen."""
    before, now = _values(chosen), _values(run)
    return [reason.text for reason in reasons if all(before[name] == now[name] for name in reason.options)]


def _values(config: Any) -> dict[str, Any]:
    """Every option of a run by its name, which no two parts share."""
    values: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        values |= _values(value) if is_dataclass(value) else {field.name: value}
    return values


def mnist5k(path: str = "mnist5k") -> RunConfig:
    """4,000 digits of 28 px, `nfnet_nano`: 98.4 % of the 1,000 held-out ones in 0:44 on two cores of an AMD EPYC."""
    return RunConfig(
        ModelConfig("nfnet_nano"),
        DataConfig(path, train_px=28, eval_px=28, min_area=0.8, flip=False),
        OptimConfig(epochs=8, batch_size=32, lr=0.05, clipping=0.04),
    )
