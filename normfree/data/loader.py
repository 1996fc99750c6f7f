"""Batches: an endless training stream that is a function of (seed, step), and a single pass in order."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from normfree.data.images import LabelledImages, Samples, UnreadableImage
from normfree.data.mixing import Mixing
from normfree.data.randaugment import RandAugment
from normfree.data.transforms import sample_rng, to_tensor
from normfree.errors import InputError
from normfree.native import library

TrainFunction = Callable[[Image.Image, np.random.Generator], Tensor]
EvalFunction = Callable[[Image.Image], Tensor]
Collate = Callable[[list[Any], tuple[str, ...]], Any]
_Crop = tuple[Tensor, int, np.random.Generator]  # pixels, index, and the generator that the crop has drawn from

_ORDER_STREAM, _REPLACEMENT_STREAM = 1, 2
_MAX_REPLACEMENTS = 20
_AHEAD = 2  # batches that each worker prefetches
_FREE_SHARED = "lower --workers, or give more shared memory (/dev/shm; docker run --shm-size=8g)"


class WorkerDied(RuntimeError):
    """A data worker was killed, ran out of memory or crashed. The message is one line with the remedy."""


class Batch(NamedTuple):
    """`images` (N, C, H, W), uint8 or float32; `targets` and `indices` (N,) int64; `unreadable`: "name: reason".

    Targets are -1 where the images have no labels. For mixed images, `targets` and `indices` are those of the first
    partner, `mix_targets` (N,) int64 those of the second, and `ratios` (N,) float32 the weights of the first. Without
    mixing both are None.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: tuple[str, ...]
    mix_targets: Tensor | None = None
    ratios: Tensor | None = None


