"""A run as a value: frozen dataclasses that say everything about it, their validation, and JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from normfree.errors import InputError, nearest, quoted

Four = tuple[int, int, int, int]
EvalCrop = Literal["center", "resize_crop", "crop_resize"]
AugmentStyle = Literal["pil", "paper"]
CropStyle = Literal["pil", "paper", "shift"]
MixPairs = Literal["stream", "batch"]
T = typing.TypeVar("T")
Chosen = Annotated[T, arg(help_behavior_hint="(default: chosen)")]
"""An option that `normfree train` chooses where it is not given; its default is for Python."""


MAX_PX, MAX_SEED, MAX_WORKERS = 4096, 2**32 - 1, 256


@dataclass(frozen=True)
class ModelConfig:
    """The network. What is None keeps the variant's own value."""

    model: Chosen[str] = "nfnet_nano"
    """Name of the network; `normfree models` lists them."""
    width: Four | None = None
    """Output channels of the four stages."""
    depth: Four | None = None
    """Blocks in each of the four stages."""
    drop_rate: Chosen[float | None] = None
    """Dropout before the classifier, 0 to 1."""
    stochastic_depth: Chosen[float | None] = None
    """Rate at which the deepest blocks are skipped in training, 0 to 1; None: 0.25; nf_resnet, nf_regnet: 0.1."""
    activation: str | None = None
    """gelu, relu, silu, ...; None: gelu for nfnet, relu for resnets, silu for nf_regnet."""
    second_conv: bool | None = None
    """Whether blocks have the second 3x3 convolution; None: they do."""
    skip_init: float | None = None
    """First value of the SkipInit gains, 0 to 1; None: 1 for nfnet_nano and nfnet_micro, else 0."""
    group_width: int | None = None
    """Channels in one group of the 3x3 convolutions."""
    in_channels: Chosen[int] = 3
    """3: images are read as RGB; 1: as grey."""
    init: str | None = None
    """Weight file or run folder to start from (fine-tuning); the classifier keeps the classes that it knows by name."""
    freeze: bool = False
    """Train the classifier only (linear probe)."""

    def overrides(self) -> dict[str, Any]:
        """What is given to the variant, by name."""
        others = ("model", "in_channels", "init", "freeze")
        return {name: value for name, value in vars(self).items() if name not in others and value is not None}


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    path: Annotated[str, Positional, arg(metavar="DATA")] = "mnist5k"
    """An image folder (CLASS/*.jpg, or train/CLASS and validation/CLASS), a CSV file of paths and labels, tar shards,
    Parquet, hf://datasets/OWNER/NAME, or a name such as `mnist5k` or `cifar10`; see docs/data.md."""
    validation_fraction: float = 0.1
    """About the share of each class to hold out where the data has no validation images of its own."""
    train_px: Chosen[int | None] = None
    """Side of the training images in pixels; None: the network's."""
    eval_px: Chosen[int | None] = None
    """Side of the evaluation images in pixels; None: the network's."""
    min_area: Chosen[float] = 0.08
    """Smallest share of a picture that a random training crop covers."""
    flip: Chosen[bool] = True
    """Mirror half of the training images; off where left and right differ, as in digits."""
    crop_style: Chosen[CropStyle] = "pil"
    """pil: training crops as torchvision draws them, resized with antialiasing; paper: as the released code; shift: the
    whole image, moved by up to 1/16 of its side, for small images."""
    mixup: Chosen[float] = 0.0
    """α of MixUp; 0: without; the paper's is 0.2. It takes half of the batch if CutMix takes the rest."""
    cutmix: Chosen[float] = 0.0
    """α of CutMix; 0: without; the paper's is 1."""
    mix_pairs: MixPairs = "stream"
    """What is mixed. stream: two images are read for each, as in the released code; batch: an image and the next one of
    its batch, so that each is read once."""
    randaugment_layers: Chosen[int] = 0
    """RandAugment operations on each training image; 0: without; the paper's is 4."""
    randaugment_magnitude: float = 5.0
    """Their strength, 0 to 30; the paper's is 5 for F0, 10 for F1 and F2, 15 from F3 on."""
    randaugment_style: AugmentStyle = "paper"
    """paper: the released code's arithmetic, made for about 224 px and up; pil: for one's own images of any size."""
    eval_crop: EvalCrop = "center"
    """center: keep the aspect, resize with antialiasing, crop. The others are the authors' crops."""
    crop_fraction: float = 1.0
    """Share of the short side that the center crop keeps."""
    max_unreadable: float = 0.05
    """Stop when more than this share of the training images cannot be read."""


