"""Starting and resuming runs, and what they print."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normfree.config import OptimConfig, Run, options_of, save_config, spell, with_options
from normfree.data.images import changed
from normfree.engine.checkpoint import new_run_folder, numbered_run_folder, steps_done
from normfree.engine.log import duration
from normfree.engine.loop import Diverged, Outcome, Plan, Task, eval_steps, train
from normfree.engine.update import Update
from normfree.errors import InputError, one_line, quoted
from normfree.files import replacing, working_in
from normfree.native import library
from normfree.optim import warmup_cosine

DATA = "data.json"  # in a run's folder: the samples that the run began with
MAX_SKIPPED = 10  # of 100 steps, with `on_nonfinite` "skip"
LENGTH = ("epochs", "steps")  # options that a resumed run may change, besides those of the machine


@dataclass
class Job:
    """A run that is ready to start, as a task builds it from its configuration.

    Attributes:
        name: of numbered run folders, such as "photos-nfnet_micro".
        source: what the user called the data.
        data: content of `data.json`; "images" is the inventory of the samples.
        description: lines that describe data and network.
        notes: lines about the weights that the run starts from; a resumed run has its own.
        preview: gives the first three batches, read in this process, for an estimate of the time.
        workers: processes that read batches.
        evaluation: batches in one evaluation, and the cost of one relative to a training batch.
        summary: lines to print for the details of the last evaluation.
        command: of the command line, for this task.
    """

    run: Run
    task: Task
    update: Update
    plan: Plan
    name: str
    source: str
    data: dict[str, Any]
    description: Sequence[str]
    notes: Sequence[str]
    preview: Callable[[], Iterator[Any]]
    workers: int
    evaluation: tuple[float, float]
    summary: Callable[[dict[str, Any]], Sequence[str]] = lambda details: ()
    command: str = "normfree train"


def make_plan(run: Run, num_samples: int, unit: str = "images") -> Plan:
    """The plan of a run on so many training samples.

    Raises:
        InputError: the batch is larger than the data, or the warm-up as long as the run.
    """
    o, machine = run.optim, run.machine
    if o.batch_size > num_samples:
        raise InputError(f"--batch-size {o.batch_size} is more than the {num_samples} training {unit}")
    steps_per_epoch = num_samples / o.batch_size
    total_steps = _total_steps(o, steps_per_epoch)
    warmup_steps = o.warmup_epochs * steps_per_epoch if o.warmup_steps is None else o.warmup_steps
    if warmup_steps >= total_steps:
        raise InputError(
            f"the warm-up takes {warmup_steps:g} of {total_steps} steps; --warmup-steps or --warmup-epochs"
        )

    def lr_at(step: int) -> float:
        return warmup_cosine(
            step, peak_lr=o.lr, total_steps=total_steps, warmup_steps=warmup_steps, final_lr=o.final_lr
        )

    return Plan(
        total_steps,
        eval_steps(total_steps, steps_per_epoch, machine.eval_every),
        o.batch_size,
        steps_per_epoch,
        lr_at,
        micro_batch=o.micro_batch,
        sam_rho=o.sam_rho,
        sam_fraction=o.sam_fraction,
        log_every=machine.log_every,
        max_skipped=MAX_SKIPPED if machine.on_nonfinite == "skip" else 0,
        checkpoint_seconds=60 * machine.checkpoint_minutes,
        keep_checkpoints=machine.keep_checkpoints,
        wandb=machine.wandb,
        unit=unit,
    )


def _total_steps(o: OptimConfig, steps_per_epoch: float) -> int:
    return o.steps or max(1, round(o.epochs * steps_per_epoch))


def start(job: Job, folder: Path | None, chosen: Sequence[str] = ()) -> Outcome:
    """Trains in a new run folder; None: the next free one of runs/NAME-1, -2 ... (`Outcome.folder`).

    `chosen`: lines with the reasons for options that the user did not give.

    Raises:
        InputError: the folder is in use or cannot be made; the data turn out unusable. Nothing is left behind.
    """
    if folder is None:
        folder = numbered_run_folder(Path("runs") / job.name)
    else:
        new_run_folder(folder)
    save_config(job.run, folder / "config.json")
    _save_data(job, folder)
    try:
        return _carry_out(job, folder, chosen)
    except InputError:
        if not (folder / "checkpoints").exists():  # it is empty, and its name will be used again
            shutil.rmtree(folder)
        raise


def resume(job: Job, folder: Path, saved: Run | None = None) -> Outcome:
    """Continues the run in `folder` from its newest whole checkpoint.

    `saved`: its configuration so far. Where the length in `job.run` is another, it is written to config.json, and the
    learning rate follows the schedule of the new length from the checkpoint on.

    Raises:
        InputError: the data have changed since the run began, or more steps are done than the new length has.
    """
    if (folder / DATA).exists():
        difference = changed(read_data(folder)["images"], job.data["images"])
        if difference:
            raise InputError(
                f"--resume {quoted(folder)}: the {job.plan.unit} of {job.source} are not those that the run was "
                f"begun with: {difference}. Put them back, or start a new run"
            )
    else:  # version 0.1 wrote none
        print(f"warning: {folder} does not say which {job.plan.unit} it was begun with", file=sys.stderr)
        _save_data(job, folder)
    return _carry_out(job, folder, resume=True, saved=saved)


def _change_length(job: Job, folder: Path, saved: Run) -> None:
    """Writes a new length to the run's config.json."""
    if job.plan.total_steps == _total_steps(saved.optim, job.plan.steps_per_epoch):
        return
    done = steps_done(folder / "checkpoints")
    if job.plan.total_steps <= done:
        raise InputError(
            f"--resume {quoted(folder)}: {done} steps are done, {done / job.plan.steps_per_epoch:.4g} epochs, and "
            f"{job.plan.total_steps} would be the last: give --epochs or --steps beyond"
        )
    optim = options_of(job.run.optim)
    save_config(with_options(saved, {name: optim[name] for name in LENGTH}), folder / "config.json")


