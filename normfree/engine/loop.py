"""The training loop, the only one, for every task."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from normfree._compat import stored_values
from normfree.config import MachineConfig
from normfree.engine.checkpoint import DamagedCheckpoint, load_checkpoint, newest_whole, save_checkpoint
from normfree.engine.log import ProgressBar, RunLog, environment
from normfree.errors import InputError, quoted
from normfree.layers import reuse_weights
from normfree.optim import EMA, SAM, SGD_AGC, AGCStats, ascent_size
from normfree.optim.agc import local


class Diverged(RuntimeError):
    """A loss or gradient is not finite. The message names step and layer."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM came; a checkpoint has been written. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Task(Protocol):
    """What the loop needs to know of a task."""

    @property
    def model(self) -> nn.Module: ...

    def batches(self, start_step: int, stop_step: int) -> Iterator[Any]: ...

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of the images of a batch; scalar, float32."""
        ...

    def part(self, batch: Any, start: int, stop: int) -> Any:
        """Images `start` to `stop`, exclusive, of a batch, as a batch."""
        ...

    def notices(self, batch: Any) -> list[str]:
        """Lines about this batch for the log, such as images that could not be read."""
        ...

    def evaluate(self, show: Callable[[int, int], None]) -> dict[str, float]:
        """Figures of the model as it is; "top1" or another `metric` decides which weights are best."""
        ...

    def report(self) -> dict[str, Any]:
        """The last evaluation in detail, class by class, as JSON; asked for once, at the end of the run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What of the task must survive a kill, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save(self, path: Path) -> None:
        """The weight file of the model as it is."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long and how fast. Steps count from 0; `lr_at(step)` is the rate of that step's update."""

    total_steps: int
    eval_steps: frozenset[int]  # after this many steps
    batch_size: int
    steps_per_epoch: float
    lr_at: Callable[[int], float]
    metric: str = "top1"
    micro_batch: int | None = None  # images that go through the network at once; None: the whole batch
    sam_rho: float = 0.0  # 0: no sharpness-aware minimization
    sam_fraction: float = 0.2
    check_every: int | None = None  # steps between looks at the device for what is not finite; None: 1 on a CPU


@dataclass
class Outcome:
    """The end of the run in `folder`: figures of the last evaluation, its report, and the best one with its epoch."""

    last: dict[str, float]
    best: float
    best_epoch: float
    seconds: float
    report: dict[str, Any]
    folder: Path


