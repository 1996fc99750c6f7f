"""Image classification: what a `RunConfig` means, and the verbs `train` and `eval`."""

from __future__ import annotations

import json
import os
import shutil
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
    InputError,
    RunConfig,
    check_range,
    check_writable,
    load_config,
    nearest,
    quoted,
    save_config,
    validate,
)
from normfree.data import (
    DATASET_NAMES,
    Batch,
    EvalTransform,
    ImageSet,
    Mixing,
    RandAugment,
    TrainTransform,
    cached,
    changed,
    content_sample,
    count_sampled,
    eval_batches,
    fits_in_memory,
    has_validation,
    inventory,
    look_at,
    open_dataset,
    open_evaluation,
    train_batches,
)
from normfree.engine.checkpoint import check_free, new_run_folder, working_in
from normfree.engine.distributed import memory_gib, pick_device
from normfree.engine.evaluate import Accuracy, autocast, class_table, evaluate, prepare, write_report
from normfree.engine.log import ProgressBar, duration, wandb_init
from normfree.engine.loop import Outcome, Plan, eval_steps, train
from normfree.models import Network, create_model, from_weights, load, save
from normfree.optim import EMA, SGD_AGC, param_groups, warmup_cosine
from normfree.recipes import RECIPES
from normfree.recipes.small import Images, Machine, Reason, choose, fast_enough, shorten
from normfree.weights import ModelInfo
from normfree.weights.file import package_version, replacing

EVAL_BATCH = 64
DATA = "data.json"  # of a run folder: which images it was begun with