def check_resumed(folder: Path, saved: Run, run: Run, command: str = "normfree train") -> None:
    """InputError, with the command that works, unless `run` differs from that in `folder` in machine and length alone.

    Its `steps`, where they are set, are the length, so that other `epochs` beside them are an error.
    """
    before, machine = options_of(saved), options_of(saved.machine)
    options = {name: v for name, v in options_of(run).items() if v != before[name] and name not in machine}
    path = options.pop("path", before["path"])
    if run.optim.steps is not None and "epochs" in options:
        raise InputError(
            f"--epochs {run.optim.epochs:g} has no effect with --steps {run.optim.steps}: give one of them"
        )
    if not options.keys() - set(LENGTH) and path == before["path"]:
        return
    weights = next((w for w in ("last", "best") if (folder / f"{w}.safetensors").is_file()), None)
    finish = "" if weights == "last" else f"{command} --resume {quoted(folder)}, then "
    init = spell("init", str(folder / f"{weights or 'last'}.safetensors"))
    spelled = " ".join(spell(name, value) for name, value in options.items())
    raise InputError(
        f"--resume continues {folder} as it was configured; only its length (--epochs or --steps) and the machine "
        f"options may change. To train with "
        f"other ones from its weights on: {finish}{command} {quoted(path)} {init} {spelled}".rstrip()
    )


def _save_data(job: Job, folder: Path) -> None:
    with replacing(folder / DATA) as temporary:
        temporary.write_text(json.dumps(job.data, indent=1) + "\n")


