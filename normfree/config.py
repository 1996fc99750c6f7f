"""The configuration of a run: frozen dataclasses with their checks, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from tyro.conf import Positional, arg

from normfree.errors import InputError, check_range, nearest, quoted
from normfree.files import replacing

Four = tuple[int, int, int, int]
EvalCrop = Literal["center", "resize_crop", "crop_resize"]
AugmentStyle = Literal["pil", "paper"]
CropStyle = Literal["pil", "paper", "shift"]
MixPairs = Literal["stream", "batch"]
OptimizerName = Literal["sgd", "adamw"]
Tune = Literal["all", "head", "gradual"]
Clip = Literal["agc", "norm", "none"]
Precision = Literal["float32", "bfloat16"]
OnNonfinite = Literal["stop", "skip"]
FORMAT = 2  # of config.json; format 1 named neither format nor task, which was classification
T = typing.TypeVar("T")
Chosen = Annotated[T, arg(help_behavior_hint="(default: chosen)")]
"""An option that `normfree train` chooses if it is not given; its default applies in Python."""


MAX_PX, MAX_SEED, MAX_WORKERS = 4096, 2**32 - 1, 256


@dataclass(frozen=True)
class ModelConfig:
    """The network. None keeps the variant's own value."""

    model: Chosen[str] = "nfnet_nano"
    """Name of the network; `normfree models` lists them."""
    width: Four | None = None
    """Output channels of the four stages."""
    depth: Four | None = None
    """Blocks in each of the four stages."""
    drop_rate: Chosen[float | None] = None
    """Dropout before the classifier, 0 to 1."""
    stochastic_depth: Chosen[float | None] = None
    """Rate at which the deepest block is skipped in training, 0 to 1; None: 0.25; nf_resnet, nf_regnet: 0.1."""
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
    """Weights to fine-tune: a file, a run folder, or an address such as hf://timm/eca_nfnet_l0.ra2_in1k (`normfree
    models` lists them). The classifier keeps classes with the same names."""
    freeze: bool = False
    """The same as `--tune head`."""

    def overrides(self) -> dict[str, Any]:
        """Options of the variant that are set, by name."""
        others = ("model", "in_channels", "init", "freeze")
        return {name: value for name, value in vars(self).items() if name not in others and value is not None}

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        _need(self.in_channels in (1, 3), f"in-channels {self.in_channels}: 1 (grey) or 3 (RGB)")


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    path: Annotated[str, Positional, arg(metavar="DATA")] = "mnist5k"
    """An image folder (CLASS/*.jpg, or train/CLASS and validation/CLASS), a CSV file of paths and labels, tar shards,
    Parquet, hf://datasets/OWNER/NAME, or a name such as `mnist5k` or `cifar10`; see docs/data.md."""
    validation_fraction: float = 0.1
    """Share of each class to hold out, approximately, if the data has no validation images."""
    train_px: Chosen[int | None] = None
    """Side of the training images in pixels; None: the network's."""
    eval_px: Chosen[int | None] = None
    """Side of the evaluation images in pixels; None: the network's."""
    min_area: Chosen[float] = 0.08
    """Smallest share of the image's area in a random training crop."""
    flip: Chosen[bool] = True
    """Mirror half of the training images; switch it off if left and right differ, as in digits."""
    crop_style: Chosen[CropStyle] = "pil"
    """pil: training crops as torchvision draws them, resized with antialiasing; paper: as the released code; shift: the
    whole image, moved by up to 1/16 of its side, for small images."""
    mixup: Chosen[float] = 0.0
    """α of MixUp; 0: off; the paper's is 0.2. With CutMix, each is applied to half of the batch."""
    cutmix: Chosen[float] = 0.0
    """α of CutMix; 0: off; the paper's is 1."""
    mix_pairs: MixPairs = "stream"
    """What is mixed. stream: two images are read for each, as in the released code; batch: an image and the next one of
    its batch, so that each is read once."""
    randaugment_layers: Chosen[int] = 0
    """RandAugment operations on each training image; 0: off; the paper's is 4."""
    randaugment_magnitude: float = 5.0
    """Their strength, 0 to 30; the paper's is 5 for F0, 10 for F1 and F2, 15 from F3 on."""
    randaugment_style: AugmentStyle = "paper"
    """paper: the released code's arithmetic, for about 224 px and more; pil: for images of any size."""
    eval_crop: Chosen[EvalCrop] = "center"
    """center: keep the aspect, resize with antialiasing, crop. The others are the authors' crops."""
    crop_fraction: Chosen[float] = 1.0
    """Share of the short side that the center crop keeps."""
    max_unreadable: float = 0.05
    """Stop if more than this share of the training images cannot be read."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        held_out = self.validation_fraction
        _need(0 < held_out < 1, f"validation-fraction {held_out}: between 0 and 1")
        check_range("train-px", self.train_px, 8, MAX_PX)
        check_range("eval-px", self.eval_px, 8, MAX_PX)
        _need(0 < self.min_area <= 1, f"min-area {self.min_area}: more than 0, at most 1")
        _need(
            self.crop_style != "shift" or self.min_area == DataConfig.min_area,
            f"min-area {self.min_area} has no effect with --crop-style shift; add --crop-style pil",
        )
        _need(self.mixup >= 0, f"mixup {self.mixup}: at least 0; 0 switches it off, the paper's is 0.2")
        _need(self.cutmix >= 0, f"cutmix {self.cutmix}: at least 0; 0 switches it off, the paper's is 1")
        _need(
            self.mix_pairs == "stream" or self.mixup > 0 or self.cutmix > 0,
            f"mix-pairs {self.mix_pairs} has no effect without --mixup or --cutmix",
        )
        layers = self.randaugment_layers
        _need(layers >= 0, f"randaugment-layers {layers}: at least 0; 0 switches it off")
        check_range("randaugment-magnitude", self.randaugment_magnitude, 0, 30)
        _need(0 < self.crop_fraction <= 1, f"crop-fraction {self.crop_fraction}: more than 0, at most 1")
        check_range("max-unreadable", self.max_unreadable, 0, 1)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, by default the paper's: Nesterov SGD with adaptive gradient clipping, warm-up and cosine decay."""

    epochs: Chosen[float] = 20
    """Passes over the training images."""
    steps: int | None = None
    """Length of the run in steps; None: `epochs`."""
    batch_size: Chosen[int] = 64
    """Images in one step."""
    micro_batch: Chosen[int | None] = None
    """Images that pass through the network at once; gradients are accumulated. Lower it to save memory; None: all."""
    lr: Chosen[float] = 0.1
    """Peak learning rate, after the warm-up."""
    warmup_epochs: Chosen[float] = 1.0
    """Epochs in which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """The same in steps; None: `warmup_epochs`."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    optimizer: OptimizerName = "sgd"
    """sgd: SGD with Nesterov momentum, the paper's; adamw."""
    momentum: float = 0.9
    """Nesterov momentum; of adamw, β1."""
    weight_decay: Chosen[float] = 2e-5
    """Added to the gradient, or with adamw to the step; not on gains, biases and SkipInit gains."""
    clip: Clip = "agc"
    """agc: the gradient of each unit is clipped by the norm of its weights; norm: all gradients by their norm; none:
    nothing is clipped."""
    clipping: Chosen[float | None] = 0.01
    """AGC's λ, larger for small batches; with `--clip norm` the largest norm; None clips nothing."""
    clip_eps: float = 1e-3
    """AGC's ε, a lower bound on the weight norm."""
    sam_rho: float = 0.0
    """ρ of sharpness-aware minimization, the radius of the ascent; 0: off; the paper's is 0.05."""
    sam_fraction: float = 0.2
    """Share of the batch that the ascent uses."""
    ema_decay: float = 0.99999
    """Decay of the moving average of the weights, with warm-up. The average is evaluated and saved."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        _need(self.epochs > 0, f"epochs {self.epochs}: more than 0")
        _need(self.batch_size >= 1, f"batch-size {self.batch_size}: at least 1")
        _need(self.steps is None or self.steps >= 1, f"steps {self.steps}: at least 1, or None")
        warmup = self.warmup_steps
        _need(warmup is None or warmup >= 0, f"warmup-steps {warmup}: at least 0, or None")
        _need(0 <= self.final_lr <= self.lr, f"final-lr {self.final_lr}: 0 to the learning rate {self.lr}")
        part = self.micro_batch
        _need(part is None or part >= 1, f"micro-batch {part}: at least 1, or None")
        _need(self.lr >= 0, f"lr {self.lr}: at least 0")
        _need(
            0 <= self.warmup_epochs < self.epochs or self.steps is not None,
            f"warmup-epochs {self.warmup_epochs}: at least 0 and less than epochs {self.epochs}",
        )
        _need(0 < self.momentum < 1, f"momentum {self.momentum}: between 0 and 1")
        _need(self.weight_decay >= 0, f"weight-decay {self.weight_decay}: at least 0")
        clipping = self.clipping
        _need(clipping is None or clipping > 0, f"clipping {clipping}: more than 0, or None")
        _need(clipping is None or self.clip != "none", f"clipping {clipping} has no effect with --clip none")
        _need(self.clip_eps > 0, f"clip-eps {self.clip_eps}: more than 0")
        _need(
            self.clip == "agc" or self.clip_eps == OptimConfig.clip_eps,
            f"clip-eps {self.clip_eps} has no effect with --clip {self.clip}",
        )
        _need(self.sam_rho >= 0, f"sam-rho {self.sam_rho}: at least 0; 0 switches it off")
        _need(0 < self.sam_fraction <= 1, f"sam-fraction {self.sam_fraction}: more than 0, at most 1")
        _need(0 <= self.ema_decay < 1, f"ema-decay {self.ema_decay}: from 0 to less than 1")


@dataclass(frozen=True)
class ClassifierOptim(OptimConfig):
    """The optimizer of a classifier, and its loss."""

    epochs: Chosen[float] = 20
    """Passes over the training images; with MixUp or CutMix two passes each, since every image is made of two, but for
    `--mix-pairs batch`."""
    lr: Chosen[float] = 0.1
    """Peak learning rate; the paper's is 0.1 * batch / 256."""
    label_smoothing: float = 0.1
    """Share of the label that is distributed over all classes."""
    balance: Chosen[float] = 0.0
    """0: classes weigh as many images as they have; 1: all weigh the same (logit adjustment); or in between."""
    tune: Tune = "all"
    """What is trained of the weights of `--init`. all: everything; head: the classifier alone (linear probe), on
    features as in evaluation; gradual: for `--head-epochs` the classifier alone, then everything."""
    head_epochs: Chosen[float] = 0.0
    """Epochs in which `--tune gradual` trains the classifier alone. In as many after them, the learning rate of all
    other weights rises from 0."""
    layer_decay: float = 1.0
    """The learning rate is multiplied by this for each block between a weight and the classifier, 0 to 1; 1: all
    weights have the same."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        super().check()
        smoothing = self.label_smoothing
        _need(0 <= smoothing < 1, f"label-smoothing {smoothing}: from 0 to less than 1")
        _need(0 <= self.balance <= 1, f"balance {self.balance}: between 0 and 1")
        alone, decay = self.head_epochs, self.layer_decay
        _need(alone >= 0, f"head-epochs {alone}: at least 0")
        _need(self.tune == "gradual" or not alone, f"head-epochs {alone} has no effect without --tune gradual")
        _need(self.tune != "gradual" or alone > 0, "tune gradual needs --head-epochs")
        _need(0 < decay <= 1, f"layer-decay {decay}: more than 0, at most 1")
        _need(self.tune != "head" or decay == 1, f"layer-decay {decay} has no effect with --tune head")


@dataclass(frozen=True)
class MachineConfig:
    """Where and how a run is executed. It does not affect numbers on the same device, so --resume may change it.

    Until a step is not finite, that also holds of `on_nonfinite`.
    """

    device: str | None = None
    """cuda, mps or cpu; None: the first that is available."""
    workers: int | None = None
    """Processes that read images; None: one less than the cores, at most 8, and none for data that fits into memory."""
    eval_every: Chosen[float] = 1.0
    """Epochs between evaluations on the validation images."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; one is also written at every evaluation and when the run is interrupted."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    on_nonfinite: OnNonfinite = "stop"
    """A step whose loss or gradients are not finite is never made. stop: it ends the run; skip: the run goes on, unless
    there are more than 10 such steps in 100."""
    wandb: Annotated[str | None, arg(metavar="PROJECT")] = None
    """Weights & Biases project for the numbers of log.jsonl (`pip install wandb`); None: off."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        check_range("workers", self.workers, 0, MAX_WORKERS)
        _need(self.eval_every > 0, f"eval-every {self.eval_every}: more than 0")
        _need(self.checkpoint_minutes >= 0, f"checkpoint-minutes {self.checkpoint_minutes}: at least 0")
        _need(self.keep_checkpoints >= 1, f"keep-checkpoints {self.keep_checkpoints}: at least 1")
        _need(self.log_every >= 1, f"log-every {self.log_every}: at least 1")


class Run(Protocol):
    """What the configurations of all tasks share. They are frozen dataclasses; equal values give equal runs."""

    task: ClassVar[str]

    @property
    def optim(self) -> OptimConfig: ...
    @property
    def machine(self) -> MachineConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def precision(self) -> Precision: ...
    def check(self) -> None: ...


@dataclass(frozen=True)
class ClassificationRun:
    """The configuration of a classifier's training."""

    task: ClassVar[str] = "classification"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: ClassifierOptim = field(default_factory=ClassifierOptim)
    machine: MachineConfig = field(default_factory=MachineConfig)
    seed: int = 0
    """Determines order, augmentation, initialisation and dropout."""
    precision: Precision = "float32"
    """bfloat16: convolutions and activations in bfloat16, weights and their update in float32."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        for part in (self.optim, self.data, self.model, self.machine):
            part.check()
        _need(
            self.data.mix_pairs == "stream" or self.optim.batch_size >= 2,
            f"mix-pairs {self.data.mix_pairs} mixes images of a batch, so that --batch-size is at least 2",
        )
        check_range("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True)
class DetectorConfig:
    """The detector: Mask R-CNN, or Faster R-CNN without masks."""

    backbone: Chosen[str] = "nfnet_f0"
    """Name of the network under the pyramid; `normfree models` lists them."""
    stochastic_depth: Chosen[float | None] = None
    """Rate at which the backbone's deepest block is skipped in training, 0 to 1; None: the network's."""
    init: str | None = None
    """Weight file or run folder to start from: of a classifier, for the backbone, or of a detector."""
    freeze_stages: int = 0
    """How many of the backbone's four stages keep their weights, 0 to 4; with 1 or more, so does the stem; 4: all."""
    masks: Chosen[bool] = True
    """Mask R-CNN, which predicts a mask for each object; without, Faster R-CNN: boxes alone."""
    channels: Chosen[int] = 256
    """Channels of the pyramid and of the convolutions in the heads; the box head has four times as many units."""
    standardize: bool = True
    """Whether these convolutions have standardized weights, as the backbone's do, or are plain."""
    anchor_px: Chosen[int] = 32
    """Side of the smallest anchors in pixels; each level of the pyramid doubles it."""
    rois: Chosen[int] = 512
    """Regions of an image that the heads are trained on in one step."""
    max_detections: int = 100
    """Most objects that are detected in an image."""
    min_score: float = 0.05
    """Detections with a lower score are dropped. Average precision needs a low one."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        check_range("freeze-stages", self.freeze_stages, 0, 4)
        _need(self.channels >= 8, f"channels {self.channels}: at least 8")
        check_range("anchor-px", self.anchor_px, 4, 256)
        _need(self.rois >= 1, f"rois {self.rois}: at least 1")
        _need(self.max_detections >= 1, f"max-detections {self.max_detections}: at least 1")
        _need(0 <= self.min_score < 1, f"min-score {self.min_score}: from 0 to less than 1")


@dataclass(frozen=True)
class DetectionData:
    """The images and their objects."""

    path: Annotated[str, Positional, arg(metavar="DATA", help_behavior_hint="")] = ""
    """Folder with COCO annotations beside its images, a Roboflow export or Pascal VOC, or one COCO file (.json); see
    docs/detection.md."""
    validation_fraction: float = 0.1
    """Share of the images to hold out, approximately, if the data has no validation images."""
    strict: bool = False
    """Refuse data with any problem of annotations or files, instead of naming it and going on."""
    px: Chosen[int] = 800
    """Short side to which images are resized, in training and evaluation, in pixels."""
    max_px: Chosen[int] = 1333
    """Limit of the long side in pixels: where it would be longer, the whole image is made smaller."""
    flip: bool = True
    """Mirror half of the training images."""
    scale: Chosen[tuple[float, float]] = (1.0, 1.0)
    """Range of the random factor by which training images are larger or smaller than `--px` makes them."""
    crop: bool = False
    """Train on random squares of `--px`, where factor 1 fits the whole image in; with `--scale 0.1 2`, large-scale
    jitter."""
    max_unreadable: float = 0.05
    """Stop if more than this share of the training images cannot be read."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        if not self.path:
            raise InputError("DATA is missing: a folder with COCO annotations, say")
        held_out, (low, high) = self.validation_fraction, self.scale
        _need(0 < held_out < 1, f"validation-fraction {held_out}: between 0 and 1")
        check_range("px", self.px, 32, MAX_PX)
        _need(self.px <= self.max_px <= 4 * MAX_PX, f"max-px {self.max_px}: {self.px} to {4 * MAX_PX}")
        _need(0 < low <= high, f"scale {low:g} {high:g}: two factors, the smaller one first")
        check_range("max-unreadable", self.max_unreadable, 0, 1)


