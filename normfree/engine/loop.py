"""The only training loop, for every task."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from normfree._compat import stored_values
from normfree.engine.checkpoint import DamagedCheckpoint, load_checkpoint, newest_whole, save_checkpoint
from normfree.engine.log import ProgressBar, RunLog, environment
from normfree.engine.update import Update
from normfree.errors import InputError
from normfree.layers import reuse_weights
from normfree.optim import EMA, SAM, ascent_size
from normfree.optim.agc import local

WINDOW = 100  # steps, of which `Plan.max_skipped` may be skipped


class Diverged(RuntimeError):
    """A loss, gradient or weight is not finite: `what`, in step `step`, counted from 1, at learning rate `lr`.

    `skipped`: how many of the last `WINDOW` steps, with this one, were not finite, where such steps are skipped.
    """

    def __init__(self, what: str, step: int, lr: float, skipped: int = 0):
        often = f", as {skipped - 1} of the {WINDOW - 1} steps before, which were skipped" if skipped else ""
        super().__init__(f"step {step}: {what} is not finite at learning rate {lr:.3g}{often}")
        self.what, self.step, self.lr, self.skipped = what, step, lr, skipped


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived; the work so far is kept. `exit_code`: 128 + the signal number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Shard:
    """The part of every batch that this process computes: number `rank` of `size` parts."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Evaluation:
    """`figures`: numbers by name, one of which is the task's `metric`; `details`: anything else, as JSON.

    `pictures`: functions that draw RGB images to be looked at, by name.
    """

    figures: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Callable[[], Image]] = field(default_factory=dict)


class Task(Protocol):
    """What the loop needs from a task.

    Attributes:
        model: the bare network, for names, the average and saving.
        metric: the figure of `evaluate` that decides which weights are best; larger is better.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def metric(self) -> str: ...

    def batches(self, steps: range, shard: Shard) -> Iterator[Any]:
        """This rank's part of the batches of `steps`; the whole batch is the same for any number of ranks.

        A batch may have `unreadable`: lines about samples that could not be read, for the log.
        """
        ...

    def split(self, batch: Any, size: int) -> list[tuple[Any, float]]:
        """Micro-batches of `size` samples, the last one may be smaller, with their weights, which sum to 1."""
        ...

    def loss(self, forward: Callable[..., Any], batch: Any) -> dict[str, Tensor]:
        """ "loss", the mean over the samples as a float32 scalar, and its parts by name.

        `forward`: the model, possibly wrapped or compiled.
        """
        ...

    def evaluate(self, forward: Callable[..., Any], shard: Shard, show: Callable[[int, int], None]) -> Evaluation:
        """Evaluates the current weights, exactly for any number of ranks; `show(done, total)` reports progress."""
        ...

    def group_of(self, name: str) -> str:
        """The row of the AGC log that a parameter belongs to."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state of the task that must survive a kill, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save(self, path: Path) -> None:
        """Writes a weight file with the current weights."""
        ...


@dataclass(frozen=True)
class Plan:
    """The length of a run, its learning rate, and the intervals of everything else. Steps count from 0.

    Attributes:
        eval_steps: numbers of steps after which the model is evaluated.
        batch_size: samples in a step, over all ranks.
        lr_at: learning rate of a step's update.
        micro_batch: samples that go through the network at once; None: the whole batch.
        sam_rho: radius of sharpness-aware minimization; 0: without.
        log_every: steps between lines of the log.
        check_every: steps between looks at the device for what is not finite; None: 1 on a CPU, else `log_every`.
        max_skipped: steps of any `WINDOW` that may be skipped since they are not finite; 0: the first one ends the run.
        checkpoint_seconds: between checkpoints; one is also written at every evaluation and after a signal.
        keep_checkpoints: how many of the newest stay on disk.
        wandb: project of Weights & Biases for the figures; None: without.
        unit: what samples are called in the log.
    """

    total_steps: int
    eval_steps: frozenset[int]
    batch_size: int
    steps_per_epoch: float
    lr_at: Callable[[int], float]
    micro_batch: int | None = None
    sam_rho: float = 0.0
    sam_fraction: float = 0.2
    log_every: int = 10
    check_every: int | None = None
    max_skipped: int = 0
    checkpoint_seconds: float = 300.0
    keep_checkpoints: int = 2
    wandb: str | None = None
    unit: str = "images"