def train(
    task: Task,
    optimizer: SGD_AGC,
    ema: EMA,
    plan: Plan,
    machine: MachineConfig,
    folder: Path,
    seed: int,
    resume: bool = False,
) -> Outcome:
    """Trains `task` to the end of `plan` and leaves best.safetensors, last.safetensors and checkpoints in `folder`.

    Randomness inside a step follows from (seed, step) alone, so that a resumed run takes the same steps.

    Raises:
        Diverged: loss or gradients are not finite. That step is not made; the newest checkpoint is from before.
        Interrupted: after a signal, with a checkpoint of the step it came in.
    """
    model = task.model
    device = next(model.parameters()).device
    checkpoints = folder / "checkpoints"

    # --- where it starts ---
    tensors = _state(model, optimizer, ema)
    extra: dict[str, Any] = {"best": -math.inf, "best_epoch": 0.0, "seconds": 0.0, "last": {}, "report": {}, "task": {}}
    start = 0
    if resume:
        start, extra = _restore(checkpoints, tensors, extra)
        if extra["task"]:
            task.load_state_dict(extra["task"])
    log = RunLog(folder, start, machine.wandb)
    bar = ProgressBar("train", plan.total_steps, start)
    for line in extra.pop("damaged", []):
        bar.say(f"warning: {line}")
    here = environment(device)
    if resume:
        bar.say(f"resume   after step {start} of {plan.total_steps}")
        for line in log.differences(here):
            bar.say(f"warning: not as the run was begun, so that its numbers may differ: {line}")
    log.write("start", start, total_steps=plan.total_steps, **here)
    seconds_before, began = extra["seconds"], time.monotonic()
    last_checkpoint, last_log, last_log_step, done = began, began, start, start

    def checkpoint(step: int) -> None:
        nonlocal last_checkpoint
        bar.update(step, "writing a checkpoint")
        extra["seconds"] = seconds_before + time.monotonic() - began
        extra["task"] = task.state_dict()
        save_checkpoint(checkpoints, step, _state(model, optimizer, ema), extra, machine.keep_checkpoints)
        last_checkpoint = time.monotonic()
        bar.update(step, "")

    def check_finite() -> None:
        """Diverged if a step has been held back; waits for the device."""
        if (bad := int(watch.first)) >= 0:
            batch = next(task.batches(bad, bad + 1))
            raise _diverged(_blame(task, sam, plan, batch, seed, bad), bad, plan.lr_at(bad))

    def where_to_go_on(step: int) -> str:
        return f"after step {step} of {plan.total_steps}; go on with: normfree train --resume {quoted(folder)}"

    # --- the steps ---
    wait = _Wait()
    sam = SAM(optimizer, plan.sam_rho)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    check_every = plan.check_every or (1 if device.type == "cpu" else machine.log_every)
    watch = _Watch(device)
    model.train()
    with Signals() as signals:
        try:
            for step, batch in enumerate(wait.over(task.batches(start, plan.total_steps)), start):
                lr = plan.lr_at(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                log_now = (step + 1) % machine.log_every == 0 or step + 1 in plan.eval_steps
                check = log_now or (step + 1) % check_every == 0  # waits for the device; nothing is saved unchecked
                loss = _gradients(task, sam, plan, batch, seed, step)
                held = watch.see(step, loss, names)
                if check:
                    check_finite()
                optimizer.step(ema=ema, ema_step=step, hold=held)
                done = step + 1

                for line in task.notices(batch):
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
                        loss=loss.item(),
                        lr=lr,
                        images_per_s=round(speed, 2),
                        data_wait=round(wait.restart() / elapsed, 4),
                        memory_mib=peak_memory_mib(device),
                        clipped_fraction=optimizer.stats.clipped_fraction,
                        max_grad_ratio=optimizer.stats.max_ratio.item(),
                        **_by_stage(optimizer.stats, names),
                    )
                    bar.update(done, f"loss {loss.item():.3f}  {speed:.0f} images/s")
                else:
                    bar.update(done)

                due = check and time.monotonic() - last_checkpoint > machine.checkpoint_minutes * 60
                if done in plan.eval_steps or due or (check and signals.received):
                    _check_weights(_state(model, optimizer, ema), step, lr)
                if done in plan.eval_steps:
                    before = time.monotonic()
                    _evaluate(task, ema, plan, done, extra, folder, log, bar)
                    checkpoint(done)
                    last_log += time.monotonic() - before  # images/s is of training alone
                elif due or (check and signals.received):
                    checkpoint(done)
                if check and signals.received and done < plan.total_steps:
                    raise Interrupted(f"stopped {where_to_go_on(done)}", 128 + signals.received)
        except Exception:
            if wait.reading and done > start:  # the steps are whole: what failed is reading the next batch
                check_finite()
                checkpoint(done)
                bar.say(f"checkpoint {where_to_go_on(done)}")
            raise
        finally:
            bar.close()
            log.close()

    # --- what is kept ---
    with ema.applied():
        task.save(folder / "last.safetensors")
    seconds = seconds_before + time.monotonic() - began
    return Outcome(extra["last"], extra["best"], extra["best_epoch"], seconds, extra["report"], folder)


def _gradients(task: Task, sam: SAM, plan: Plan, batch: Any, seed: int, step: int) -> Tensor:
    """Mean loss of the batch of a step, whose gradient is left in the parameters; the same however often it is called.

    With sharpness-aware minimization, not finite if the ascent's loss was not.
    """
    torch.manual_seed(seed * 1_000_003 + step)
    sam.optimizer.zero_grad(set_to_none=True)
    if not sam.rho:
        return _add_gradients(task, batch, plan.batch_size, plan.micro_batch)
    ascent = _add_gradients(task, batch, ascent_size(plan.batch_size, plan.sam_fraction), plan.micro_batch)
    sam.ascend()
    loss = _add_gradients(task, batch, plan.batch_size, plan.micro_batch)
    sam.restore()
    return torch.where(ascent.isfinite(), loss, ascent)


def _add_gradients(task: Task, batch: Any, num_images: int, micro_batch: int | None) -> Tensor:
    """Mean loss of the first `num_images` of a batch, of which the gradients are added to what is there."""
    size = min(micro_batch or num_images, num_images)
    device = next(task.model.parameters()).device
    total = torch.zeros((), device=device)
    together = size < num_images or device.type == "cuda"  # where few large operations beat many
    with reuse_weights(task.model) if together else contextlib.nullcontext():
        for start in range(0, num_images, size):
            stop = min(start + size, num_images)
            loss = task.loss(task.part(batch, start, stop)) * ((stop - start) / num_images)
            loss.backward()
            total = total + loss.detach()
    return total


class _Watch:
    """Keeps on the device which step was the first whose loss or gradients were not finite, -1 while there is none."""

    def __init__(self, device: torch.device):
        self.first = torch.full((), -1, device=device)

    def see(self, step: int, loss: Tensor, params: Iterable[Tensor]) -> Tensor:
        """Whether step `step` must not be made, since it or one before it is at fault; bool scalar on the device."""
        grads = (local(p.grad) for p in params if p.grad is not None)
        bad = ~(loss.isfinite() & _all_finite([stored_values(grad) for grad in grads]))
        self.first = torch.where(bad & (self.first < 0), torch.full_like(self.first, step), self.first)
        return self.first >= 0


