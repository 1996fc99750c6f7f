"""Image classification: what a `RunConfig` means, and the verbs `train` and `eval`."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.config import (
    MAX_PX,
    MAX_SEED,
    MAX_WORKERS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    load_config,
    options_of,
    save_config,
    spell,
    validate,
    with_options,
)
from normfree.data import (
    DATASET_NAMES,
    Batch,
    LabelledImages,
    Mixing,
    RandAugment,
    TrainTransform,
    UnreadableImage,
    cached,
    changed,
    content_sample,
    count_sampled,
    fits_in_memory,
    has_validation,
    inventory,
    look_at,
    open_dataset,
    open_evaluation,
    train_batches,
)
from normfree.engine.checkpoint import check_free, new_run_folder, numbered_run_folder
from normfree.engine.device import memory_gib, pick_device
from normfree.engine.evaluate import (
    Accuracy,
    ClassScore,
    autocast,
    batches_for,
    eval_transform,
    evaluate,
    prepare,
    score_table,
    write_report,
)
from normfree.engine.log import duration, progress, wandb_init
from normfree.engine.loop import Outcome, Plan, eval_steps, train
from normfree.errors import InputError, check_range, nearest, quoted
from normfree.files import check_writable, replacing, working_in
from normfree.models import Network, create_model, find_variant, from_weights, load, save
from normfree.models.files import read_any
from normfree.native import library
from normfree.optim import EMA, SGD_AGC, param_groups, warmup_cosine
from normfree.recipes import RECIPES
from normfree.recipes.small import Asked, Given, Images, Machine, Reason, choose
from normfree.weights import ModelInfo
from normfree.weights.file import package_version

EVAL_BATCH = 64
DATA = "data.json"  # of a run folder: which images it was begun with


@dataclass
class Classification:
    """The loop's task: images and labels, cross-entropy with label smoothing; plain cross-entropy and accuracy."""

    model: Network
    info: ModelInfo
    train_set: LabelledImages
    validation_set: LabelledImages
    run: RunConfig
    device: torch.device
    log_priors: Tensor | None = None  # (K,), times the option `balance`
    data: dict[str, Any] = field(default_factory=dict)  # what data.json of the run folder says
    notes: tuple[str, ...] = ()  # what became of the weight file that the run starts from
    _said: set[str] = field(default_factory=set)
    _unreadable: int = 0
    _last: Accuracy | None = None

    @property
    def workers(self) -> int:
        return pick_workers(self.run.machine.workers, self.train_set)

    def batches(self, start_step: int, stop_step: int, workers: int | None = None) -> Iterator[Batch]:
        data, transform = self.run.data, train_transform(self.run.data, self.info)
        layers, magnitude = data.randaugment_layers, data.randaugment_magnitude
        return train_batches(
            self.train_set,
            transform,
            batch_size=self.run.optim.batch_size,
            seed=self.run.seed,
            start_step=start_step,
            stop_step=stop_step,
            workers=self.workers if workers is None else workers,
            channels=self.info.in_channels,
            min_px=transform.min_px,
            mixing=Mixing(data.mixup, data.cutmix, data.mix_pairs) if data.mixup or data.cutmix else None,
            augment=RandAugment(layers, magnitude, data.randaugment_style) if layers else None,
            pin_memory=self.device.type == "cuda",
        )

    def loss(self, batch: Batch) -> Tensor:
        images = prepare(batch.images, self.info.mean, self.info.std, self.device)
        with autocast(self.device, self.run.precision):
            logits = self.model(images)
        logits = logits.float()
        if self.log_priors is not None:  # logit adjustment: Menon et al. 2020, arXiv 2007.07314
            logits = logits + self.log_priors
        return smoothed_cross_entropy(logits, batch, self.run.optim.label_smoothing)

    def part(self, batch: Batch, start: int, stop: int) -> Batch:
        fields = {name: field[start:stop] for name, field in batch._asdict().items() if isinstance(field, Tensor)}
        return batch._replace(**fields)

    def notices(self, batch: Batch) -> list[str]:
        new = self._new(batch.unreadable)
        self._unreadable += len(new)
        allowed = self.run.data.max_unreadable * len(self.train_set)
        if self._unreadable > allowed:
            raise InputError(
                f"{self._unreadable} of {len(self.train_set)} training images cannot be read, more than "
                f"--max-unreadable {self.run.data.max_unreadable:g} allows; the last was {batch.unreadable[-1]}"
            )
        return new

    def evaluate(self, show: Callable[[int, int], None]) -> dict[str, float]:
        workers = pick_workers(self.run.machine.workers, self.validation_set)
        accuracy = evaluate_images(
            self.model, self.info, self.validation_set, self.device, workers, self.run.precision, show
        )
        self._last = accuracy
        for line in self._new(accuracy.unreadable):
            print(f"warning: not counted: {line}", file=sys.stderr)
        figures = {"top1": accuracy.top1_percent}
        figures |= {"top5": accuracy.top5_percent} if self.info.num_classes > 5 else {}
        figures |= {"balanced": accuracy.balanced_percent} if self.run.optim.balance else {}
        figures |= {"loss": accuracy.loss}
        return figures | ({"unreadable": len(accuracy.unreadable)} if accuracy.unreadable else {})

    def _new(self, lines: Iterable[str]) -> list[str]:
        """Those that have not been said before."""
        new = [line for line in lines if line not in self._said]
        self._said.update(new)
        return new

    def report(self) -> dict[str, dict[str, int]]:
        """Of each class, how many images the last evaluation had, got right, and took for it."""
        scores = self._last.scores(self.info.class_names) if self._last else []
        return {s.name: {"images": s.images, "right": s.right, "predicted": s.predicted} for s in scores}

    def state_dict(self) -> dict[str, Any]:
        """Which images were reported, so that a resumed run does not report and count them again."""
        return {"said": sorted(self._said), "unreadable": self._unreadable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._said, self._unreadable = set(state["said"]), state["unreadable"]

    def save(self, path: Path) -> None:
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


def pick_workers(workers: int | None, images: LabelledImages) -> int:
    """Reading processes: none for images that are in memory, else a core is left for the network."""
    if workers is not None:
        return workers
    return 0 if images.in_memory else min(8, max(1, (os.cpu_count() or 2) - 1))


def evaluate_images(
    model: Network,
    info: ModelInfo,
    images: LabelledImages,
    device: torch.device,
    workers: int,
    precision: str = "float32",
    show: Callable[[int, int], None] = lambda seen, total: None,
) -> Accuracy:
    """Accuracy of `model` on `images`, prepared as `info` says; `show(seen, total)` is told of the progress."""

    def batches() -> Iterator[Batch]:
        for i, batch in enumerate(batches_for(info, images, EVAL_BATCH, workers, device.type == "cuda"), 1):
            yield batch
            show(min(i * EVAL_BATCH, len(images)), len(images))

    return evaluate(model, batches(), info.num_classes, info.mean, info.std, device, precision)


def choose_recipe(name: str | None, given: Given) -> tuple[RunConfig, tuple[Reason, ...]]:
    """The run for the options that are `given`, by name, the rest chosen or by the recipe called `name`; and why."""
    if name is not None and name not in RECIPES:
        raise InputError(f"no recipe {name!r}{nearest(name, RECIPES)}; known: {', '.join(RECIPES)}")
    loose = {"epochs": math.inf, "warmup_epochs": 0.0, "lr": max(0.1, given.get("final_lr", 0.0)), "mixup": 0.2}
    said = with_options(RunConfig(), loose | dict(given))  # what is not chosen yet contradicts nothing
    validate(said)
    path, device = said.data.path, pick_device(said.machine.device)
    base, asked = _starting_point(name, path, said.model, given)
    images, validation = open_dataset(path, validation_fraction=said.data.validation_fraction, seed=said.seed)
    if "validation_fraction" in given and has_validation(path):
        raise InputError(f"{spell('validation_fraction', given['validation_fraction'])}: {path} has validation images")
    counts = Counter(images.targets).values()
    seen = Images(len(images), images.class_names, *look_at(images), max(counts) / min(counts), len(validation))

    @functools.cache
    def model(config: ModelConfig) -> Network:
        with torch.random.fork_rng(devices=[]):
            return network(config, images.class_names)[0].to(device).train()

    def of_run(measure: Callable[..., float]) -> Callable[..., float]:
        return lambda run, *more: measure(model(run.model), run, *more)

    speed = of_run(images_per_second) if device.type == "cpu" and name is None else None
    machine = Machine(device.type, memory_gib(device), speed, of_run(image_mib))
    return choose(given, seen, machine, asked, base)


def _starting_point(
    name: str | None, path: str, model: ModelConfig, given: Given
) -> tuple[RunConfig | None, Asked | None]:
    """The recipe called `name`, or that a packaged set has; and the network of --model or --init, if no recipe's."""
    if name is not None:
        run = RECIPES[name](path)
        if given.get("model", run.model.model) != run.model.model:
            what = f"--recipe {name} is for {run.model.model}, not {given['model']}"
            raise InputError(f"{what}: take the recipe of that name, or leave out --recipe")
        if given.keys() & {"train_px", "eval_px"}:  # one side follows the other, so they must be known
            own = find_variant(run.model.model)
            px = {"train_px": run.data.train_px or own.train_px, "eval_px": run.data.eval_px or own.eval_px}
            run = with_options(run, px)
        return run, None
    base = RECIPES[path](path) if path in DATASET_NAMES and path in RECIPES else None
    if model.init is not None:
        info = read_any(model.init, given.get("model"), model.overrides()).info
        if given.get("model", info.architecture) != info.architecture:
            raise InputError(f"{model.init} holds weights of {info.architecture}, not of {model.model}")
        return base, Asked(info.architecture, info.train_px, info.eval_px, info.in_channels)
    own = find_variant(model.model)
    return base, Asked(model.model, own.train_px, own.eval_px) if "model" in given else None


def network(m: ModelConfig, class_names: Sequence[str]) -> tuple[Network, tuple[str, ...]]:
    """The network, its layers frozen as `m` says, on the CPU, and what is to be said of its weights."""
    notes = ()
    if m.init is None:
        model = create_model(m.model, len(class_names), m.in_channels, **m.overrides())
    else:
        model, notes = from_weights(m.model, len(class_names), m.in_channels, m.init, m.overrides(), class_names)
    if m.freeze:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return model.to(memory_format=torch.channels_last), notes


def image_mib(model: Network, run: RunConfig) -> float:
    """MiB that one more image keeps for the backward pass."""
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
            outputs = model(images[:count])  # which keep the tensors, so that no address comes twice
        del outputs
        return sum(sizes.values())

    return max(kept(3) - kept(2), 1) / 2**20


def images_per_second(model: Network, run: RunConfig, enough: float) -> float:
    """Of how many images the gradients are computed in a second on a CPU; measured in twenty seconds.

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
        return count / (time.monotonic() - began) / _passes(run.optim)

    library()  # compiled before anything is timed
    measured(1)  # memory is found
    speed = measured(1)
    if speed > 2 * enough:
        return speed
    print("measuring, for twenty seconds, how many epochs this machine has time for ...", file=sys.stderr)
    return measured(18)


def _passes(optim: OptimConfig) -> float:
    """Passes of a batch through the network for one step."""
    return 1 + optim.sam_fraction * bool(optim.sam_rho)


def _noise(model: Network, run: RunConfig, count: int) -> Tensor:
    """(count, C, H, W), of the training images' size, on the model's device; torch's generator stays as it is."""
    px = run.data.train_px or find_variant(run.model.model).train_px
    images = torch.randn(count, run.model.in_channels, px, px, generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters()).device, memory_format=torch.channels_last)