def train_batches(
    images: Samples,
    transform: TrainFunction,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    workers: int,
    channels: int = 3,
    min_px: int | None = None,
    mixing: Mixing | None = None,
    augment: RandAugment | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """`stream_batches` for steps `start_step` to `stop_step` (exclusive): images cropped, mixed and augmented.

    `transform(image, rng)` returns a tensor (C, H, W); `channels` and `min_px` go to `Samples.read`. With `mixing` of
    pairs from the stream, image p is made of images 2p and 2p + 1 of the unmixed stream, so an epoch passes the data
    set twice, as in the released code. With pairs from the batch, each image of the unmixed stream is mixed with the
    next one of its batch, the last with the first. `augment` comes last.

    Raises `InputError` for a batch larger than the data set and for pairs from a batch of one.
    """
    if batch_size > len(images):
        largest = f"{len(images)} is the largest that fits"
        raise InputError(f"the batch size is {batch_size} but there are {len(images)} training images; {largest}")
    if mixing and mixing.pairs == "batch" and batch_size < 2:
        raise InputError("pairs from the batch need a batch size of at least 2")
    per_step = 2 * batch_size if mixing and mixing.pairs == "stream" else batch_size
    task = _Training(images, transform, channels, min_px, mixing, augment)
    steps = range(start_step, stop_step)
    return stream_batches(images, task.sample, task.batch, per_step, seed, steps, workers, pin_memory)


def eval_batches(
    images: Samples,
    transform: EvalFunction,
    *,
    batch_size: int,
    workers: int,
    channels: int = 3,
    min_px: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """`ordered_batches` of images; `transform(image)` returns a tensor (C, H, W)."""
    task = _Evaluation(images, transform, channels, min_px)
    return ordered_batches(images, task.sample, task.batch, batch_size, workers, pin_memory)


def stream_batches(
    images: Samples,
    sample: Callable[[int, np.random.Generator], Any],
    collate: Collate,
    per_step: int,
    seed: int,
    steps: range,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """The batches of `steps` of the training stream of any task, the same for any number of `workers`.

    The stream is one permutation of the images per epoch. Batches straddle the ends of epochs, so all have `per_step`
    images. `sample(index, rng)` reads an image and makes a sample of it, where `rng` depends on (seed, epoch, index);
    `collate(samples, unreadable)` makes a batch. Both must be picklable. If `sample` raises `UnreadableImage`, another
    image is drawn by (seed, epoch, index), and `unreadable` has a line "name: reason".

    Raises `InputError` while iterating if an image and all its replacements are unreadable.
    """
    reader = _StreamReader(images, sample, collate, seed)
    return read_batches(reader, _stream_keys(images, per_step, seed, steps), workers, pin_memory)


def ordered_batches(
    images: Samples,
    sample: Callable[[int], Any],
    collate: Collate,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Every image once, in order, for any task. The last batch may be short. See `stream_batches` for the arguments.

    An unreadable image is left out of its batch, which may become empty, and reported in `unreadable`.
    """
    starts = range(0, len(images), batch_size)
    keys = [range(start, min(start + batch_size, len(images))) for start in starts]
    return read_batches(_OrderedReader(sample, collate), keys, workers, pin_memory)


@dataclass(frozen=True)
class _Training:
    images: Samples
    transform: TrainFunction
    channels: int
    min_px: int | None
    mixing: Mixing | None
    augment: RandAugment | None

    def sample(self, index: int, rng: np.random.Generator) -> _Crop:
        return self.transform(self.images.read(index, self.channels, self.min_px), rng), index, rng

    def batch(self, crops: list[_Crop], unreadable: tuple[str, ...]) -> Batch:
        if self.mixing is None:
            tensors = [self._augmented(image, rng) for image, _, rng in crops]
            return Batch(torch.stack(tensors), *self._labels(crops), unreadable)
        if self.mixing.pairs == "stream":
            firsts, seconds = crops[0::2], crops[1::2]
        else:
            firsts, seconds = crops, crops[1:] + crops[:1]
        tensors, ratios = [], []
        for i, ((first, _, rng), (second, _, _)) in enumerate(zip(firsts, seconds, strict=True)):
            mixed, ratio = self.mixing(first, second, i, rng)
            tensors.append(self._augmented(mixed, rng))
            ratios.append(ratio)
        mix_targets, _ = self._labels(seconds)
        return Batch(torch.stack(tensors), *self._labels(firsts), unreadable, mix_targets, torch.tensor(ratios))

    def _augmented(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if self.augment is None:
            return image
        return to_tensor(self.augment(image.permute(1, 2, 0).numpy(), rng))

    def _labels(self, crops: list[_Crop]) -> tuple[Tensor, Tensor]:
        return _labels(self.images, [index for _, index, _ in crops])


@dataclass(frozen=True)
class _Evaluation:
    images: Samples
    transform: EvalFunction
    channels: int
    min_px: int | None

    def sample(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.read(index, self.channels, self.min_px)), index

    def batch(self, crops: list[tuple[Tensor, int]], unreadable: tuple[str, ...]) -> Batch:
        if crops:
            tensors = torch.stack([image for image, _ in crops])
        else:  # of the shape and type that the transform gives
            tensors = self.transform(Image.new("L" if self.channels == 1 else "RGB", (64, 64)))[None][:0]
        return Batch(tensors, *_labels(self.images, [index for _, index in crops]), unreadable)


def _labels(images: Samples, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Targets and indices, (N,) int64."""
    targets = [images.targets[i] for i in indices] if isinstance(images, LabelledImages) else [-1] * len(indices)
    return torch.tensor(targets, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64)


def _stream_keys(images: Samples, per_step: int, seed: int, steps: range) -> Iterator[list[tuple[int, int]]]:
    """A list of (epoch, index) for each step."""
    epoch, order = -1, np.empty(0)
    for step in steps:
        keys = []
        for position in range(step * per_step, (step + 1) * per_step):
            if position // len(images) != epoch:
                epoch = position // len(images)
                lead = -epoch * len(images) % per_step  # images that complete the batch begun in the epoch before
                order = images.order(sample_rng(seed, epoch, 0, _ORDER_STREAM), lead)
            keys.append((epoch, int(order[position % len(images)])))
        yield keys


@dataclass(frozen=True)
class _StreamReader:
    images: Samples
    sample: Callable[[int, np.random.Generator], Any]
    collate: Collate
    seed: int

    def __call__(self, keys: list[tuple[int, int]]) -> Any:
        unreadable: list[str] = []
        samples = [self._sample(epoch, index, unreadable) for epoch, index in keys]
        return self.collate(samples, tuple(dict.fromkeys(unreadable)))

    def _sample(self, epoch: int, index: int, unreadable: list[str]) -> Any:
        """The sample of image `index`, or of its first readable replacement; failures go to `unreadable`."""
        candidate, replacements = index, None
        for _ in range(1 + _MAX_REPLACEMENTS):
            try:
                return self.sample(candidate, sample_rng(self.seed, epoch, index))
            except UnreadableImage as error:
                unreadable.append(str(error))
                replacements = replacements or sample_rng(self.seed, epoch, index, _REPLACEMENT_STREAM)
                candidate = int(replacements.integers(len(self.images)))
        name = self.images.name(index)
        raise InputError(
            f"cannot read {name} nor {_MAX_REPLACEMENTS} others drawn in its place; first: {unreadable[0]}"
        )


@dataclass(frozen=True)
class _OrderedReader:
    sample: Callable[[int], Any]
    collate: Collate

    def __call__(self, keys: range) -> Any:
        samples, unreadable = [], []
        for index in keys:
            try:
                samples.append(self.sample(index))
            except UnreadableImage as error:
                unreadable.append(str(error))
        return self.collate(samples, tuple(unreadable))


def read_batches(
    reader: Callable[[Any], Any], keys: Iterable[Any], workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Yields `reader(key)` for each key, in order, computed by `workers` processes (0: by this one).

    An exception in a worker is raised here. When the iteration ends, for whatever reason, the workers end at once,
    even if one hangs in a read. `WorkerDied` is raised only while a batch is awaited.
    """
    if workers:
        library()  # compiles the kernels once, not in each worker
    pool = _Workers(reader, keys, workers) if workers else None
    batches = pool or map(reader, keys)
    try:
        # without an accelerator torch would warn
        yield from _pinned(batches) if pin_memory and torch.accelerator.is_available() else batches
    finally:
        if pool:
            pool.close()


class _Workers:
    """Processes that prefetch: batch i comes from worker i mod N, through its own pipe.

    This replaces torch's DataLoader, whose SIGCHLD handler raises a worker's death at any point, even during an update,
    and whose shutdown waits for hanging workers without a limit.
    """

    def __init__(self, reader: Callable[[Any], Any], keys: Iterable[Any], count: int) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []
        self.owner, self.closed = os.getpid(), False
        self.pending: deque[tuple[BaseProcess, Connection]] = deque()
        self.keys = iter(keys)
        context = multiprocessing.get_context()
        atexit.register(self.close)  # before multiprocessing's own handler, which waits for hanging workers
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(reader, theirs), daemon=True)  # type: ignore
                process.start()
                theirs.close()  # so that the pipe closes with the worker
                self.workers.append((process, ours))
            self.in_turn = itertools.cycle(self.workers)
            for _ in range(_AHEAD * count):
                self._send()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.pending:
            raise StopIteration
        process, pipe = self.pending.popleft()
        try:
            while not pipe.poll(1):
                if not process.is_alive():  # a fork may hold the other end of the pipe open
                    raise EOFError
            batch = pipe.recv()
        except (EOFError, OSError):
            _raise_if_dead(process)
            raise
        if isinstance(batch, Exception):
            raise batch
        self._send()
        return batch

    def _send(self) -> None:
        for key in itertools.islice(self.keys, 1):
            process, pipe = worker = next(self.in_turn)
            try:
                pipe.send(key)
            except OSError:
                _raise_if_dead(process)
                raise
            self.pending.append(worker)

    def close(self) -> None:
        """Kills the workers, which ignore SIGTERM and have no state to save."""
        if self.closed or os.getpid() != self.owner:  # a fork of the owner has a copy of this object
            return
        self.closed = True
        atexit.unregister(self.close)
        for process, _ in self.workers:
            process.kill()
        for process, _ in self.workers:
            process.join(1)  # a read from a dead network disk cannot even be killed


def _work(reader: Callable[[Any], Any], pipe: Connection) -> None:
    """The loop of a worker: receives keys and sends batches until it is killed."""
    # Ctrl-C and a scheduler's SIGTERM reach every process. The main one decides, and may still need batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            batch = reader(pipe.recv())
        except EOFError:  # the main process has ended
            return
        except Exception as error:
            if not isinstance(error, InputError):  # for users, one line is enough
                error.add_note("in a data worker:\n" + traceback.format_exc())
            batch = error
        try:
            pipe.send(batch)
        except BrokenPipeError:
            return
        except Exception as error:  # RuntimeError of torch: shared memory is full; others: not picklable
            kind, remedy = (WorkerDied, f": {_FREE_SHARED}") if type(error) is RuntimeError else (RuntimeError, "")
            pipe.send(kind(f"a data worker cannot send what it has read ({error}){remedy}"))
        del batch  # frees its shared memory


def _end_with_parent() -> None:
    """Ends this worker when the main process is killed, even if the worker hangs."""
    parent, number = multiprocessing.parent_process(), os.getppid()
    while parent is not None and parent.is_alive() and os.getppid() == number:
        parent.join(1)
    os._exit(1)


def _raise_if_dead(process: BaseProcess) -> None:
    process.join(1)
    code = process.exitcode
    if code is None:
        return
    name = signal.Signals(-code).name if code < 0 else ""
    if name == "SIGBUS":
        raise WorkerDied(f"shared memory was exhausted and a data worker ended: {_FREE_SHARED}") from None
    how = f"was killed by {name}" if name else f"ended with code {code}"
    raise WorkerDied(f"a data worker {how}, as when memory is exhausted: lower --workers or free memory") from None


def _pinned(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches with their tensors in page-locked memory; a thread copies one batch ahead."""
    device = torch.accelerator.current_device_index()

    def fetch(future: Future[Any]) -> None:
        try:
            torch.accelerator.set_device_index(device)  # a new thread starts with device 0
            future.set_result(_pin(next(batches, None)))
        except BaseException as error:
            future.set_exception(error)

    def begin() -> Future[Any]:
        future: Future[Any] = Future()
        threading.Thread(target=fetch, args=(future,), daemon=True).start()
        return future

    following = begin()
    while (batch := following.result()) is not None:
        following = begin()
        yield batch


def _pin(value: Any) -> Any:
    """The same tuples, lists and dictionaries with their tensors pinned."""
    match value:
        case Tensor():
            return value.pin_memory()
        case dict():
            return {key: _pin(item) for key, item in value.items()}
        case list():
            return [_pin(item) for item in value]
        case tuple():
            items = [_pin(item) for item in value]
            return tuple(items) if type(value) is tuple else type(value)(*items)
    return value