@dataclass
class Outcome:
    """The result of a run: figures and details of the last evaluation, the best metric and its epoch."""

    last: dict[str, float]
    best: float
    best_epoch: float
    seconds: float
    details: dict[str, Any]
    folder: Path


def train(task: Task, update: Update, plan: Plan, folder: Path, seed: int, resume: bool = False) -> Outcome:
    """Trains `task` to the end of `plan` and leaves best.safetensors, last.safetensors and checkpoints in `folder`.

    Randomness inside a step follows from (seed, step) alone, so that a resumed run takes the same steps.

    Raises:
        Diverged: loss or gradients are not finite, in more steps than may be skipped. Such a step is never made; the
            newest checkpoint is from before.
        Interrupted: after a signal, with a checkpoint of the step it came in.
    """
    model, ema, shard = task.model, update.ema, Shard()
    device = next(model.parameters()).device
    checkpoints = folder / "checkpoints"

    # --- start or resume ---
    extra: dict[str, Any] = {"best": -math.inf, "best_epoch": 0.0, "seconds": 0.0, "last": {}, "report": {}, "task": {}}
    extra["skipped"] = []  # of the last steps, counted from 0
    start, damaged = 0, []
    if resume:
        start, extra, damaged = _restore(checkpoints, update.tensors(), extra)
        if extra["task"]:
            task.load_state_dict(extra["task"])
    log = RunLog(folder, start, plan.wandb)
    bar = ProgressBar("train", plan.total_steps, start)
    for line in damaged:
        bar.say(f"warning: {line}")
    _announce(bar, log, plan, start, environment(device), resume)
    seconds_before, began = extra["seconds"], time.monotonic()
    last_checkpoint, last_log, last_log_step, done = began, began, start, start

    def checkpoint(step: int) -> None:
        nonlocal last_checkpoint
        bar.update(step, "writing a checkpoint")
        extra["seconds"] = seconds_before + time.monotonic() - began
        extra["task"] = task.state_dict()
        save_checkpoint(checkpoints, step, update.tensors(), extra, plan.keep_checkpoints)
        last_checkpoint = time.monotonic()
        bar.update(step, "")

    def check_finite(step: int = -1, batch: Any = None) -> None:
        """Waits for the device. `step`: the last one, with its `batch`, if the weights are still those before it."""

        def repeat(bad: int, what: str) -> str:
            again = batch if bad == step else next(task.batches(range(bad, bad + 1), shard))
            return _blame(task, update, sam, plan, again, seed, bad, what)

        _report_held(watch.found(), step, repeat, plan, extra["skipped"], log, bar)

    # --- the steps ---
    wait = _Wait()
    sam = SAM(update.optimizer, plan.sam_rho)
    check_every = plan.check_every or (1 if device.type == "cpu" else plan.log_every)
    watch = _Watch(model, one_by_one=plan.max_skipped > 0)
    model.train()
    with Signals() as signals:
        try:
            for step, batch in enumerate(wait.over(task.batches(range(start, plan.total_steps), shard)), start):
                lr = plan.lr_at(step)
                log_now = (step + 1) % plan.log_every == 0 or step + 1 in plan.eval_steps
                check = log_now or (step + 1) % check_every == 0  # waits for the device; nothing is saved without it
                losses = _gradients(task, update, sam, plan, batch, seed, step)
                held = watch.see(step, losses["loss"], update.names)
                if check:
                    check_finite(step, batch)
                watch.restore()
                update.step(step, lr, held)
                done = step + 1

                for line in getattr(batch, "unreadable", ()):
                    log.write("unreadable", done, name=line)
                    bar.say(f"warning: {line}")
                if log_now:
                    now = time.monotonic()
                    elapsed = max(now - last_log, 1e-9)
                    speed = (done - last_log_step) * plan.batch_size / elapsed
                    last_log, last_log_step = now, done
                    log.write(
                        "train",
                        done,
                        epoch=round(done / plan.steps_per_epoch, 4),
                        **{name: value.item() for name, value in losses.items()},
                        lr=lr,
                        **{f"{plan.unit}_per_s": round(speed, 2)},
                        data_wait=round(wait.restart() / elapsed, 4),
                        memory_mib=peak_memory_mib(device),
                        **update.figures(task.group_of),
                    )
                    bar.update(done, f"loss {losses['loss'].item():.3f}  {speed:.0f} {plan.unit}/s")
                else:
                    bar.update(done)

                due = check and time.monotonic() - last_checkpoint > plan.checkpoint_seconds
                if done in plan.eval_steps or due or (check and signals.received):
                    _check_weights(update.tensors(), done, lr)
                if done in plan.eval_steps:
                    before = time.monotonic()
                    _evaluate(task, ema, plan, done, extra, folder, log, bar)
                    checkpoint(done)
                    last_log += time.monotonic() - before  # the speed excludes evaluation
                elif due or (check and signals.received):
                    checkpoint(done)
                if check and signals.received and done < plan.total_steps:
                    raise Interrupted(f"stopped after step {done} of {plan.total_steps}", 128 + signals.received)
        except Exception:
            if wait.reading and done > start:  # all steps are complete: reading the next batch failed
                check_finite()
                checkpoint(done)
                bar.say(f"checkpoint after step {done} of {plan.total_steps}")
            raise
        finally:
            bar.close()
            log.close()

    # --- results ---
    with ema.applied():
        task.save(folder / "last.safetensors")
    seconds = seconds_before + time.monotonic() - began
    return Outcome(extra["last"], extra["best"], extra["best_epoch"], seconds, extra["report"], folder)