def build(run: RunConfig) -> tuple[Classification, SGD_AGC, EMA, Plan]:
    """Everything that the loop needs, from the configuration alone."""
    validate(run)
    if run.machine.wandb is not None:
        wandb_init()
    device = pick_device(run.machine.device)
    train_set, validation_set = open_dataset(
        run.data.path, validation_fraction=run.data.validation_fraction, seed=run.seed
    )
    o = run.optim
    if o.batch_size > len(train_set):
        raise InputError(f"--batch-size {o.batch_size} is more than the {len(train_set)} training images")
    torch.manual_seed(run.seed)
    model, notes = network(run.model, train_set.class_names)
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
    log_priors = _log_priors(train_set, o.balance, device)
    if device.type == "cpu" and run.machine.workers is None:  # processes that read would take cores from the network
        if fits_in_memory(train_set):
            train_set = cached(train_set, info.in_channels, train_transform(run.data, info).min_px)
        if fits_in_memory(validation_set):
            validation_set = cached(validation_set, info.in_channels, eval_transform(info).min_px)
    _check_readable(validation_set, info.in_channels)
    task = Classification(model, info, train_set, validation_set, run, device, log_priors, data, notes)

    optimizer = SGD_AGC(param_groups(model, o.weight_decay, o.clipping), lr=0.0, momentum=o.momentum, eps=o.clip_eps)
    steps_per_epoch = len(train_set) / o.batch_size
    total_steps = o.steps or max(1, round(o.epochs * steps_per_epoch))
    warmup_steps = o.warmup_epochs * steps_per_epoch if o.warmup_steps is None else o.warmup_steps
    if warmup_steps >= total_steps:
        raise InputError(
            f"the warm-up takes {warmup_steps:g} of {total_steps} steps; --warmup-steps or --warmup-epochs"
        )

    def lr_at(step: int) -> float:
        return warmup_cosine(
            step, peak_lr=o.lr, total_steps=total_steps, warmup_steps=warmup_steps, final_lr=o.final_lr
        )

    plan = Plan(
        total_steps,
        eval_steps(total_steps, steps_per_epoch, run.machine.eval_every),
        o.batch_size,
        steps_per_epoch,
        lr_at,
        metric="balanced" if o.balance else "top1",
        micro_batch=o.micro_batch,
        sam_rho=o.sam_rho,
        sam_fraction=o.sam_fraction,
    )
    return task, optimizer, EMA(model, o.ema_decay), plan


