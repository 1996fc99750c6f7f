"""What `normfree train DATA` uses where nothing is said: chosen by what is said, by the images and by the machine.

The rules come from measurements on two CPU cores, which docs/recipes.md keeps with the choices that lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from normfree.config import DataConfig, InputError, ModelConfig, OptimConfig, RunConfig, options_of, spell, with_options

MINUTES = (30, 10)  # that runs on images in colour, and on grey ones, are to take on a CPU
LEAST_EPOCHS = 3
UNEVEN = 10  # largest class over smallest from which on classes are balanced
MOST_EVALUATIONS = 30
OURS = ("nfnet_nano", "nfnet_micro")  # whose rates were measured here; all other networks follow the paper
# what makes a step of the network slower or faster: with these, a run on a CPU is as long as its time allows
COSTLY = frozenset(
    ("model", "init", "width", "depth", "group_width", "second_conv", "train_px", "eval_px", "sam_rho", "precision")
)
_VOID = {  # option -> the one without which it does nothing
    "randaugment_magnitude": "randaugment_layers",
    "randaugment_style": "randaugment_layers",
    "sam_fraction": "sam_rho",
    "clip_eps": "clipping",
}
_SYMBOLS = frozenset("0123456789abcdefghijklmnopqrstuvwxyz") | {"left", "right"}

Given = Mapping[str, Any]
"""Options that the user gave, by name; what `config.options_of` has is the rest."""


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
    num_validation: int = 0

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
    """Device ("cpu", "cuda" or "mps") and the GiB of memory that it has, and where measured, how the run fares on it.

    `images_per_s`: of how many images the gradients are computed in a second; `image_mib`: what one image in training
    takes of the memory.
    """

    device: str
    memory_gib: float
    images_per_s: float | None = None
    image_mib: float | None = None


@dataclass(frozen=True)
class Asked:
    """The network that --model or --init names, and its own pixels; `in_channels` of its weights, None without."""

    name: str
    train_px: int
    eval_px: int
    in_channels: int | None = None


@dataclass(frozen=True)
class Reason:
    """Why the options of these names, none of which the user gave, are what they are."""

    options: tuple[str, ...]
    text: str


def choose(
    given: Given, images: Images, machine: Machine, asked: Asked | None = None, base: RunConfig | None = None
) -> tuple[RunConfig, tuple[Reason, ...]]:
    """The run: what is given, and for all else what goes with it, with the images and the machine; and why.

    Args:
        given: options of the run by name, its path among them.
        asked: the network, where it is given; None: it is chosen.
        base: a recipe, whose values are taken as far as they go with what is given; None: the rules for the images.

    Raises:
        InputError: two given options contradict each other, or one does nothing without another.
    """
    for pair in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        if given.keys() >= set(pair) and None not in (given[name] for name in pair):
            raise InputError(f"{' and '.join(spell(name, given[name]) for name in pair)}: give one of them")
    rule = base or _rule(images, machine, asked)
    choice = _Choice(given, with_options(rule, given))
    _choose_network(choice, rule, images, machine, asked, base)
    _choose_batch(choice, rule, machine, base)
    _choose_length(choice, rule, images, machine, base)
    _choose_data(choice, rule, images, base)
    _choose_evaluations(choice, images, base)
    options = options_of(choice.run)
    for name, needed in _VOID.items():
        if name in given and not options[needed]:
            raise InputError(f"{spell(name, given[name])} does nothing without --{needed.replace('_', '-')}")
    return choice.run, tuple(choice.reasons)


def worth_measuring(given: Given, images: Images, machine: Machine, base: RunConfig | None) -> tuple[bool, bool]:
    """Whether the speed of the chosen run, and the memory that it takes, matter for what is chosen."""
    usual = options_of(base or _rule(images, machine, None))
    unusual = {name for name, value in given.items() if value != usual[name]}
    costly = bool(COSTLY & unusual)
    speed = not given.keys() & {"epochs", "steps"} and (costly or (base is None and images.are_small))
    return speed, "micro_batch" not in given and (costly or "batch_size" in unusual)


def fast_enough(run: RunConfig, images: Images) -> float:
    """Images a second at which `MINUTES` allow all epochs; 28 % are for reading, evaluation and other programs."""
    return run.optim.epochs * images.num_train / (0.72 * 60 * MINUTES[images.grey])


@dataclass
class _Choice:
    given: Given
    run: RunConfig
    reasons: list[Reason] = field(default_factory=list)

    def set(self, **values: Any) -> None:
        """Sets those options that are not given."""
        self.run = with_options(self.run, {name: value for name, value in values.items() if name not in self.given})

    def say(self, parts: Mapping[str, str], because: Iterable[str] = ()) -> None:
        """A reason out of a text for each option, those left out that are given; `because`: what it depends on."""
        parts = {name: text for name, text in parts.items() if name not in self.given}
        causes = [spell(name, self.given[name]) for name in because if name in self.given]
        if parts:
            head = f"because {' '.join(causes)}: " if causes else ""
            self.reasons.append(Reason(tuple(parts), head + ", ".join(filter(None, parts.values()))))


# --- what suits images and machine ---


def _rule(images: Images, machine: Machine, asked: Asked | None) -> RunConfig:
    small = asked is not None and asked.name in OURS
    if images.are_small:
        run = _small_images(images)
    elif machine.device == "cuda" and images.num_train >= 50_000 and images.short_px >= 160 and not small:
        run = _large_photos(machine)
    else:
        run = _photos(images, machine)
    return with_options(
        run,
        {
            "in_channels": 1 if images.grey else 3,
            "flip": not images.are_symbols,
            "balance": 1.0 if images.unevenness >= UNEVEN else 0.0,
        },
    )


def _small_images(images: Images) -> RunConfig:
    """Up to 63 px: `nfnet_nano`, without dropout and stochastic depth, whose runs are too short to need them."""
    px = max(28, -(-images.short_px // 4) * 4)
    epochs = _between(10 if images.grey else 28, 300_000 / images.num_train, 60)
    return RunConfig(
        ModelConfig("nfnet_nano", drop_rate=0.0, stochastic_depth=0.0),
        DataConfig(train_px=px, eval_px=px, crop_style="shift"),
        replace(_optim(images, epochs), weight_decay=5e-4),
    )


def _photos(images: Images, machine: Machine) -> RunConfig:
    """From 64 px up: `nfnet_micro`, trained smaller than it is evaluated, as the paper does."""
    eval_px = min(images.short_px // 16 * 16, 160 if machine.device == "cuda" else 112)
    train_px = max(48, round(eval_px * 0.72 / 16) * 16)
    return RunConfig(
        ModelConfig("nfnet_micro"),
        DataConfig(train_px=train_px, eval_px=eval_px, min_area=0.25),
        _optim(images, _between(15, 100_000 / images.num_train, 120)),
    )


def _large_photos(machine: Machine) -> RunConfig:
    """The paper's F0 with a quarter of its epochs, for 50,000 photographs and more on a GPU. Not measured."""
    micro_batch = None if machine.memory_gib >= 30 else 64
    return RunConfig(
        ModelConfig("nfnet_f0"),
        DataConfig(train_px=192, eval_px=256, mixup=0.2, cutmix=1.0, randaugment_layers=4),
        OptimConfig(epochs=90, batch_size=256, micro_batch=micro_batch, lr=0.1, warmup_epochs=5, clipping=0.08),
    )