def _announce(bar: ProgressBar, log: RunLog, plan: Plan, start: int, here: dict[str, Any], resumed: bool) -> None:
    """Says and logs where a run starts, and what is different from before."""
    length = log.resumed.get("total_steps", plan.total_steps)
    if resumed:
        bar.say(f"resume   after step {start} of {plan.total_steps}")
        if length != plan.total_steps:
            was = "" if log.last_lr is None else f" (it was {log.last_lr:.3g})"
            bar.say(
                f"length   {plan.total_steps} steps instead of {length}: from step {start + 1} on, the learning rate "
                f"is that of a run of this length, at first {plan.lr_at(start):.3g}{was}; there is no second warm-up"
            )
        for line in log.differences(here):
            bar.say(f"warning: changed since the run began, so that numbers may differ: {line}")
    before = {} if length == plan.total_steps else {"total_steps_before": length}
    log.write("start", start, total_steps=plan.total_steps, **before, **here)


Losses = dict[str, Tensor]


def _gradients(task: Task, update: Update, sam: SAM, plan: Plan, batch: Any, seed: int, step: int) -> Losses:
    """Mean losses of the batch of a step, with gradients in the parameters. Repeated calls give the same.

    With sharpness-aware minimization, the loss is not finite if the ascent's was not.
    """
    torch.manual_seed(seed * 1_000_003 + step)
    update.prepare(step)
    if not sam.rho:
        return _add_gradients(task, batch, plan.batch_size, plan.micro_batch)
    size = ascent_size(plan.batch_size, plan.sam_fraction)
    ascent = _add_gradients(task, task.split(batch, size)[0][0], size, plan.micro_batch)["loss"]
    sam.ascend()
    losses = _add_gradients(task, batch, plan.batch_size, plan.micro_batch)
    sam.restore()
    return losses | {"loss": torch.where(ascent.isfinite(), losses["loss"], ascent)}