def _check_readable(validation_set: LabelledImages, channels: int) -> None:
    """InputError unless there is an image to validate on: a run without would end with an accuracy of 0 %."""
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
    """balance * log(share of each class), (K,); None without balance."""
    if not balance:
        return None
    counts = torch.bincount(torch.tensor(images.targets), minlength=len(images.class_names))
    return balance * (counts.clamp(min=1) / len(images)).log().to(device)


def start(run: RunConfig, folder: Path | None, chosen: Sequence[str] = ()) -> Outcome:
    """Trains in a new run folder. Everything that can be wrong is found before the folder is made.

    `folder`: None takes the next free one of runs/DATA-MODEL-1, -2 ...; `Outcome.folder` is the one taken.
    `chosen`: lines that say why options are what they are, where the user has not said so.
    """
    if folder is not None:
        check_free(folder)
    task, optimizer, ema, plan = build(run)
    if folder is None:
        name = re.sub(r"[^\w.-]+", "-", Path(run.data.path).resolve().name).strip("-")  # {000..099}.tar, NAME?label=x
        folder = numbered_run_folder(Path("runs") / f"{name}-{run.model.model}")
    else:
        new_run_folder(folder)
    save_config(run, folder / "config.json")
    _save_data(task, folder)
    try:
        return _train(task, optimizer, ema, plan, folder, chosen)
    except InputError:
        if not (folder / "checkpoints").exists():  # nothing has come of it, and the name is wanted again
            shutil.rmtree(folder)
        raise