def read_data(folder: Path) -> dict[str, Any]:
    """The data that the run in `folder` began with.

    Raises:
        InputError: its `data.json` is missing or damaged.
    """
    try:
        data = json.loads((folder / DATA).read_text())
        return {"held_out": data["held_out"], "images": data["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / DATA} cannot be used ({one_line(error)})") from None


def evaluation_command(run: Run, weights: Path, verb: str = "normfree eval") -> str:
    """The command that evaluates on the validation images of `run`, in whose folder the weights are."""
    options = options_of(run)
    share = f" --held-out {options['validation_fraction']:g} --seed {run.seed}"
    return f"{verb} {quoted(weights)} {quoted(options['path'])}{share if read_data(weights.parent)['held_out'] else ''}"


def _carry_out(
    job: Job, folder: Path, chosen: Sequence[str] = (), resume: bool = False, saved: Run | None = None
) -> Outcome:
    """Trains; prints a description before and a summary after it, on standard error."""
    epochs = job.plan.total_steps / job.plan.steps_per_epoch
    steps = f"{job.plan.total_steps} steps of {job.plan.batch_size} {job.plan.unit}"
    lines = [*(f"chosen   {line}" for line in chosen), *job.description]
    lines.append(f"run      {epochs:.3g} epochs = {steps}, into {folder}")
    lines += [] if resume else [f"init     {line}" for line in job.notes]
    with working_in(folder):
        if saved is not None:
            _change_length(job, folder, saved)
        print(*lines, sep="\n", file=sys.stderr)
        if not resume:
            print(f"time     about {duration(estimated_seconds(job))}", file=sys.stderr)
        try:
            outcome = train(job.task, job.update, job.plan, folder, job.run.seed, resume)
        except Diverged:
            raise
        except Exception:
            if (folder / "checkpoints").exists():
                print(f"continue with: {job.command} --resume {quoted(folder)}", file=sys.stderr)
            raise
    print(*job.summary(outcome.details), sep="\n", file=sys.stderr)
    return outcome


def estimated_seconds(job: Job) -> float:
    """Estimated length of the run, from its first batches, read and passed through the network. Has no side effects."""
    library()  # compiled before anything is timed
    task, plan = job.task, job.plan
    first, batch = _seconds_to_read(job)
    again, _ = _seconds_to_read(job)  # samples in memory need no decoding
    part, share = task.split(batch, plan.micro_batch or plan.batch_size)[0]
    device = next(task.model.parameters()).device
    task.model.eval()  # leaves batch statistics alone
    passes: list[float] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        while len(passes) < 4 or (sum(passes) < 2 and len(passes) < 20):
            began = time.monotonic()
            task.loss(task.model, part)["loss"].backward()
            task.model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            passes.append(time.monotonic() - began)
    network = statistics.mean(passes[2:]) / share  # the first ones allocate memory
    workers = max(job.workers, 1)

    def spent(batches: float, new: float, network: float) -> float:
        """Seconds for `batches`, the first `new` of which contain samples that have not been read before."""
        reading = min(batches, new) * first + max(batches - new, 0) * again
        return max(batches * network, reading / workers) if job.workers else batches * network + reading

    parameters = sum(p.numel() for p in task.model.parameters())
    update = 0.002 + 0.7e-9 * parameters  # AGC, SGD and EMA, on two cores (docs/speed.md)
    seconds = spent(plan.total_steps, plan.steps_per_epoch, network * passes_per_step(job.run.optim) + update)
    batches, cost = job.evaluation
    seconds += spent(2 * batches * len(plan.eval_steps), batches, network * cost)
    return seconds + len(plan.eval_steps) * (0.2 + 12 * parameters / 2e8)  # checkpoints: three copies of the weights


def passes_per_step(optim: OptimConfig) -> float:
    """How often a batch passes through the network in one step."""
    return 1 + optim.sam_fraction * bool(optim.sam_rho)


def _seconds_to_read(job: Job) -> tuple[float, Any]:
    """The shortest time for one of the first batches, and one of them."""
    batches = job.preview()
    began = time.monotonic()
    batch, seconds = next(batches), [time.monotonic() - began]
    while len(seconds) < min(3, job.plan.total_steps) and sum(seconds) < 2:
        began = time.monotonic()
        batch = next(batches)
        seconds.append(time.monotonic() - began)
    return min(seconds), batch