def _add_gradients(task: Task, batch: Any, num_samples: int, micro_batch: int | None) -> Losses:
    """Mean losses of a batch. Adds to the gradients of the parameters."""
    size = min(micro_batch or num_samples, num_samples)
    on_gpu = next(task.model.parameters()).device.type == "cuda"  # few large operations beat many small ones
    total: Losses = {}
    with reuse_weights(task.model) if size < num_samples or on_gpu else contextlib.nullcontext():
        for part, weight in task.split(batch, size):
            losses = {name: loss * weight for name, loss in task.loss(task.model, part).items()}
            losses["loss"].backward()
            total = {name: loss.detach() + total.get(name, 0) for name, loss in losses.items()}
    return total


def _report_held(
    found: Mapping[int, str],
    last: int,
    repeat: Callable[[int, str], str],
    plan: Plan,
    skipped: list[int],
    log: RunLog,
    bar: ProgressBar,
) -> None:
    """Reports steps that were held back, and raises Diverged once they are too many.

    Args:
        found: what was not finite, by step.
        last: a step that can be repeated exactly.
        repeat: gives the first layer that is not finite in a repetition of a step.
        skipped: the steps of the last `WINDOW` that were held back; it gets those of `found`.
    """
    for step, what in found.items():
        skipped[:] = [s for s in skipped if s > step - WINDOW] + [step]
        lr, too_many = plan.lr_at(step), len(skipped) > plan.max_skipped
        if too_many or step == last:
            what = repeat(step, what)
        if too_many:
            raise Diverged(what, step + 1, lr, len(skipped) if plan.max_skipped else 0)
        log.write("skipped", step + 1, what=what, lr=lr)
        bar.say(f"warning: step {step + 1} is skipped: {what} is not finite")


class _Watch:
    """Finds losses and gradients that are not finite, and says which updates to hold back. The host does not wait.

    `one_by_one`: only such steps are held back, else all steps from the first one on.
    """

    def __init__(self, model: nn.Module, one_by_one: bool):
        self.one_by_one = one_by_one
        self.buffers = list(model.buffers()) if one_by_one else []  # running statistics, which a forward pass changes
        self.before = [buffer.clone() for buffer in self.buffers]
        self.held = torch.zeros((), dtype=torch.bool, device=next(model.parameters()).device)
        self.flags: dict[int, Tensor] = {}  # steps since the last look: whether loss and gradients are not finite, (2,)

    def see(self, step: int, loss: Tensor, params: Iterable[Tensor]) -> Tensor:
        """Bool scalar on the device: whether to hold back the update of this step."""
        grads = (local(p.grad) for p in params if p.grad is not None)
        self.flags[step] = ~torch.stack([loss.isfinite(), _all_finite([stored_values(grad) for grad in grads])])
        bad = self.flags[step].any()
        self.held = bad if self.one_by_one else self.held | bad
        return self.held

    def found(self) -> dict[int, str]:
        """What was not finite in the steps since the last call; waits for the device."""
        flags, self.flags = self.flags, {}
        rows = torch.stack(list(flags.values())).tolist() if flags else []
        return {step: "the loss" if row[0] else "a gradient" for step, row in zip(flags, rows, strict=True) if any(row)}

    def restore(self) -> None:
        """Gives buffers the values from before a step that is held back."""
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(self.held, before, buffer))
            before.copy_(buffer)


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory so far: of tensors on a CUDA device, else of this process; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # macOS gives bytes, Linux KiB