def resume(folder: Path, run: RunConfig | None = None) -> Outcome:
    """Goes on with a run from its newest whole checkpoint. `run` may differ from the saved one in `machine` only."""
    saved = load_config(folder / "config.json")
    run = run or saved
    if replace(run, machine=saved.machine) != saved:
        raise InputError(_how_else(folder, saved, run))
    task, optimizer, ema, plan = build(run)
    if (folder / DATA).exists():
        difference = changed(_read_data(folder)["images"], task.data["images"])
        if difference:
            raise InputError(
                f"--resume {quoted(folder)}: the images of {run.data.path} are not those that the run was "
                f"begun with: {difference}. Put them back, or start a new run"
            )
    else:  # of a run that was begun by version 0.1
        print(f"warning: {folder} does not say which images it was begun with", file=sys.stderr)
        _save_data(task, folder)
    return _train(task, optimizer, ema, plan, folder, resume=True)


def _save_data(task: Classification, folder: Path) -> None:
    (folder / DATA).write_text(json.dumps(task.data, indent=1) + "\n")


def _read_data(folder: Path) -> dict[str, Any]:
    """What the run in `folder` was begun with; InputError where that is no such file."""
    try:
        data = json.loads((folder / DATA).read_text())
        return {"held_out": data["held_out"], "images": data["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / DATA} cannot be used ({error})") from None


def _how_else(folder: Path, saved: RunConfig, run: RunConfig) -> str:
    """Why `run` is no way to go on with the run in `folder`, and what is."""
    before, machine = options_of(saved), options_of(saved.machine)
    other = {name: v for name, v in options_of(run).items() if v != before[name] and name not in machine}
    options = " ".join(spell(name, value) for name, value in other.items() if name != "path")
    weights = next((w for w in ("last", "best") if (folder / f"{w}.safetensors").is_file()), None)
    finish = "" if weights == "last" else f"normfree train --resume {quoted(folder)}, then "
    init = spell("init", str(folder / f"{weights or 'last'}.safetensors"))
    return (
        f"--resume goes on with {folder} as it was configured; only the machine options may change. To train with "
        f"other ones from its weights on: {finish}"
        f"normfree train {quoted(run.data.path)} {init} {options}".rstrip()
    )


def _train(
    task: Classification,
    optimizer: SGD_AGC,
    ema: EMA,
    plan: Plan,
    folder: Path,
    chosen: Sequence[str] = (),
    resume: bool = False,
) -> Outcome:
    """The run, with what it is about to do before it and its classes after it, on standard error."""
    print(*(f"chosen   {line}" for line in chosen), describe(task, plan, folder), sep="\n", file=sys.stderr)
    if not resume:  # its weights are its checkpoint's
        print(*(f"init     {line}\n" for line in task.notes), sep="", end="", file=sys.stderr)
        print(f"time     about {duration(estimated_seconds(task, plan))}", file=sys.stderr)
    with working_in(folder):
        outcome = train(task, optimizer, ema, plan, task.run.machine, folder, task.run.seed, resume)
    if outcome.report:
        scores = [ClassScore(name, **counts) for name, counts in outcome.report.items()]
        print(*score_table(scores, most=10), sep="\n", file=sys.stderr)
    return outcome


def estimated_seconds(task: Classification, plan: Plan) -> float:
    """How long the run will take, from its first batches, read and passed through the network; this changes nothing."""
    library()  # compiled before anything is timed
    first, batch = _seconds_to_read(task, plan)
    again, _ = _seconds_to_read(task, plan)  # of images that are kept in memory, without decoding them
    size, workers = plan.micro_batch or plan.batch_size, max(task.workers, 1)
    task.model.eval()  # batch normalization and random numbers stay as they are
    passes: list[float] = []
    while len(passes) < 4 or (sum(passes) < 2 and len(passes) < 20):
        began = time.monotonic()
        task.loss(task.part(batch, 0, size)).backward()
        task.model.zero_grad(set_to_none=True)
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
        passes.append(time.monotonic() - began)
    network = statistics.mean(passes[2:]) * plan.batch_size / size  # the first ones find memory

    def spent(batches: float, new: float, network: float) -> float:
        """Seconds for so many batches, of which the first `new` hold images that have not been read before."""
        reading = min(batches, new) * first + max(batches - new, 0) * again
        return max(batches * network, reading / workers) if task.workers else batches * network + reading

    parameters = sum(p.numel() for p in task.model.parameters())
    update = 0.002 + 0.7e-9 * parameters  # AGC, SGD and EMA, on two cores (docs/speed.md)
    seconds = spent(plan.total_steps, plan.steps_per_epoch, network * _passes(task.run.optim) + update)
    validation = len(task.validation_set) / plan.batch_size
    forward = network / 3 * (task.info.eval_px / task.info.train_px) ** 2
    seconds += spent(2 * validation * len(plan.eval_steps), validation, forward)
    return seconds + len(plan.eval_steps) * (0.2 + 12 * parameters / 2e8)  # checkpoints of three copies, by a disk


def _seconds_to_read(task: Classification, plan: Plan) -> tuple[float, Batch]:
    """For one of the first batches, the quickest, and one of them."""
    batches = task.batches(0, min(3, plan.total_steps), workers=0)
    began = time.monotonic()
    batch, seconds = next(batches), [time.monotonic() - began]
    while len(seconds) < min(3, plan.total_steps) and sum(seconds) < 2:
        began = time.monotonic()
        batch = next(batches)
        seconds.append(time.monotonic() - began)
    return min(seconds), batch


def describe(task: Classification, plan: Plan, folder: Path) -> str:
    """What is about to happen, in three lines."""
    info, run = task.info, task.run
    epochs = plan.total_steps / plan.steps_per_epoch
    millions = sum(p.numel() for p in task.model.parameters()) / 1e6
    return (
        f"data     {run.data.path}: {len(task.train_set)} training and {len(task.validation_set)} validation images, "
        f"{info.num_classes} classes\n"
        + "".join(f"note     {line}\n" for line in task.train_set.notes)
        + f"network  {info.architecture}, {millions:.1f} M parameters, {info.train_px} px in training and "
        f"{info.eval_px} px in evaluation, {run.precision} on {task.device}\n"
        f"run      {epochs:.3g} epochs = {plan.total_steps} steps of {plan.batch_size} images, into {folder}"
    )


def evaluation_command(run: RunConfig, weights: Path) -> str:
    """The command that evaluates on the images that `run` did not train on."""
    data = run.data
    held_out = _read_data(weights.parent)["held_out"]
    own = f" --held-out {data.validation_fraction:g} --seed {run.seed}" if held_out else ""
    return f"normfree eval {quoted(weights)} {quoted(data.path)}{own}"


def evaluate_weights(
    weights: str,
    data: str,
    px: int | None = None,
    held_out: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | None = None,
) -> tuple[Accuracy, ModelInfo]:
    """Accuracy of a weight file on a folder or packaged set, at `px` pixels (default: the file's).

    `held_out` and `seed` (default: 0) are those of a training that held images out itself: just these are taken.
    `out`: a new file, .json or .csv, for the whole report (`engine.evaluate.write_report`). Raises InputError.
    """
    check_range("px", px, 8, MAX_PX)
    check_range("workers", workers, 0, MAX_WORKERS)
    check_range("seed", seed, 0, MAX_SEED)
    if seed is not None and held_out is None:
        raise InputError(f"--seed {seed} says which images were held out; add --held-out with their share")
    check_writable(out, endings=(".json", ".csv"))
    where = pick_device(device)
    model = load(weights).float()
    assert model.info is not None
    info = replace(model.info, eval_px=px or model.info.eval_px)
    if not info.class_names:
        raise InputError(f"{weights} has no class names, so the classes of {data} cannot be matched to its outputs")
    images = open_evaluation(data, info.class_names, held_out=held_out, seed=seed or 0)
    for note in images.notes:
        print(f"warning: {data}: {note}", file=sys.stderr)
    if seen := count_sampled(images, info.trained_on):
        what = f"images that the weights were trained on are among these ({seen} of {len(info.trained_on)} looked for)"
        print(f"warning: {what}; see --held-out", file=sys.stderr)
    model = model.to(where).to(memory_format=torch.channels_last)
    began = time.monotonic()
    with progress("evaluate") as show:
        accuracy = evaluate_images(model, info, images, where, pick_workers(workers, images), show=show)
    if accuracy.num_images == 0:
        raise InputError(f"none of the {len(images)} images of {data} can be read; the first: {accuracy.unreadable[0]}")
    if out is not None:
        crop = {"px": info.eval_px, "crop": info.eval_crop, "crop_fraction": info.crop_fraction}
        machine = {"precision": "float32", "device": str(where), "seconds": round(time.monotonic() - began, 3)}
        report = {"weights": weights, "data": data, "held_out": held_out, "seed": seed}
        report |= accuracy.report(info.class_names) | {"architecture": info.architecture} | crop | machine
        report |= {"versions": {"normfree": package_version(), "torch": torch.__version__}}
        with replacing(out) as temporary:
            write_report(report, temporary, Path(out).suffix)
    return accuracy, info
