"""Detection: builds what a `DetectionRun` describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.config import DetectionRun, load_config
from normfree.data import cached, content_sample, fits_in_memory, inventory
from normfree.data.coco import (
    MISFITS,
    DetectionBatch,
    DetectionImages,
    DetectionTransform,
    detection_batches,
    open_detection,
    problem_lines,
)
from normfree.engine import run as engine
from normfree.engine.checkpoint import check_free, task_state
from normfree.engine.device import autocast, pick_device
from normfree.engine.log import wandb_init
from normfree.engine.loop import Evaluation, Outcome, Shard
from normfree.engine.run import Job, make_plan
from normfree.engine.update import Update
from normfree.errors import InputError
from normfree.tasks.accuracy import pick_workers
from normfree.tasks.detection.evaluation import evaluate, on_device, scores_from
from normfree.tasks.detection.metrics import score_table
from normfree.tasks.detection.model import (
    Detector,
    create_detector,
    described,
    freeze,
    roles,
    save_detector,
    with_sum,
)
from normfree.tasks.unreadable import Unreadable
from normfree.weights.file import ModelInfo, Weights

COMMAND = "normfree detect train"
PICTURES = 6  # of validation images, at every evaluation


@dataclass
class Detection:
    """The loop's task: images and objects, the losses of Mask R-CNN, COCO metrics."""

    model: Detector
    train_set: DetectionImages
    validation_set: DetectionImages
    run: DetectionRun
    device: torch.device

    def __post_init__(self) -> None:
        self.unreadable = Unreadable(len(self.train_set), self.run.data.max_unreadable)

    @property
    def metric(self) -> str:
        """AP of masks, or of boxes where masks are not predicted or not known."""
        return "mask_ap" if self.model.masks and self.validation_set.has_masks else "box_ap"

    @property
    def workers(self) -> int:
        """Processes that read training images."""
        return pick_workers(self.run.machine.workers, self.train_set)

    def batches(self, steps: range, shard: Shard) -> Iterator[DetectionBatch]:
        """Batches whose `unreadable` are the images that have not been reported before.

        Raises:
            InputError: more images than `max_unreadable` allows cannot be read.
        """
        for batch in self.read(steps, self.workers, shard):
            yield batch._replace(unreadable=self.unreadable.count(batch.unreadable))

    def read(self, steps: range, workers: int, shard: Shard = Shard()) -> Iterator[DetectionBatch]:  # noqa: B008, a constant
        """Batches from `workers` reading processes, without bookkeeping."""
        if shard.size > 1:
            raise InputError("training is one process today")
        data = self.run.data
        return detection_batches(
            self.train_set,
            DetectionTransform(data.px, data.max_px, data.flip, data.scale, data.crop),
            masks=self.model.masks,
            batch_size=self.run.optim.batch_size,
            seed=self.run.seed,
            steps=steps,
            workers=workers,
            pin_memory=self.device.type == "cuda",
        )

    def split(self, batch: DetectionBatch, size: int) -> list[tuple[DetectionBatch, float]]:
        """Micro-batches of `size` images, each with its share of the batch."""
        total = len(batch.images)
        lists = {name: value for name, value in batch._asdict().items() if name != "unreadable"}
        parts = [
            batch._replace(**{name: value[i : i + size] for name, value in lists.items()})
            for i in range(0, total, size)
        ]
        return [(part, len(part.images) / total) for part in parts]

    def loss(self, forward: Callable[..., Any], batch: DetectionBatch) -> dict[str, Tensor]:
        """ "loss", the sum of the others, which have torchvision's names."""
        with autocast(self.device, self.run.precision):
            parts = forward(*on_device(batch, self.device), resized=True)
        return with_sum(parts)

    def evaluate(self, forward: Callable[..., Any], shard: Shard, show: Callable[[int, int], None]) -> Evaluation:
        """Figures from 0 to 1 and losses; details: all scores, with a row for each class."""
        workers = pick_workers(self.run.machine.workers, self.validation_set)
        found = evaluate(
            self.model, self.validation_set, self.device, workers, self.run.precision, show, num_pictures=PICTURES
        )
        self.unreadable.warn(found.unreadable)
        if not found.counts:
            raise InputError(f"none of the {len(self.validation_set)} validation images can be read")
        figures = {self.metric: 0.0} | found.figures()
        figures |= {"unreadable": len(found.unreadable)} if found.unreadable else {}
        details = {"box": asdict(found.box), "mask": found.mask and asdict(found.mask), "cap": found.cap_line()}
        return Evaluation(figures, details, found.pictures)

    def group_of(self, name: str) -> str:
        """Row of the AGC log: "stem", "stages.0", ..., "fpn", "rpn", "box_head", ..."""
        parts = [part for part in name.split(".") if part not in ("backbone", "body", "roi_heads")]
        return ".".join(parts[: 2 if parts[0] == "stages" else 1])

    def state_dict(self) -> dict[str, Any]:
        """The images that were reported, so that a resumed run does not report or count them again, and the network."""
        assert self.model.info is not None
        return self.unreadable.state_dict() | {"network": self.model.info.to_metadata()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, but for the network, which has been built from it."""
        self.unreadable.load_state_dict(state)

    def save(self, path: Path) -> None:
        """Writes the weight file."""
        save_detector(self.model, path)


def build(run: DetectionRun, weights: Weights | None = None, info: ModelInfo | None = None) -> Job:
    """Everything that a run needs, from its configuration alone.

    Args:
        weights: of the run's `init`, if they have been read.
        info: header of the detector in a checkpoint, in whose place `init` is not read.

    Raises:
        InputError: a value is out of range, or data or weights cannot be used.
    """
    run.check()
    if run.machine.wandb is not None:
        wandb_init()
    device, data = pick_device(run.machine.device), run.data
    train_set, validation_set = open_detection(
        data.path, validation_fraction=data.validation_fraction, seed=run.seed, strict=data.strict
    )
    check_objects(run, train_set, validation_set)
    plan = make_plan(run, len(train_set))
    model = detector(run, train_set, weights, info).to(device)
    assert model.info is not None
    model.info = replace(model.info, source=f"{COMMAND} {Path(data.path).name}", trained_on=content_sample(train_set))
    sets = {"train": train_set, "validation": validation_set}
    recorded = {"held_out": train_set.held_out, "images": inventory(**sets)}
    if device.type == "cpu" and run.machine.workers is None:  # processes that read would take cores from the network
        train_set, validation_set = (_cached(images) for images in sets.values())
    task = Detection(model, train_set, validation_set, run, device)
    name = re.sub(r"[^\w.-]+", "-", Path(data.path).resolve().name).strip("-")
    return Job(
        run,
        task,
        Update(model, run.optim, **roles(model)),
        plan,
        name=f"{name}-{run.model.backbone}",
        source=data.path,
        data=recorded,
        description=_describe(task),
        notes=model.notes,
        preview=lambda: task.read(range(min(3, plan.total_steps)), workers=0),
        workers=task.workers,
        evaluation=(len(validation_set) / plan.batch_size, 0.5),
        summary=_tables,
        command=COMMAND,
    )


def detector(
    run: DetectionRun, train_set: DetectionImages, weights: Weights | None = None, info: ModelInfo | None = None
) -> Detector:
    """The detector on the CPU, frozen as the run says, with initial weights that follow from its seed.

    `weights`: of the run's `init`, if they have been read; the detector may take over their tensors. `info`: as in
    `build`.
    """
    m = run.model
    torch.manual_seed(run.seed)
    rate = {} if m.stochastic_depth is None else {"stochastic_depth": m.stochastic_depth}
    new = partial(
        create_detector,
        m.backbone,
        len(train_set.class_names),
        masks=m.masks,
        channels=m.channels,
        standardize=m.standardize,
        min_px=run.data.px,
        max_px=run.data.max_px,
        anchor_px=m.anchor_px,
        rois=m.rois,
        max_detections=m.max_detections,
        min_score=m.min_score,
        weights=m.init,
        content=weights,
        class_names=train_set.class_names,
        category_ids=train_set.category_ids,
        **rate,
    )
    model = new() if info is None else described(info)
    freeze(model, m.freeze_stages)
    return model.to(memory_format=torch.channels_last)


def check_objects(run: DetectionRun, train_set: DetectionImages, validation_set: DetectionImages) -> None:
    """Raises InputError for sets without objects, too many unusable files, and masks that training images lack."""
    for name, images in (("training", train_set), ("validation", validation_set)):
        if not any(not each.crowd for image in images.annotations for each in image):
            raise InputError(f"{run.data.path}: the {len(images)} {name} images have no objects")
    unusable = [line for kind in MISFITS for line in train_set.problems.get(kind, ())]
    total = len(train_set) + len(unusable)
    if len(unusable) > run.data.max_unreadable * total:
        raise InputError(
            f"{len(unusable)} of {total} training images cannot be used, more than --max-unreadable "
            f"{run.data.max_unreadable:g} allows: {unusable[0]}"
        )
    if run.model.masks and not train_set.has_masks:
        raise InputError("--masks needs a mask for each training object, and some have boxes alone: add --no-masks")


def _cached(images: DetectionImages) -> DetectionImages:
    """The images in memory, if they fit."""
    return replace(images, samples=cached(images.samples)) if fits_in_memory(images) else images


def _describe(task: Detection) -> list[str]:
    """Lines that describe data and network."""
    run, train_set = task.run, task.train_set
    millions = sum(p.numel() for p in task.model.parameters()) / 1e6
    objects = sum(not each.crowd for image in train_set.annotations for each in image)
    images = f"{len(train_set)} training and {len(task.validation_set)} validation images"
    kind = "Mask R-CNN" if run.model.masks else "Faster R-CNN (boxes alone)"
    problems = problem_lines(train_set) + [f"validation: {line}" for line in problem_lines(task.validation_set)]
    return [
        f"data     {run.data.path}: {images}, {objects} objects to train on, {len(train_set.class_names)} classes",
        *(f"note     {line}" for line in train_set.notes),
        *(f"problem  {line}" for line in problems),
        f"network  {kind} on {run.model.backbone}, {millions:.1f} M parameters, short side {run.data.px} px, "
        f"{run.precision} on {task.device}",
    ]


def _tables(details: dict[str, Any]) -> Sequence[str]:
    """The scores of the last evaluation."""
    box = scores_from(details.get("box"))
    if box is None:
        return []
    return [*score_table(box, scores_from(details["mask"])), *([details["cap"]] if details["cap"] else [])]


def start(
    run: DetectionRun, folder: Path | None, chosen: Sequence[str] = (), weights: Weights | None = None
) -> Outcome:
    """Trains in a new run folder, as `engine.run.start`. Input is checked before the folder is created."""
    if folder is not None:
        check_free(folder)
    return engine.start(build(run, weights), folder, chosen)


def resume(folder: Path, run: DetectionRun | None = None) -> Outcome:
    """Continues a run from its newest whole checkpoint. `run` may differ from the saved one in `machine` and length."""
    saved = load_config(folder / "config.json", DetectionRun)
    engine.check_resumed(folder, saved, run or saved, COMMAND)
    header = task_state(folder / "checkpoints").get("network") if saved.model.init else None
    info = ModelInfo.from_metadata(header) if header else None
    return engine.resume(build(run or saved, info=info), folder, saved)
