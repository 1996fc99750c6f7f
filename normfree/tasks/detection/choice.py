"""The options of a detection run that the user did not give: `recipes.coco` chooses, from what is measured here."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import time
from typing import Any

import numpy as np
import torch

from normfree.config import DetectionRun, spell, with_options
from normfree.data import look_at
from normfree.data.coco import DetectionImages, open_detection
from normfree.engine.device import pick_device
from normfree.engine.run import passes_per_step
from normfree.errors import InputError, nearest
from normfree.models.files import ZOO
from normfree.native import library
from normfree.recipes.coco import BACKBONES, DETECTION_RECIPES, Place, Scenes, choose_detection
from normfree.recipes.small import Given, Reason
from normfree.tasks.detection.model import Detector
from normfree.tasks.detection.task import Detection, detector
from normfree.weights import ModelInfo
from normfree.weights.file import DETECTOR, Weights
from normfree.weights.read import read

_MEASURED_SECONDS = 15


def choose_recipe(name: str | None, given: Given) -> tuple[DetectionRun, tuple[Reason, ...], Weights | None]:
    """The run for the `given` options, with all others chosen or from recipe `name`; the reasons; what --init holds."""
    if name is not None and name not in DETECTION_RECIPES:
        raise InputError(f"no recipe {name!r}{nearest(name, DETECTION_RECIPES)}; known: {', '.join(DETECTION_RECIPES)}")
    loose: dict[str, Any] = {"epochs": math.inf, "warmup_epochs": 0.0, "max_px": 4 * given.get("px", 1024)}
    loose |= {"px": max(32, min(800, given.get("max_px", 800)))}
    loose |= {"lr": max(0.1, given.get("final_lr", 0.0))} | ({"clipping": None} if given.get("clip") == "none" else {})
    draft = with_options(DetectionRun(), loose | dict(given))  # placeholders that contradict no given option
    draft.check()
    data, device = draft.data, pick_device(draft.machine.device)
    train_set, _ = open_detection(
        data.path, validation_fraction=data.validation_fraction, seed=draft.seed, strict=data.strict
    )
    if "validation_fraction" in given and not train_set.held_out:
        raise InputError(f"{spell('validation_fraction', data.validation_fraction)}: {data.path} has validation images")
    base = DETECTION_RECIPES[name](data.path) if name else None
    weights = None if draft.model.init is None else read(draft.model.init, ZOO, given.get("backbone"))
    implied = {} if weights is None else _implied(weights.info)
    backbone = (implied | dict(given)).get("backbone")
    if base and base.model.backbone in BACKBONES and backbone not in (None, base.model.backbone):
        what = f"--recipe {name} is for {base.model.backbone}, not {backbone}"
        raise InputError(f"{what}: take the recipe of that name, or leave out --recipe")

    def images_per_s(run: DetectionRun) -> float:
        print(f"measuring, for {_MEASURED_SECONDS} seconds, how many epochs there is time for ...", file=sys.stderr)
        with torch.random.fork_rng(devices=[]):
            model = copy.deepcopy(detector(run, train_set, weights))  # measuring changes running averages
            return _speed(model.to(device), run, train_set)

    place = Place(device.type, images_per_s if device.type == "cpu" else None)
    return *choose_detection(given, _look(train_set), place, implied, base), weights


def _look(images: DetectionImages) -> Scenes:
    """What the choice needs to know of the training images."""
    boxes = np.array([each.box for image in images.annotations for each in image if not each.crowd]).reshape(-1, 4)
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    smallest = float(np.percentile(sides, 10)) if len(sides) else 0.0
    short_px, _ = look_at(images)
    return Scenes(len(images), len(images.class_names), len(boxes), short_px, smallest, images.has_masks)


def _implied(info: ModelInfo) -> dict[str, Any]:
    """Options of the detector, or of its backbone, in a weight file."""
    if info.architecture != DETECTOR:
        return {"backbone": info.architecture}
    names = ("backbone", "channels", "standardize", "anchor_px")
    return {name: info.overrides[name] for name in names if name in info.overrides}


def _speed(model: Detector, run: DetectionRun, train_set: DetectionImages) -> float:
    """Training throughput on real images, reading included: the mean, so that what other programs take counts."""
    library()  # compiled before anything is timed
    task = Detection(model, train_set, train_set, run, next(model.parameters()).device)
    batches = task.read(range(10**6), workers=0)
    began, count = math.inf, 0
    for i, batch in enumerate(itertools.chain([next(batches)] * 2, batches)):
        if i == 2:  # the first passes allocate memory
            began, count = time.monotonic(), 0
        for part, share in task.split(batch, run.optim.micro_batch or run.optim.batch_size):
            (share * task.loss(task.model, part)["loss"]).backward()
        task.model.zero_grad(set_to_none=True)
        count += len(batch.images)
        if time.monotonic() - began > _MEASURED_SECONDS:
            break
    return count / (time.monotonic() - began) / passes_per_step(run.optim)
