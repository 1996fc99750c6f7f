"""The training loop, the only one, for every task."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from normfree.config import InputError, MachineConfig
from normfree.engine.checkpoint import DamagedCheckpoint, load_checkpoint, newest_whole, save_checkpoint
from normfree.engine.distributed import keep_freed_memory
from normfree.engine.log import ProgressBar, RunLog
from normfree.layers import reuse_weights
from normfree.optim import EMA, SAM, SGD_AGC, AGCStats, ascent_size


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


@dataclass
class Outcome:
    """The end of a run: figures of the last evaluation and its report, and the best figure with its epoch."""

    last: dict[str, float]
    best: float
    best_epoch: float
    seconds: float
    report: dict[str, Any]


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
        Diverged: loss or gradients are not finite; the newest checkpoint is from before.
        Interrupted: after a signal, with a checkpoint of the step it came in.
    """
    model = task.model
    device = next(model.parameters()).device
    checkpoints = folder / "checkpoints"

    if device.type == "cpu":
        keep_freed_memory()

    # --- where it starts ---
    tensors = _state(model, optimizer, ema)
    extra: dict[str, Any] = {"best": -math.inf, "best_epoch": 0.0, "seconds": 0.0, "last": {}, "report": {}}
    start = 0
    if resume:
        start, extra = _restore(checkpoints, tensors, extra)
    log = RunLog(folder, start, machine.wandb)
    bar = ProgressBar("train", plan.total_steps, start)
    for line in extra.pop("damaged", []):
        bar.say(f"warning: {line}")
    if resume:
        bar.say(f"resume   after step {start} of {plan.total_steps}")
    log.write("start", start, total_steps=plan.total_steps, device=str(device), torch=torch.__version__)
    seconds_before, began = extra["seconds"], time.monotonic()
    last_checkpoint, last_log, last_log_step = began, began, start

    def checkpoint(step: int) -> None:
        nonlocal last_checkpoint
        extra["seconds"] = seconds_before + time.monotonic() - began
        save_checkpoint(checkpoints, step, _state(model, optimizer, ema), extra, machine.keep_checkpoints)
        last_checkpoint = time.monotonic()

    # --- the steps ---
    wait = _Wait()
    sam = SAM(optimizer, plan.sam_rho)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    model.train()
    with _Signals() as signals:
        try:
            for step, batch in enumerate(wait.over(task.batches(start, plan.total_steps)), start):
                torch.manual_seed(seed * 1_000_003 + step)
                lr = plan.lr_at(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                done = step + 1
                log_now = done % machine.log_every == 0 or done in plan.eval_steps
                check = device.type == "cpu" or log_now  # waits for the device; nothing is saved unchecked
                optimizer.zero_grad(set_to_none=True)
                if plan.sam_rho:
                    _add_gradients(task, batch, ascent_size(plan.batch_size, plan.sam_fraction), plan.micro_batch)
                    sam.ascend()
                loss = _add_gradients(task, batch, plan.batch_size, plan.micro_batch)
                if check and not math.isfinite(loss.item()):
                    raise _diverged(_bad_output(task, batch), step, lr)
                if plan.sam_rho:
                    sam.restore()
                optimizer.step(ema=ema, ema_step=step)
                if check and not math.isfinite(optimizer.stats.max_ratio.item()):
                    raise _diverged(_bad_gradient(model), step, lr)

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

                if done in plan.eval_steps:
                    before = time.monotonic()
                    _evaluate(task, ema, plan, done, extra, folder, log, bar)
                    checkpoint(done)
                    last_log += time.monotonic() - before  # images/s is of training alone
                elif check and (
                    signals.received or time.monotonic() - last_checkpoint > machine.checkpoint_minutes * 60
                ):
                    checkpoint(done)
                if check and signals.received and done < plan.total_steps:
                    where = f"stopped after step {done} of {plan.total_steps}"
                    raise Interrupted(f"{where}; go on with: normfree train --resume {folder}", 128 + signals.received)
        finally:
            bar.close()
            log.close()

    # --- what is kept ---
    with ema.applied():
        task.save(folder / "last.safetensors")
    seconds = seconds_before + time.monotonic() - began
    return Outcome(extra["last"], extra["best"], extra["best_epoch"], seconds, extra["report"])


def _add_gradients(task: Task, batch: Any, num_images: int, micro_batch: int | None) -> Tensor:
    """Mean loss of the first `num_images` of a batch, of which the gradients are added to what is there."""
    size = min(micro_batch or num_images, num_images)
    total = torch.zeros(())
    together = size < num_images or next(task.model.parameters()).is_cuda  # where few large operations beat many
    with reuse_weights(task.model) if together else contextlib.nullcontext():
        for start in range(0, num_images, size):
            stop = min(start + size, num_images)
            loss = task.loss(task.part(batch, start, stop)) * ((stop - start) / num_images)
            loss.backward()
            total = total.to(loss.device) + loss.detach()
    return total


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


def _bad_output(task: Task, batch: Any) -> str:
    """Runs the batch once more and names the first layer whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of {name or 'the network'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in task.model.named_modules()]
    try:
        with torch.no_grad():
            task.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss"


def _bad_gradient(model: nn.Module) -> str:
    """Names the parameter whose gradient was the first not to be finite, going backwards."""
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {bad[-1]}" if bad else "a gradient"


def _diverged(what: str, step: int, lr: float) -> Diverged:
    return Diverged(
        f"step {step}: {what} is not finite at learning rate {lr:.3g}. Lower --lr, lengthen --warmup-epochs or lower "
        "--clipping; the last checkpoint is from before"
    )


class _Wait:
    """The seconds that the loop waits for its batches."""

    seconds = 0.0

    def over(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.seconds += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def restart(self) -> float:
        """Seconds since the last restart."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class _Signals:
    """Keeps the first SIGINT or SIGTERM for the loop to see between two steps; a second one has its usual effect."""

    received: int | None = None

    def __enter__(self) -> _Signals:
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