def _optim(images: Images, epochs: int) -> OptimConfig:
    """Batches that make at least some hundred steps an epoch; λ grows with them."""
    size = min(64 if images.num_train >= 20_000 else 32, max(2, images.num_train // 8))
    return OptimConfig(epochs=epochs, batch_size=size, lr=0.1, clipping=_clipping("nfnet_micro", size))


def _between(low: int, value: float, high: int) -> int:
    return round(min(max(value, low), high))


# --- what goes with what is given ---


def _choose_network(
    choice: _Choice, rule: RunConfig, images: Images, machine: Machine, asked: Asked | None, base: RunConfig | None
) -> None:
    """Network and pixels. One side given, the other keeps its ratio to it, but does not grow beyond the images'."""
    given, train_px, eval_px = choice.given, rule.data.train_px, rule.data.eval_px
    causes = ("model", "init", "train_px", "eval_px")
    if asked is not None and (asked.name != rule.model.model or asked.in_channels is not None):
        if asked.name != rule.model.model:
            choice.run = replace(choice.run, model=ModelConfig(asked.name, in_channels=rule.model.in_channels))
            choice.run = with_options(choice.run, given)
        train_px, eval_px = _own_pixels(asked, images)
        if asked.in_channels not in (None, rule.model.in_channels):
            choice.set(in_channels=asked.in_channels)
            choice.say({"in_channels": f"{asked.in_channels} channels: what the weights take"}, because=("init",))
    if train_px is None or eval_px is None:  # of a recipe, which leaves them to its network
        return
    ratio = eval_px / train_px
    if "train_px" in given and "eval_px" not in given and given["train_px"] is not None:
        train_px, most = given["train_px"], max(eval_px, images.short_px)
        eval_px = max(train_px, min(_rounded(train_px * ratio), most)) if ratio != 1 else train_px
    elif "eval_px" in given and "train_px" not in given and given["eval_px"] is not None:
        eval_px = given["eval_px"]
        train_px = min(eval_px, _rounded(eval_px / ratio)) if ratio != 1 else eval_px
    choice.set(train_px=train_px, eval_px=eval_px)
    name, colours = choice.run.model.model, "grey" if images.grey else "in colour"
    if not given.keys() & set(causes):
        if base is None:
            why = f"{images.num_train} images {colours}, short side {images.short_px} px, on {machine.device}"
            choice.say({"model": f"{name} at {train_px} px: {why}", "train_px": "", "eval_px": ""})
        return
    parts = {"model": name} if base is None and "model" not in given else {}
    parts |= {"train_px": f"{train_px} px in training", "eval_px": f"{eval_px} px in evaluation"}
    if asked is not None and not given.keys() & {"train_px", "eval_px"} and eval_px != asked.eval_px:
        parts["eval_px"] += f", as the images' short side is {images.short_px} px"
    choice.say(parts, because=causes)


def _own_pixels(asked: Asked, images: Images) -> tuple[int, int]:
    """Of weights, what they were trained at; else the network's, or the images' where these are smaller, from half."""
    if asked.in_channels is not None:
        return asked.train_px, asked.eval_px
    eval_px = min(asked.eval_px, max(images.short_px // 16 * 16, asked.eval_px // 2))
    return (_rounded(eval_px * asked.train_px / asked.eval_px) if eval_px < asked.eval_px else asked.train_px), eval_px


def _rounded(px: float) -> int:
    return max(16, round(px / 16) * 16)


def _choose_batch(choice: _Choice, rule: RunConfig, machine: Machine, base: RunConfig | None) -> None:
    """Rate and λ go with the size of the batch: by the rules for our networks, by the paper for all others."""
    name, o = choice.run.model.model, rule.optim
    size = choice.run.optim.batch_size
    lr, clipping, weight_decay = o.lr, o.clipping, o.weight_decay
    by_paper = name != rule.model.model and name not in OURS
    if by_paper:
        lr, clipping, weight_decay = 0.1 * size / 256, _clipping(name, size), OptimConfig.weight_decay
    elif size != o.batch_size:
        lr = _rate(o, size)
        clipping = _clipping(name, size) if base is None or name in OURS else clipping
    choice.set(lr=lr, clipping=clipping, weight_decay=weight_decay)
    parts = {
        "batch_size": f"batches of {size}",
        "lr": f"learning rate {lr:.3g}",
        "clipping": "nothing clipped" if clipping is None else f"λ {clipping:.3g}",
        "weight_decay": f"weight decay {weight_decay:g}",
    }
    shown = () if base is not None else ("batch_size", "lr", "clipping")
    before, now = options_of(o), options_of(choice.run.optim)
    parts = {option: text for option, text in parts.items() if option in shown or now[option] != before[option]}
    choice.say(parts, because=("batch_size", "model", "init") if by_paper else ("batch_size",))
    micro_batch = choice.run.optim.micro_batch
    if machine.image_mib is not None:  # the rest of the memory is for weights and what is needed for a moment
        fits = int(0.4 * 1024 * machine.memory_gib / machine.image_mib)
        micro_batch = 1 << max(fits.bit_length() - 1, 0) if fits < size else None
        if micro_batch is not None:
            text = f"{micro_batch} images at once, gradients added up: each takes {machine.image_mib:.0f} MiB"
            choice.say(
                {"micro_batch": f"{text} of {machine.memory_gib:.0f} GiB"}, because=("model", "init", "batch_size")
            )
    choice.set(micro_batch=micro_batch)


def _rate(optim: OptimConfig, size: int) -> float:
    """In proportion to the batch; upwards to 0.3 at most, where small networks begin to diverge, or to the paper's."""
    lr = optim.lr * size / optim.batch_size
    return min(lr, max(optim.lr, min(0.1 * size / 32, 0.3), 0.1 * size / 256)) if size > optim.batch_size else lr


def _clipping(name: str, size: int) -> float | None:
    """λ of a network at a batch size. Of the paper's it halves as the batch doubles, as in recipes/imagenet.py."""
    if name in OURS:
        return 0.1 if size >= 64 else 0.04
    return None if name.startswith(("bn_", "nf_regnet")) else max(0.01, 0.08 * min(1, 256 / size))


def _choose_length(choice: _Choice, rule: RunConfig, images: Images, machine: Machine, base: RunConfig | None) -> None:
    """Epochs that a CPU has time for, and a warm-up that fits into what is given."""
    given, o, minutes = choice.given, rule.optim, MINUTES[images.grey]
    if given.get("epochs") is not None:
        choice.set(steps=None)  # of a recipe
    elif given.get("steps") is None:
        epochs, speed = o.epochs, machine.images_per_s
        text = f"{epochs:g} epochs: {round(epochs * images.num_train / 1000)} thousand images seen"
        if rule.model.model not in OURS:
            text = f"{epochs:g} epochs, a quarter of the paper's 360"
        if speed is not None:
            shown = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
            allowed = int(0.72 * 60 * minutes * speed / images.num_train)
            least = max(LEAST_EPOCHS, math.ceil(2 * given.get("warmup_epochs", 0)))
            if allowed < epochs:
                epochs = min(epochs, max(least, allowed))
                text = (
                    f"{epochs} epochs: what {minutes} minutes allow at {shown} images/s; more, with --epochs, is better"
                )
            if allowed < least:
                hours = epochs * images.num_train / speed / 3600 / 0.72
                takes = f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.0f} minutes"
                text = (
                    f"{epochs} epochs, the fewest, take about {takes} at {shown} images/s: a smaller --model or "
                    "--train-px takes less, and --steps fewer"
                )
            choice.set(epochs=epochs)
        if base is None or speed is not None:
            choice.say({"epochs": text})
    if "warmup_epochs" in given:
        choice.set(warmup_steps=None)  # of a recipe
    elif given.get("warmup_steps") is None:
        size = choice.run.optim.batch_size
        before, now = _epochs(o, images), _epochs(choice.run.optim, images)
        if o.warmup_steps is None:
            name, unit, warmup = "warmup_epochs", "epochs", _shrunk(o.warmup_epochs, before, now)
        else:
            steps = images.num_train * before / o.batch_size, images.num_train * now / size
            name, unit, warmup = "warmup_steps", "steps", round(_shrunk(o.warmup_steps, *steps))
        choice.set(**{name: warmup})
        if warmup != getattr(o, name) and given.keys() & {"epochs", "steps"}:
            choice.say({name: f"warm-up of {warmup:.3g} {unit}"}, because=("epochs", "steps"))


def _epochs(optim: OptimConfig, images: Images) -> float:
    return optim.epochs if optim.steps is None else optim.steps * optim.batch_size / images.num_train


def _shrunk(warmup: float, before: float, now: float) -> float:
    """A warm-up out of a run of length `before` for one of length `now`: in proportion, but up to a tenth is kept."""
    warmup = min(warmup, max(now / 10, warmup * now / before))
    return warmup if warmup < now else now / 10


def _choose_data(choice: _Choice, rule: RunConfig, images: Images, base: RunConfig | None) -> None:
    given, style = choice.given, choice.run.data.crop_style
    if rule.data.crop_style == "shift" and style != "shift":
        choice.set(min_area=0.6)
        choice.say({"min_area": "crops of 60 % of the area and more: small images"}, because=("crop_style",))
    elif rule.data.crop_style == "shift" and "min_area" in given and "crop_style" not in given:
        choice.set(crop_style="pil")
        choice.say({"crop_style": "crops in place of shifts"}, because=("min_area",))
    elif style == "shift":
        choice.set(min_area=DataConfig.min_area)  # which shifts do not use
    if base is not None:
        return
    if images.are_symbols:
        choice.say({"flip": "nothing mirrored: the classes are called like digits, letters or sides"})
    if images.unevenness >= UNEVEN:
        text = f"classes count alike: the largest has {images.unevenness:.0f} times the images of the smallest"
        choice.say({"balance": text})


def _choose_evaluations(choice: _Choice, images: Images, base: RunConfig | None) -> None:
    """Whole epochs between evaluations, so that these and their checkpoints take less than a tenth of the time.

    An evaluation passes all validation images forward twice, a third of the work of training on them, for each pixel;
    its checkpoint takes as long as about 100 images.
    """
    data, epochs = choice.run.data, _epochs(choice.run.optim, images)
    scale = (data.eval_px / data.train_px) ** 2 if data.eval_px and data.train_px else 1.0
    affordable = 0.1 * epochs * images.num_train / (2 / 3 * images.num_validation * scale + 100)
    count = min(affordable, MOST_EVALUATIONS) if base is None else affordable
    every = float(max(1, math.ceil(epochs / max(count, 1))))
    choice.set(eval_every=every)
    if every > 1:
        choice.say({"eval_every": f"evaluated every {every:g} epochs: that takes less than a tenth of the time"})


def mnist5k(path: str = "mnist5k") -> RunConfig:
    """4,000 digits of 28 px, `nfnet_nano`: 98.4 % of the 1,000 held-out ones in 0:44 on two cores of an AMD EPYC."""
    return RunConfig(
        ModelConfig("nfnet_nano"),
        DataConfig(path, train_px=28, eval_px=28, min_area=0.8, flip=False),
        OptimConfig(epochs=8, batch_size=32, lr=0.05, clipping=0.04),
    )
