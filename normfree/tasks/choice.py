"""The options of a classification run that the user did not give: `recipes` chooses, from what is measured here."""

from __future__ import annotations

import copy
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.config import ClassificationRun, ClassifierOptim, ModelConfig, Tune, load_config, spell, with_options
from normfree.data import DATASET_NAMES, count_sampled, has_validation, look_at, open_dataset
from normfree.data.coco import is_detection
from normfree.engine.device import autocast, memory_gib, pick_device
from normfree.engine.run import passes_per_step
from normfree.errors import InputError, nearest, quoted
from normfree.models import Network, create_model, find_variant, from_weights
from normfree.models.files import read_any
from normfree.native import library
from normfree.recipes import RECIPES, transfer
from normfree.recipes.small import Asked, Given, Images, Machine, Reason, choose
from normfree.weights.file import Weights


def choose_recipe(name: str | None, given: Given) -> tuple[ClassificationRun, tuple[Reason, ...], Weights | None]:
    """The run for the `given` options, with all others chosen or from recipe `name`; the reasons; what --init holds."""
    if name is not None and name not in RECIPES:
        raise InputError(f"no recipe {name!r}{nearest(name, RECIPES)}; known: {', '.join(RECIPES)}")
    loose: dict[str, Any] = {"clipping": None} if given.get("clip") == "none" else {}
    loose |= {"epochs": math.inf, "warmup_epochs": 0.0, "lr": max(0.1, given.get("final_lr", 0.0)), "mixup": 0.2}
    loose |= {"head_epochs": 1.0} if given.get("tune") == "gradual" else {}
    draft = with_options(ClassificationRun(), loose | dict(given))  # placeholders that contradict no given option
    draft.check()
    if {"freeze", "tune"} <= given.keys():
        raise InputError(f"{spell('freeze', given['freeze'])} and {spell('tune', given['tune'])}: give one of them")
    if draft.model.init is None and (draft.model.freeze or draft.optim.tune != "all"):
        name = "freeze" if draft.model.freeze else "tune"
        raise InputError(f"{spell(name, given[name])} is for pre-trained weights: add --init WEIGHTS")
    path, device = draft.data.path, pick_device(draft.machine.device)
    if name is not None and name.endswith("_fine_tuning") and draft.model.init is None:
        raise InputError(f"--recipe {name} starts from pre-trained weights: add --init WEIGHTS")
    base, asked, weights = _starting_point(name, path, draft.model, given)
    try:
        images, validation = open_dataset(path, validation_fraction=draft.data.validation_fraction, seed=draft.seed)
    except InputError as error:
        hint = f"; its annotations are of objects: normfree detect train {quoted(path)}" if is_detection(path) else ""
        raise InputError(f"{error}{hint}") from None
    if "validation_fraction" in given and has_validation(path):
        raise InputError(f"{spell('validation_fraction', given['validation_fraction'])}: {path} has validation images")
    counts = Counter(images.targets).values()
    seen = Images(len(images), images.class_names, *look_at(images), max(counts) / min(counts), len(validation))

    @functools.cache
    def model(config: ModelConfig, tune: Tune) -> Network:
        run = ClassificationRun(config, optim=ClassifierOptim(tune=tune))
        with torch.random.fork_rng(devices=[]):  # a copy: measuring changes running averages
            return copy.deepcopy(network(run, images.class_names, weights)[0]).to(device).train()

    def of_run(measure: Callable[..., float]) -> Callable[..., float]:
        return lambda run, *more: measure(model(run.model, run.optim.tune), run, *more)

    speed = of_run(images_per_second) if device.type == "cpu" and name is None else None
    machine = Machine(device.type, memory_gib(device), speed, of_run(image_mib))
    if weights is None:
        return *choose(given, seen, machine, asked, base), None
    if trained := count_sampled(validation, weights.info.trained_on):
        what = f"the weights of --init were trained on {trained} of {len(validation)} validation images, or more"
        print(f"warning: {what}: the accuracy will be too high", file=sys.stderr)
    rule = functools.partial(transfer.rule, tune="head" if draft.model.freeze else draft.optim.tune)
    return *choose(given, seen, machine, asked, base, rule), weights