@dataclass(frozen=True)
class OptimConfig:
    """Nesterov SGD with adaptive gradient clipping, warm-up and cosine decay (paper, appendix A.1)."""

    epochs: Chosen[float] = 20
    """Passes over the training images; with MixUp or CutMix two passes each, since every image is made of two, but for
    `--mix-pairs batch`."""
    steps: int | None = None
    """Length of the run in steps, where that is not for the number of images to decide; None: as `epochs` says."""
    batch_size: Chosen[int] = 64
    """Images in one step."""
    micro_batch: Chosen[int | None] = None
    """Images that go through the network at once, their gradients added up; smaller where memory ends; None: all."""
    lr: Chosen[float] = 0.1
    """Peak learning rate; the paper's is 0.1 * batch / 256."""
    warmup_epochs: Chosen[float] = 1.0
    """Epochs over which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """The same in steps; None: as `warmup_epochs` says."""
    final_lr: float = 0.0
    """Where the cosine ends."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: Chosen[float] = 2e-5
    """Added to the gradient; not on gains, biases and SkipInit gains."""
    clipping: Chosen[float | None] = 0.01
    """AGC's λ; larger for small batches; None clips nothing."""
    clip_eps: float = 1e-3
    """AGC's ε, the smallest weight norm that counts."""
    sam_rho: float = 0.0
    """Sharpness-aware minimization: how far the weights climb before the gradient is taken; 0: without; 0.05."""
    sam_fraction: float = 0.2
    """Share of the batch that decides where uphill is."""
    label_smoothing: float = 0.1
    """Share of the label that is spread over all classes."""
    balance: Chosen[float] = 0.0
    """0: classes count by their images; 1: all alike, however few images they have (logit adjustment); or between."""
    ema_decay: float = 0.99999
    """Moving average of the weights, with warm-up; the average is what is evaluated and kept."""


@dataclass(frozen=True)
class MachineConfig:
    """How the run is carried out; nothing here changes its numbers on the same device, so --resume may change it."""

    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is there."""
    workers: int | None = None
    """Processes that read images; None: one less than the cores, at most 8, and none for what fits into memory."""
    eval_every: Chosen[float] = 1.0
    """Epochs between evaluations on the validation images."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; one is also written at every evaluation and when the run is interrupted."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    wandb: Annotated[str | None, arg(metavar="PROJECT")] = None
    """Weights & Biases project for the numbers of log.jsonl, after `pip install wandb`; None: without."""