def _evaluate(
    task: Task, ema: EMA, plan: Plan, done: int, extra: dict[str, Any], folder: Path, log: RunLog, bar: ProgressBar
) -> None:
    """Evaluates the raw and the averaged weights, and saves the averaged ones if they are the best so far.

    Details of the last evaluation are logged before its checkpoint, so that a run with one has the other.
    """

    def show(seen: int, total: int) -> None:
        bar.update(done, f"evaluating {seen}/{total}")

    epoch = round(done / plan.steps_per_epoch, 4)
    raw = task.evaluate(task.model, Shard(), show).figures
    with ema.applied():
        evaluation = task.evaluate(task.model, Shard(), show)
        averaged = evaluation.figures
        if averaged[task.metric] > extra["best"]:
            extra["best"], extra["best_epoch"] = averaged[task.metric], epoch
            task.save(folder / "best.safetensors")
    extra["last"] = averaged
    log.show(done, evaluation.pictures)
    log.write("eval", done, epoch=epoch, **averaged, **{f"raw_{name}": value for name, value in raw.items()})
    if done == plan.total_steps:
        extra["report"] = evaluation.details
        log.write("details", done, **evaluation.details)
    figures = "  ".join(f"{k} {v}" if isinstance(v, int) else f"{k} {v:#.4g}" for k, v in averaged.items())
    bar.update(done, "")
    bar.say(f"epoch {epoch:.3g}: {figures} (without averaging: {task.metric} {raw[task.metric]:#.4g})")


def _restore(
    checkpoints: Path, tensors: Mapping[str, Tensor], extra: dict[str, Any]
) -> tuple[int, dict[str, Any], list[str]]:
    """Step and state of the newest whole checkpoint, or of the beginning, and a line for each damaged one.

    The tensors are filled in place.
    """
    path, damaged = newest_whole(checkpoints)
    if path is None:
        return 0, extra, damaged
    try:
        manifest = load_checkpoint(path, tensors)
    except DamagedCheckpoint as reason:
        raise InputError(f"checkpoint {path} cannot be used: {reason}") from None
    return manifest["step"], extra | manifest["extra"], damaged


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all elements are finite: a bool scalar on the device of the tensors, without a wait for it."""
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()
    # On a CPU the maximum takes ten times as long as the norm, which may overflow though all elements are finite.
    finite = torch.stack(torch._foreach_norm(tensors)).isfinite().all()
    return finite if finite else torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def _check_weights(tensors: Mapping[str, Tensor], step: int, lr: float) -> None:
    """Raises Diverged if weights are not finite, as finite gradients can cause: no file may contain them."""
    floats = {name: local(value) for name, value in tensors.items() if value.is_floating_point()}
    if not _all_finite(list(floats.values())):
        bad = next(name for name, value in floats.items() if not value.isfinite().all())
        raise Diverged(bad.replace(".", " ", 1), step, lr)


def _blame(task: Task, update: Update, sam: SAM, plan: Plan, batch: Any, seed: int, step: int, what: str) -> str:
    """Repeats a step that was held back, and names the first layer whose output or gradient is not finite.

    `what`: for a step that cannot be repeated, since other updates came after it.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of {name or 'the network'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in task.model.named_modules()]
    try:
        loss = _gradients(task, update, sam, plan, batch, seed, step)["loss"]
    finally:
        for handle in handles:
            handle.remove()
    grads = [(name, p.grad) for name, p in task.model.named_parameters() if p.grad is not None]
    bad = [f"the gradient of {name}" for name, grad in grads if not grad.isfinite().all()]
    if not found and loss.isfinite() and bad:
        return bad[-1]  # the first in the order of the backward pass
    return found[0] if found else what


class _Wait:
    """Measures how long the loop waits for batches."""

    seconds = 0.0
    reading = False

    def over(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            began, self.reading = time.monotonic(), True
            batch = next(batches, None)
            self.reading = False
            self.seconds += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def restart(self) -> float:
        """Seconds since the last restart."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Signals:
    """Records the first SIGINT or SIGTERM, for a loop to check between steps; a second one has its usual effect."""

    received: int | None = None

    def __enter__(self) -> Signals:
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def eval_steps(total_steps: int, steps_per_epoch: float, every_epochs: float) -> frozenset[int]:
    """Numbers of steps after which to evaluate: every `every_epochs` epochs, and at the end."""
    count = int(total_steps / (every_epochs * steps_per_epoch))
    return frozenset(max(1, round(i * every_epochs * steps_per_epoch)) for i in range(1, count + 1)) | {total_steps}