def data_of_init(given: Given) -> dict[str, Any]:
    """The given options with the data of the run that `init` names, split as they were.

    Raises:
        InputError: `init` is no run folder, so that it does not say on which data to train.
    """
    folder = Path(given["init"])
    if not (folder / "config.json").is_file():
        option = spell("init", given["init"])
        raise InputError(f"{option} needs images to train on: normfree train DATA {option}")
    run = load_config(folder / "config.json")
    data = {"path": run.data.path, "validation_fraction": run.data.validation_fraction, "seed": run.seed}
    if has_validation(run.data.path):
        del data["validation_fraction"]
    return data | {name: value for name, value in given.items() if name != "path"}


def _starting_point(
    name: str | None, path: str, model: ModelConfig, given: Given
) -> tuple[ClassificationRun | None, Asked | None, Weights | None]:
    """The recipe called `name`, or that of a packaged data set; the network that is given; its weights."""
    if name is not None:
        run = RECIPES[name](path)
        if given.get("model", run.model.model) != run.model.model:
            what = f"--recipe {name} is for {run.model.model}, not {given['model']}"
            raise InputError(f"{what}: take the recipe of that name, or leave out --recipe")
        if given.keys() & {"train_px", "eval_px"}:  # one follows from the other
            own = find_variant(run.model.model)
            px = {"train_px": run.data.train_px or own.train_px, "eval_px": run.data.eval_px or own.eval_px}
            run = with_options(run, px)
        return run, None, _read(with_options(run, given).model, run.model.model)
    if weights := _read(model, given.get("model")):
        info = weights.info
        if given.get("model", info.architecture) != info.architecture:
            raise InputError(f"{model.init} holds weights of {info.architecture}, not of {model.model}")
        if info.in_channels not in (1, 3) and "in_channels" not in given:
            raise InputError(f"{model.init} takes images of {info.in_channels} channels; --in-channels 3 adapts it")
        pixels = info.train_px, info.eval_px, info.in_channels, info.eval_crop, info.crop_fraction
        return None, Asked(info.architecture, *pixels), weights
    base = RECIPES[path](path) if path in DATASET_NAMES and path in RECIPES else None
    own = find_variant(model.model)
    return base, Asked(model.model, own.train_px, own.eval_px) if "model" in given else None, None


def _read(m: ModelConfig, name: str | None) -> Weights | None:
    return None if m.init is None else read_any(m.init, name, m.overrides())


def network(
    run: ClassificationRun, class_names: Sequence[str], weights: Weights | None = None
) -> tuple[Network, tuple[str, ...]]:
    """The network on the CPU, frozen as the run says, and notes on its weights (`weights`, if they have been read)."""
    m, notes = run.model, ()
    if m.init is None:
        model = create_model(m.model, len(class_names), m.in_channels, **m.overrides())
    else:
        size = len(class_names), m.in_channels
        model, notes = from_weights(m.model, *size, m.init, m.overrides(), class_names, weights)
    model.train_head_only(m.freeze or run.optim.tune == "head")
    return model.to(memory_format=torch.channels_last), notes


def image_mib(model: Network, run: ClassificationRun) -> float:
    """MiB of activations that one more image keeps for the backward pass."""
    images = _noise(model, run, 3)

    def kept(count: int) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            autocast(images.device, run.precision),
        ):
            outputs = model(images[:count])  # keeps the tensors alive, so that addresses are unique
        del outputs
        return sum(sizes.values())

    return max(kept(3) - kept(2), 1) / 2**20


def images_per_second(model: Network, run: ClassificationRun, enough: float) -> float:
    """Training throughput of the network on a CPU, measured for twenty seconds.

    In two, if these say more than twice `enough`. The mean, so that what other programs take counts.
    """
    images = _noise(model, run, min(run.optim.batch_size, run.optim.micro_batch or run.optim.batch_size))

    def measured(seconds: float) -> float:
        began, count = time.monotonic(), 0
        while time.monotonic() < began + seconds or not count:
            with autocast(images.device, run.precision):
                outputs = model(images)
            outputs.float().sum().backward()
            count += len(images)
        return count / (time.monotonic() - began) / passes_per_step(run.optim)

    library()  # compiled before anything is timed
    measured(1)  # allocates memory
    speed = measured(1)
    if speed > 2 * enough:
        return speed
    print("measuring, for twenty seconds, how many epochs this machine has time for ...", file=sys.stderr)
    return measured(18)


def _noise(model: Network, run: ClassificationRun, count: int) -> Tensor:
    """(count, C, H, W) at the training resolution, on the model's device. Does not use torch's global generator."""
    px = run.data.train_px or find_variant(run.model.model).train_px
    images = torch.randn(count, run.model.in_channels, px, px, generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters()).device, memory_format=torch.channels_last)