def _by_stage(stats: AGCStats, names: Mapping[Tensor, str]) -> dict[str, float]:
    """Share of the units that AGC clipped, in "agc_stem", "agc_stages.0", ..., "agc_head"; waits for the device."""
    units: dict[str, int] = {}
    clipped: dict[str, float] = {}
    for p, size, count in zip(stats.params, stats.units, stats.clipped.tolist(), strict=True):
        parts = names[p].split(".")
        stage = "agc_" + ".".join(parts[: 2 if parts[0] == "stages" else 1])
        units[stage] = units.get(stage, 0) + size
        clipped[stage] = clipped.get(stage, 0.0) + count
    return {stage: clipped[stage] / size for stage, size in sorted(units.items())}


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory in use so far: by tensors on a CUDA device, else by this process; None on Windows."""
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
    """Figures of the raw and of the averaged weights; the averaged ones are kept when they are the best so far.

    The last evaluation is also reported in detail, before its checkpoint: a run that has the one has the other.
    """

    def show(seen: int, total: int) -> None:
        bar.update(done, f"evaluating {seen}/{total}")

    epoch = round(done / plan.steps_per_epoch, 4)
    raw = task.evaluate(show)
    with ema.applied():
        averaged = task.evaluate(show)
        if averaged[plan.metric] > extra["best"]:
            extra["best"], extra["best_epoch"] = averaged[plan.metric], epoch
            task.save(folder / "best.safetensors")
    extra["last"] = averaged
    log.write("eval", done, epoch=epoch, **averaged, **{f"raw_{name}": value for name, value in raw.items()})
    if done == plan.total_steps:
        extra["report"] = task.report()
        log.write("classes", done, classes=extra["report"])
    figures = "  ".join(f"{k} {v}" if isinstance(v, int) else f"{k} {v:#.4g}" for k, v in averaged.items())
    bar.update(done, "")
    bar.say(f"epoch {epoch:.3g}: {figures} (without averaging: {plan.metric} {raw[plan.metric]:#.4g})")


def _state(model: nn.Module, optimizer: SGD_AGC, ema: EMA) -> dict[str, Tensor]:
    """Every tensor that the next step depends on, by name. Momenta are made if the first step has not made them."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            tensors[f"momentum.{names[p]}"] = state["momentum_buffer"]
    return tensors


def _restore(checkpoints: Path, tensors: Mapping[str, Tensor], extra: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Step and state of the newest whole checkpoint, or of the beginning; the tensors are filled in place."""
    path, damaged = newest_whole(checkpoints)
    if path is None:
        return 0, extra | {"damaged": damaged}
    try:
        manifest = load_checkpoint(path, tensors)
    except DamagedCheckpoint as reason:
        raise InputError(f"checkpoint {path} cannot be used: {reason}") from None
    return manifest["step"], extra | manifest["extra"] | {"damaged": damaged}


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Bool scalar, on the device of the tensors, which the host does not wait for."""
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()
    # On a CPU the largest magnitude takes ten times as long as the norm, which may overflow where no element does.
    finite = torch.stack(torch._foreach_norm(tensors)).isfinite().all()
    return finite if finite else torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def _check_weights(tensors: Mapping[str, Tensor], step: int, lr: float) -> None:
    """Diverged where finite gradients have led to weights that are not: nothing of these may reach a file."""
    floats = {name: local(value) for name, value in tensors.items() if value.is_floating_point()}
    if not _all_finite(list(floats.values())):
        bad = next(name for name, value in floats.items() if not value.isfinite().all())
        raise _diverged(bad.replace(".", " ", 1), step, lr)


def _blame(task: Task, sam: SAM, plan: Plan, batch: Any, seed: int, step: int) -> str:
    """Repeats a step that was held back; names the first layer whose output, else gradient, is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of {name or 'the network'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in task.model.named_modules()]
    try:
        loss = _gradients(task, sam, plan, batch, seed, step)
    finally:
        for handle in handles:
            handle.remove()
    grads = [(name, p.grad) for name, p in task.model.named_parameters() if p.grad is not None]
    bad = [f"the gradient of {name}" for name, grad in grads if not grad.isfinite().all()]
    if not found and loss.isfinite() and bad:
        return bad[-1]  # the first one, going backwards
    return found[0] if found else "the loss"


def _diverged(what: str, step: int, lr: float) -> Diverged:
    """`step` counts from 0, the message from 1, as the log does."""
    return Diverged(
        f"step {step + 1}: {what} is not finite at learning rate {lr:.3g}. Lower --lr, lengthen --warmup-epochs or "
        "lower --clipping; the last checkpoint is from before"
    )


class _Wait:
    """The seconds that the loop waits for its batches."""

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
    """Keeps the first SIGINT or SIGTERM for a loop to see between two steps; a second one has its usual effect."""

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
    """After which steps to evaluate: every `every_epochs` epochs, and at the end."""
    count = int(total_steps / (every_epochs * steps_per_epoch))
    return frozenset(max(1, round(i * every_epochs * steps_per_epoch)) for i in range(1, count + 1)) | {total_steps}