@dataclass
class Classification:
    """The loop's task: images and labels, cross-entropy with label smoothing; plain cross-entropy and accuracy."""

    model: Network
    info: ModelInfo
    train_set: ImageSet
    validation_set: ImageSet
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
        """Of each class, how many images the last evaluation got right, and of how many."""
        rows = self._last.per_class(self.info.class_names) if self._last else []
        return {name: {"right": right, "images": images} for name, right, images in rows}

    def state_dict(self) -> dict[str, Any]:
        """Which images were reported, so that a resumed run does not report and count them again."""
        return {"said": sorted(self._said), "unreadable": self._unreadable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._said, self._unreadable = set(state["said"]), state["unreadable"]

    def save(self, path: Path) -> None:
        save(self.model, path, self.info)


def train_transform(data: DataConfig, info: ModelInfo) -> TrainTransform:
    return TrainTransform(info.train_px, data.min_area, flip=data.flip, style=data.crop_style)


def eval_transform(info: ModelInfo) -> EvalTransform:
    return EvalTransform(info.eval_px, info.eval_crop, info.crop_fraction)


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


def pick_workers(workers: int | None, images: ImageSet) -> int:
    """Reading processes: none for images that are in memory, else a core is left for the network."""
    if workers is not None:
        return workers
    return 0 if images.in_memory else min(8, max(1, (os.cpu_count() or 2) - 1))


def evaluate_images(
    model: Network,
    info: ModelInfo,
    images: ImageSet,
    device: torch.device,
    workers: int,
    precision: str = "float32",
    show: Callable[[int, int], None] = lambda seen, total: None,
) -> Accuracy:
    """Accuracy of `model` on `images`, prepared as `info` says; `show(seen, total)` is told of the progress."""
    transform = eval_transform(info)
    batches = eval_batches(
        images,
        transform,
        batch_size=EVAL_BATCH,
        workers=workers,
        channels=info.in_channels,
        min_px=transform.min_px,
        pin_memory=device.type == "cuda",
    )

    def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
        for i, batch in enumerate(batches, 1):
            yield batch
            show(min(i * EVAL_BATCH, len(images)), len(images))

    return evaluate(model, counted(batches), info.num_classes, info.mean, info.std, device, precision)


def choose_recipe(name: str | None, run: RunConfig) -> tuple[RunConfig, tuple[Reason, ...]]:
    """The recipe called `name`, or what suits the images of `run` and the machine, and why."""
    path = run.data.path
    if name is not None and name not in RECIPES:
        raise InputError(f"no recipe {name!r}{nearest(name, RECIPES)}; known: {', '.join(RECIPES)}")
    if name is None and path in DATASET_NAMES and path in RECIPES:  # a packaged set has a recipe of its own name
        name = path
    if name is not None:
        return RECIPES[name](path), ()
    images, _ = open_dataset(path, validation_fraction=run.data.validation_fraction, seed=run.seed)
    counts = Counter(images.targets)
    short_px, grey = look_at(images)
    seen = Images(len(images), images.class_names, short_px, grey, max(counts.values()) / min(counts.values()))
    device = pick_device(run.machine.device)
    chosen, reasons = choose(path, seen, Machine(device.type, memory_gib(device)))
    if device.type == "cpu" and seen.are_small:
        speed = images_per_second(chosen, len(images.class_names), fast_enough(chosen, seen))
        return shorten(chosen, reasons, seen, speed)
    return chosen, reasons


def images_per_second(run: RunConfig, num_classes: int, enough: float) -> float:
    """Of how many images the gradients are computed in a second on a CPU; measured in twenty seconds.

    In two, if these say more than twice `enough`. The mean, so that what other programs take counts.
    """
    m, px = run.model, run.data.train_px
    assert px is not None
    with torch.random.fork_rng(devices=[]):
        model = create_model(m.model, num_classes, m.in_channels, **m.overrides()).to(memory_format=torch.channels_last)
        images = torch.randn(run.optim.batch_size, m.in_channels, px, px).to(memory_format=torch.channels_last)

    def measured(seconds: float) -> float:
        began, count = time.monotonic(), 0
        while time.monotonic() < began + seconds or not count:
            model(images).sum().backward()
            count += len(images)
        return count / (time.monotonic() - began)

    measured(1)  # kernels are compiled, memory is found
    speed = measured(1)
    if speed > 2 * enough:
        return speed
    print("measuring, for twenty seconds, how many epochs this machine has time for ...", file=sys.stderr)
    return measured(18)


def build(run: RunConfig) -> tuple[Classification, SGD_AGC, EMA, Plan]:
    """Everything that the loop needs, from the configuration alone."""
    validate(run)
    if run.machine.wandb is not None:
        wandb_init()
    device = pick_device(run.machine.device)
    train_set, validation_set = open_dataset(
        run.data.path, validation_fraction=run.data.validation_fraction, seed=run.seed
    )
    m, o = run.model, run.optim
    if o.batch_size > len(train_set):
        raise InputError(f"--batch-size {o.batch_size} is more than the {len(train_set)} training images")
    torch.manual_seed(run.seed)
    num_classes = len(train_set.class_names)
    if m.init is None:
        model, notes = create_model(m.model, num_classes, m.in_channels, **m.overrides()), ()
    else:
        model, notes = from_weights(m.model, num_classes, m.in_channels, m.init, m.overrides(), train_set.class_names)
    assert model.info is not None
    if m.freeze:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
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
    model = model.to(device).to(memory_format=torch.channels_last)
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


def _log_priors(images: ImageSet, balance: float, device: torch.device) -> Tensor | None:
    """balance * log(share of each class), (K,); None without balance."""
    if not balance:
        return None
    counts = torch.bincount(torch.tensor(images.targets), minlength=len(images.class_names))
    return balance * (counts.clamp(min=1) / len(images)).log().to(device)


def start(run: RunConfig, folder: Path, chosen: Sequence[str] = ()) -> Outcome:
    """Trains in a new run folder. Everything that can be wrong is found before the folder is made.

    `chosen`: lines that say why options are what they are, where the user has not said so.
    """
    check_free(folder)
    task, optimizer, ema, plan = build(run)
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
        raise InputError(f"--resume goes on with {folder} as it was configured; only the machine options may change")
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
    for line in class_table(outcome.report):
        print(line, file=sys.stderr)
    return outcome


def estimated_seconds(task: Classification, plan: Plan) -> float:
    """How long the run will take, from three passes of a first batch through the network, which change nothing."""
    began = time.monotonic()
    batch = next(task.batches(0, 1, workers=0))
    reading = time.monotonic() - began
    size, workers = plan.micro_batch or plan.batch_size, task.workers
    task.model.eval()  # batch normalization and random numbers stay as they are
    seconds = 0.0
    for _ in range(3):  # of which the first two are for kernels to be compiled and memory to be found
        began = time.monotonic()
        task.loss(task.part(batch, 0, size)).backward()
        task.model.zero_grad(set_to_none=True)
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
        seconds = (time.monotonic() - began) * plan.batch_size / size
    step = max(seconds, reading / workers) if workers else seconds + reading
    evaluations = len(plan.eval_steps) * 2 * len(task.validation_set) / plan.batch_size
    return step * (plan.total_steps * (1 + bool(plan.sam_rho) * plan.sam_fraction) + evaluations / 3)


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
    if out is not None:
        if Path(out).suffix not in (".json", ".csv"):
            raise InputError(f"--out {out}: the name must end in .json or .csv")
        check_writable(out)
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
    bar = ProgressBar("evaluate", len(images), unit="images")
    began = time.monotonic()
    try:
        accuracy = evaluate_images(
            model, info, images, where, pick_workers(workers, images), show=lambda n, _: bar.update(n)
        )
    finally:
        bar.close()
    if accuracy.num_images == 0:
        raise InputError(f"none of the {len(images)} images of {data} can be read; the first: {accuracy.unreadable[0]}")
    if out is not None:
        report = {"weights": weights, "data": data, "held_out": held_out, "seed": seed}
        report |= accuracy.report(info.class_names)
        report |= {"architecture": info.architecture, "px": info.eval_px, "crop": info.eval_crop}
        report |= {"crop_fraction": info.crop_fraction, "precision": "float32", "device": str(where)}
        report |= {"seconds": round(time.monotonic() - began, 3)}
        report |= {"versions": {"normfree": package_version(), "torch": torch.__version__}}
        with replacing(out) as temporary:
            write_report(report, temporary, Path(out).suffix)
    return accuracy, info