@dataclass(frozen=True)
class DetectionRun:
    """The configuration of a detector's training."""

    task: ClassVar[str] = "detection"
    data: DetectionData = field(default_factory=DetectionData)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    seed: int = 0
    """Determines order, augmentation, initialisation and the choice of regions."""
    precision: Precision = "float32"
    """bfloat16: convolutions and activations in bfloat16; boxes, losses, weights and their update in float32."""

    def check(self) -> None:
        """Raises InputError for the first value out of its range."""
        for part in (self.optim, self.data, self.model, self.machine):
            part.check()
        check_range("seed", self.seed, 0, MAX_SEED)


def _need(good: bool, message: str) -> None:
    if not good:
        raise InputError(f"--{message}")


def options_of(config: Any) -> dict[str, Any]:
    """Every option of a run, by name; names are unique across its parts."""
    options: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        options |= options_of(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return options


Config = typing.TypeVar("Config")


def with_options(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with these options set, in whichever part they are."""
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            changed[f.name] = with_options(value, values)
        elif f.name in values:
            changed[f.name] = values[f.name]
    return dataclasses.replace(typing.cast(Any, config), **changed)


_DEFAULTS = options_of(DetectionRun()) | options_of(ClassificationRun())


def spell(name: str, value: Any) -> str:
    """An option as it is given on the command line: `--train-px 64`."""
    flag = name.replace("_", "-")
    if isinstance(_DEFAULTS[name], bool):
        return f"--{'' if value else 'no-'}{flag}"
    words = value if isinstance(value, tuple) else (value,)
    return " ".join((f"--{flag}", *(f"{w:.12g}" if isinstance(w, float) else quoted(str(w)) for w in words)))


def save_config(run: Any, path: str | os.PathLike) -> None:
    """Writes a run's configuration, a dataclass, as JSON with the name of its task."""
    content = {"format": FORMAT, "task": run.task} | asdict(run)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def load_config(path: str | os.PathLike, cls: type[Config] = ClassificationRun) -> Config:
    """The configuration that `save_config` wrote.

    Raises:
        InputError: the file is missing or damaged, has an unknown field, or is of another task than `cls`.
    """
    try:
        content = json.loads(Path(path).read_text())
        number, task = content.pop("format", 1), content.pop("task", ClassificationRun.task)
        if number not in (1, FORMAT):
            raise ValueError("it is of a newer version of normfree")
        wanted = typing.cast(Any, cls).task
        if task != wanted:
            raise InputError(f"{path} is of a run of {task}, not of {wanted}")
        return _from_json(cls, content)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no configuration of a run ({error})") from None


# Our own, since none of the libraries that we depend on reads dataclasses strictly: it would take 1 for True.
def _from_json(cls: type, values: dict[str, Any]) -> Any:
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if typing.get_origin(hint) is not ClassVar}
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
