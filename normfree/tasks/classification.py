"""Image classification: builds what a `ClassificationRun` describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.config import ClassificationRun, DataConfig, load_config
from normfree.data import (
    Batch,
    LabelledImages,
    Mixing,
    RandAugment,
    TrainTransform,
    UnreadableImage,
    cached,
    content_sample,
    fits_in_memory,
    has_validation,
    inventory,
    open_dataset,
    train_batches,
)
from normfree.engine import run as engine
from normfree.engine.checkpoint import check_free, task_state
from normfree.engine.device import autocast, pick_device
from normfree.engine.log import wandb_init
from normfree.engine.loop import Evaluation, Outcome, Plan, Shard
from normfree.engine.run import Job, make_plan
from normfree.engine.update import LayerRates, Update
from normfree.errors import InputError
from normfree.models import Network, save
from normfree.models.files import unfilled
from normfree.tasks.accuracy import (
    ClassScore,
    eval_transform,
    evaluate_images,
    pick_workers,
    prepare,
    score_table,
)
from normfree.tasks.choice import network
from normfree.tasks.unreadable import Unreadable
from normfree.weights import ModelInfo
from normfree.weights.file import Weights


@dataclass
class Classification:
    """The loop's task: images and labels, cross-entropy with label smoothing; plain cross-entropy and accuracy."""

    model: Network
    info: ModelInfo
    train_set: LabelledImages
    validation_set: LabelledImages
    run: ClassificationRun
    device: torch.device
    log_priors: Tensor | None = None  # (K,), multiplied by the option `balance`

    def __post_init__(self) -> None:
        self.unreadable = Unreadable(len(self.train_set), self.run.data.max_unreadable)

    @property
    def metric(self) -> str:
        """ "top1", or where classes are balanced "balanced", the mean recall of the classes."""
        return "balanced" if self.run.optim.balance else "top1"

    @property
    def workers(self) -> int:
        """Processes that read training images."""
        return pick_workers(self.run.machine.workers, self.train_set)

    def batches(self, steps: range, shard: Shard) -> Iterator[Batch]:
        """Batches whose `unreadable` are the images that have not been reported before.

        Raises:
            InputError: more images than `max_unreadable` allows cannot be read.
        """
        for batch in self.read(steps, self.workers, shard):
            yield batch._replace(unreadable=self.unreadable.count(batch.unreadable))

    def read(self, steps: range, workers: int, shard: Shard = Shard()) -> Iterator[Batch]:  # noqa: B008, a constant
        """Batches from `workers` reading processes, without bookkeeping."""
        if shard.size > 1:
            raise InputError("training is one process today")
        data, transform = self.run.data, train_transform(self.run.data, self.info)
        layers, magnitude = data.randaugment_layers, data.randaugment_magnitude
        return train_batches(
            self.train_set,
            transform,
            batch_size=self.run.optim.batch_size,
            seed=self.run.seed,
            start_step=steps.start,
            stop_step=steps.stop,
            workers=workers,
            channels=self.info.in_channels,
            min_px=transform.min_px,
            mixing=Mixing(data.mixup, data.cutmix, data.mix_pairs) if data.mixup or data.cutmix else None,
            augment=RandAugment(layers, magnitude, data.randaugment_style) if layers else None,
            pin_memory=self.device.type == "cuda",
        )

    def split(self, batch: Batch, size: int) -> list[tuple[Batch, float]]:
        """Micro-batches of `size` images, each with its share of the batch."""
        total = len(batch.targets)
        fields = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
        starts = range(0, total, size)
        parts = [batch._replace(**{name: value[i : i + size] for name, value in fields.items()}) for i in starts]
        return [(part, len(part.targets) / total) for part in parts]

    def loss(self, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """ "loss": cross-entropy against smoothed, mixed labels, with logits adjusted for `balance`."""
        images = prepare(batch.images, self.info.mean, self.info.std, self.device)
        with autocast(self.device, self.run.precision):
            logits = forward(images)
        logits = logits.float()
        if self.log_priors is not None:  # logit adjustment: Menon et al. 2020, arXiv 2007.07314
            logits = logits + self.log_priors
        return {"loss": smoothed_cross_entropy(logits, batch, self.run.optim.label_smoothing)}

    def evaluate(self, forward: Callable[..., Any], shard: Shard, show: Callable[[int, int], None]) -> Evaluation:
        """Figures in percent; details: counts for every class."""
        info, run = self.info, self.run
        workers = pick_workers(run.machine.workers, self.validation_set)
        accuracy = evaluate_images(
            self.model, info, self.validation_set, self.device, workers, run.precision, show, forward
        )
        self.unreadable.warn(accuracy.unreadable)
        figures = {"top1": accuracy.top1_percent}
        figures |= {"top5": accuracy.top5_percent} if info.num_classes > 5 else {}
        figures |= {"balanced": accuracy.balanced_percent} if run.optim.balance else {}
        figures |= {"loss": accuracy.loss}
        figures |= {"unreadable": len(accuracy.unreadable)} if accuracy.unreadable else {}
        scores = accuracy.scores(info.class_names)
        counts = {s.name: {"images": s.images, "right": s.right, "predicted": s.predicted} for s in scores}
        return Evaluation(figures, {"classes": counts})

    def group_of(self, name: str) -> str:
        """Row of the AGC log: "stem", "stages.0", ..., "head"."""
        parts = name.split(".")
        return ".".join(parts[: 2 if parts[0] == "stages" else 1])

    def state_dict(self) -> dict[str, Any]:
        """The images that were reported, so that a resumed run does not report or count them again, and the network."""
        return self.unreadable.state_dict() | {"network": self.info.to_metadata()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, but for the network, which has been built from it."""
        self.unreadable.load_state_dict(state)

    def save(self, path: Path) -> None:
        """Writes the weight file."""
        save(self.model, path, self.info)


def train_transform(data: DataConfig, info: ModelInfo) -> TrainTransform:
    return TrainTransform(info.train_px, data.min_area, flip=data.flip, style=data.crop_style)


def smoothed_cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Mean loss of `logits` (N, K) against the smoothed and mixed labels of a batch of N images.

    The label of a mixed image is ratio * first + (1 - ratio) * second; cross-entropy is linear in it.
    """

    def against(targets: Tensor, reduction: str) -> Tensor:
        targets = targets.to(logits.device, non_blocking=True)
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction=reduction)

    if batch.mix_targets is None or batch.ratios is None:
        return against(batch.targets, "mean")
    ratios = batch.ratios.to(logits.device, non_blocking=True)
    return torch.lerp(against(batch.mix_targets, "none"), against(batch.targets, "none"), ratios).mean()


def build(run: ClassificationRun, weights: Weights | None = None) -> Job:
    """Everything that a run needs, from its configuration alone; `weights`: of its `init`, if they have been read.

    Raises:
        InputError: a value is out of range, or data or weights cannot be used.
    """
    run.check()
    if run.machine.wandb is not None:
        wandb_init()
    device = pick_device(run.machine.device)
    train_set, validation_set = open_dataset(
        run.data.path, validation_fraction=run.data.validation_fraction, seed=run.seed
    )
    plan = make_plan(run, len(train_set))
    torch.manual_seed(run.seed)
    model, notes = network(run, train_set.class_names, weights)
    assert model.info is not None
    info = replace(
        model.info,
        class_names=tuple(train_set.class_names),
        train_px=run.data.train_px or model.info.train_px,
        eval_px=run.data.eval_px or model.info.eval_px,
        eval_crop=run.data.eval_crop,
        crop_fraction=run.data.crop_fraction,
        source=f"normfree train {Path(run.data.path).name}",
        trained_on=content_sample(train_set),
    )
    model = model.to(device)
    data = {
        "held_out": not has_validation(run.data.path),
        "images": inventory(train=train_set, validation=validation_set),
    }
    log_priors = _log_priors(train_set, run.optim.balance, device)
    if device.type == "cpu" and run.machine.workers is None:  # processes that read would take cores from the network
        if fits_in_memory(train_set):
            train_set = cached(train_set, info.in_channels, train_transform(run.data, info).min_px)
        if fits_in_memory(validation_set):
            validation_set = cached(validation_set, info.in_channels, eval_transform(info).min_px)
    _check_readable(validation_set, info.in_channels)
    task = Classification(model, info, train_set, validation_set, run, device, log_priors)
    name = re.sub(r"[^\w.-]+", "-", Path(run.data.path).resolve().name).strip("-")  # {000..099}.tar, NAME?label=x
    return Job(
        run,
        task,
        Update(model, run.optim, _rates(model, run, plan), exempt=model.head if run.model.init else ()),
        plan,
        name=f"{name}-{run.model.model}",
        source=run.data.path,
        data=data,
        description=_describe(task),
        notes=notes,
        preview=lambda: task.read(range(min(3, plan.total_steps)), workers=0),
        workers=task.workers,
        evaluation=(len(validation_set) / plan.batch_size, (info.eval_px / info.train_px) ** 2 / 3),
        summary=_class_table,
    )


def _rates(model: Network, run: ClassificationRun, plan: Plan) -> LayerRates | None:
    """The learning rates of `layer_decay` and `tune` "gradual"; None: one for all weights."""
    o = run.optim
    head_steps = round(o.head_epochs * plan.steps_per_epoch)
    if head_steps >= plan.total_steps:
        raise InputError(f"--head-epochs {o.head_epochs:g} leave none of {plan.total_steps} steps to the other weights")
    if o.layer_decay == 1 and not head_steps:
        return None
    layers = {p: model.layer_of(name) for name, p in model.named_parameters()}
    return LayerRates(layers, o.layer_decay, head_steps, model.train_head_only)


def _describe(task: Classification) -> list[str]:
    """Lines that describe data and network."""
    info, run = task.info, task.run
    millions = sum(p.numel() for p in task.model.parameters()) / 1e6
    images = f"{len(task.train_set)} training and {len(task.validation_set)} validation images"
    pixels = f"{info.train_px} px in training and {info.eval_px} px in evaluation"
    return [
        f"data     {run.data.path}: {images}, {info.num_classes} classes",
        *(f"note     {line}" for line in task.train_set.notes),
        f"network  {info.architecture}, {millions:.1f} M parameters, {pixels}, {run.precision} on {task.device}",
    ]


def _class_table(details: dict[str, Any]) -> list[str]:
    """Table of the classes in the last evaluation."""
    scores = [ClassScore(name, **counts) for name, counts in details.get("classes", {}).items()]
    return score_table(scores, most=10) if scores else []


def _check_readable(validation_set: LabelledImages, channels: int) -> None:
    """Raises InputError if no image can be validated on: the run would end with an accuracy of 0 %."""
    reasons = []
    for index in range(len(validation_set)):
        try:
            validation_set.read(index, channels)
            return
        except UnreadableImage as error:
            reasons.append(str(error))
    if reasons:
        raise InputError(f"none of the {len(reasons)} validation images can be read; the first: {reasons[0]}")
    raise InputError("there are no validation images: no class has two images, of which one could be held out")


def _log_priors(images: LabelledImages, balance: float, device: torch.device) -> Tensor | None:
    """balance * log(class frequency), (K,); None without balance."""
    if not balance:
        return None
    counts = torch.bincount(torch.tensor(images.targets), minlength=len(images.class_names))
    return balance * (counts.clamp(min=1) / len(images)).log().to(device)


def start(
    run: ClassificationRun, folder: Path | None, chosen: Sequence[str] = (), weights: Weights | None = None
) -> Outcome:
    """Trains in a new run folder, as `engine.run.start`. Input is checked before the folder is created."""
    if folder is not None:
        check_free(folder)
    return engine.start(build(run, weights), folder, chosen)


def resume(folder: Path, run: ClassificationRun | None = None) -> Outcome:
    """Continues a run from its newest whole checkpoint. `run` may differ from the saved one in `machine` and length."""
    saved = load_config(folder / "config.json")
    engine.check_resumed(folder, saved, run or saved)
    header = task_state(folder / "checkpoints").get("network") if saved.model.init else None
    weights = unfilled(ModelInfo.from_metadata(header)) if header else None  # the checkpoint's take the place of init's
    return engine.resume(build(run or saved, weights), folder, saved)