@dataclass(frozen=True)
class RunConfig:
    """Everything about a training run. The same value gives the same run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    seed: int = 0
    """Order, augmentation, initialisation, dropout: all follow from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: convolutions and activations in bfloat16, weights and their update in float32."""


def validate(run: RunConfig) -> None:
    """Raises InputError for the first value that is out of its range."""
    m, d, o, c = run.model, run.data, run.optim, run.machine
    for good, message in (
        (o.epochs > 0, f"epochs {o.epochs}: more than 0"),
        (o.batch_size >= 1, f"batch-size {o.batch_size}: at least 1"),
        (o.steps is None or o.steps >= 1, f"steps {o.steps}: at least 1, or None"),
        (o.warmup_steps is None or o.warmup_steps >= 0, f"warmup-steps {o.warmup_steps}: at least 0, or None"),
        (0 <= o.final_lr <= o.lr, f"final-lr {o.final_lr}: 0 to the learning rate {o.lr}"),
        (o.micro_batch is None or o.micro_batch >= 1, f"micro-batch {o.micro_batch}: at least 1, or None"),
        (o.lr >= 0, f"lr {o.lr}: at least 0"),
        (
            0 <= o.warmup_epochs < o.epochs or o.steps is not None,
            f"warmup-epochs {o.warmup_epochs}: at least 0 and less than epochs {o.epochs}",
        ),
        (0 <= o.balance <= 1, f"balance {o.balance}: between 0 and 1"),
        (0 < o.momentum < 1, f"momentum {o.momentum}: between 0 and 1"),
        (o.weight_decay >= 0, f"weight-decay {o.weight_decay}: at least 0"),
        (o.clipping is None or o.clipping > 0, f"clipping {o.clipping}: more than 0, or None"),
        (o.clip_eps > 0, f"clip-eps {o.clip_eps}: more than 0"),
        (o.sam_rho >= 0, f"sam-rho {o.sam_rho}: at least 0; 0 is without"),
        (0 < o.sam_fraction <= 1, f"sam-fraction {o.sam_fraction}: more than 0, at most 1"),
        (0 <= o.label_smoothing < 1, f"label-smoothing {o.label_smoothing}: from 0 to less than 1"),
        (0 <= o.ema_decay < 1, f"ema-decay {o.ema_decay}: from 0 to less than 1"),
        (0 < d.validation_fraction < 1, f"validation-fraction {d.validation_fraction}: between 0 and 1"),
        (all(px is None or 8 <= px <= 4096 for px in (d.train_px, d.eval_px)), "train-px and eval-px: 8 to 4096"),
        (0 < d.min_area <= 1, f"min-area {d.min_area}: more than 0, at most 1"),
        (
            d.crop_style != "shift" or d.min_area == DataConfig.min_area,
            f"min-area {d.min_area}: void with --crop-style shift; add --crop-style pil",
        ),
        (d.mixup >= 0, f"mixup {d.mixup}: at least 0; 0 is without, the paper's is 0.2"),
        (d.cutmix >= 0, f"cutmix {d.cutmix}: at least 0; 0 is without, the paper's is 1"),
        (
            d.mix_pairs == "stream" or d.mixup > 0 or d.cutmix > 0,
            f"mix-pairs {d.mix_pairs}: void without --mixup or --cutmix",
        ),
        (
            d.mix_pairs == "stream" or o.batch_size >= 2,
            f"mix-pairs {d.mix_pairs}: an image is mixed with another of its batch, so that --batch-size is at least 2",
        ),
        (d.randaugment_layers >= 0, f"randaugment-layers {d.randaugment_layers}: at least 0; 0 is without"),
        (0 <= d.randaugment_magnitude <= 30, f"randaugment-magnitude {d.randaugment_magnitude}: 0 to 30"),
        (0 < d.crop_fraction <= 1, f"crop-fraction {d.crop_fraction}: more than 0, at most 1"),
        (0 <= d.max_unreadable <= 1, f"max-unreadable {d.max_unreadable}: 0 to 1"),
        (m.in_channels in (1, 3), f"in-channels {m.in_channels}: 1 (grey) or 3 (RGB)"),
        (c.workers is None or 0 <= c.workers <= 256, f"workers {c.workers}: 0 to 256"),
        (c.eval_every > 0, f"eval-every {c.eval_every}: more than 0"),
        (c.checkpoint_minutes >= 0, f"checkpoint-minutes {c.checkpoint_minutes}: at least 0"),
        (c.keep_checkpoints >= 1, f"keep-checkpoints {c.keep_checkpoints}: at least 1"),
        (c.log_every >= 1, f"log-every {c.log_every}: at least 1"),
        (0 <= run.seed < 2**32, f"seed {run.seed}: 0 to 2^32 - 1"),
    ):
        if not good:
            raise InputError(f"--{message}")


def options_of(config: Any) -> dict[str, Any]:
    """Every option of a run by its name, which no two parts share."""
    options: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        options |= options_of(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return options


Config = typing.TypeVar("Config")


def with_options(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with the options of these names set, in whichever of its parts they are."""
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            changed[f.name] = with_options(value, values)
        elif f.name in values:
            changed[f.name] = values[f.name]
    return dataclasses.replace(typing.cast(Any, config), **changed)


def spell(name: str, value: Any) -> str:
    """An option as it is given on the command line: `--train-px 64`."""
    flag = name.replace("_", "-")
    if isinstance(options_of(RunConfig())[name], bool):
        return f"--{'' if value else 'no-'}{flag}"
    words = value if isinstance(value, tuple) else (value,)
    return " ".join((f"--{flag}", *(f"{w:.12g}" if isinstance(w, float) else quoted(str(w)) for w in words)))


def save_config(run: RunConfig, path: str | os.PathLike) -> None:
    Path(path).write_text(json.dumps(asdict(run), indent=2) + "\n")


def load_config(path: str | os.PathLike) -> RunConfig:
    """Inverse of `save_config`; InputError for a damaged file or an unknown field."""
    try:
        return _from_json(RunConfig, json.loads(Path(path).read_text()))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no configuration of a run ({error})") from None


def _from_json(cls: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}{nearest(min(unknown), hints)}")
    return cls(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _from_json(typing.cast(type, hint), value)
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        if value is None and types.NoneType in options:
            return None
        return _value(next(option for option in options if option is not types.NoneType), value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(args):
            raise ValueError(f"{value!r} where {len(args)} numbers are needed")
        return tuple(_value(kind, item) for kind, item in zip(args, value, strict=True))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{value!r} is none of {', '.join(args)}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{value!r} where {hint.__name__} is needed")
    return value
