"""Batches: an endless shuffled training stream that is a function of (seed, step), and one pass for evaluation."""

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

from normfree.data.images import ImageSet, UnreadableImage
from normfree.data.mixing import Mixing
from normfree.data.randaugment import RandAugment
from normfree.data.transforms import sample_rng, to_tensor
from normfree.errors import InputError
from normfree.native import library

TrainFunction = Callable[[Image.Image, np.random.Generator], Tensor]
EvalFunction = Callable[[Image.Image], Tensor]
_Sample = tuple[Tensor, int, np.random.Generator]

_ORDER_STREAM, _REPLACEMENT_STREAM = 1, 2
_MAX_REPLACEMENTS = 20
_AHEAD = 2  # batches that each worker reads ahead
_FREE_SHARED = "lower --workers, or give more shared memory (/dev/shm; docker run --shm-size=8g)"


class WorkerDied(RuntimeError):
    """A data worker ended before its work was done: killed, out of memory, crashed. One line: how, and the remedy."""


class Batch(NamedTuple):
    """`images` (N, C, H, W), uint8 or float32; `targets` and `indices` (N,) int64; `unreadable`: "name: reason".

    Of mixed images, `targets` and `indices` are the first partner's; `mix_targets` (N,) int64 are the second's, and
    `ratios` (N,) float32 the weight of the first. Both are None where nothing is mixed.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: tuple[str, ...]
    mix_targets: Tensor | None = None
    ratios: Tensor | None = None


def train_batches(
    images: ImageSet,
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
    """The batches of steps `start_step` to `stop_step` (exclusive) of the training stream, the same for any `workers`.

    The stream runs through one permutation of the images an epoch, and batches straddle the ends of epochs, so that all
    are full. An image that cannot be read gives its place to another, drawn by (seed, epoch, index), and is listed in
    its batch's `unreadable`. `transform(image, rng)` gives a tensor (C, H, W); `min_px` goes to `ImageSet.read`.

    With `mixing` of pairs from the stream, image p is made of images 2p and 2p + 1 of the stream without, so that it
    passes the data set twice as fast, as the released code's does. With pairs from the batch, the images are those of
    the stream without, each mixed with the next one of its batch, the last with the first. `augment` works on what has
    been cropped and mixed.

    Raises `InputError` for a batch larger than the data set, for pairs from a batch of one and, while iterating, if no
    replacement can be read either.
    """
    if batch_size > len(images):
        largest = f"{len(images)} is the largest that fits"
        raise InputError(f"the batch size is {batch_size} but there are {len(images)} training images; {largest}")
    reader = _TrainReader(images, transform, seed, channels, min_px, mixing, augment)
    if mixing and mixing.pairs == "batch" and batch_size < 2:
        raise InputError("pairs from the batch need a batch size of at least 2")
    images_per_step = 2 * batch_size if mixing and mixing.pairs == "stream" else batch_size
    keys = _TrainKeys(images, images_per_step, seed, range(start_step, stop_step))
    return read_batches(reader, keys, workers, pin_memory)


def eval_batches(
    images: ImageSet,
    transform: EvalFunction,
    *,
    batch_size: int,
    workers: int,
    channels: int = 3,
    min_px: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Every image once, in order; the last batch may be short. `transform(image)` gives a tensor (C, H, W).

    Images that cannot be read are in no tensor of their batch (which may be empty), only in its `unreadable`.
    """
    starts = range(0, len(images), batch_size)
    keys = [range(start, min(start + batch_size, len(images))) for start in starts]
    return read_batches(_EvalReader(images, transform, channels, min_px), keys, workers, pin_memory)


@dataclass(frozen=True)
class _TrainKeys:
    """One list of (epoch, index) for each step."""

    images: ImageSet
    images_per_step: int
    seed: int
    steps: range

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order, num_images = -1, np.empty(0), len(self.images)
        for step in self.steps:
            keys = []
            for position in range(step * self.images_per_step, (step + 1) * self.images_per_step):
                if position // num_images != epoch:
                    epoch = position // num_images
                    order = self.images.order(sample_rng(self.seed, epoch, 0, _ORDER_STREAM))
                keys.append((epoch, int(order[position % num_images])))
            yield keys


@dataclass(frozen=True)
class _TrainReader:
    """Keys to their batch."""

    images: ImageSet
    transform: TrainFunction
    seed: int
    channels: int
    min_px: int | None
    mixing: Mixing | None
    augment: RandAugment | None

    def __call__(self, keys: list[tuple[int, int]]) -> Batch:
        unreadable: list[str] = []
        samples = [self._sample(epoch, index, unreadable) for epoch, index in keys]
        reports = tuple(dict.fromkeys(unreadable))
        if self.mixing is None:
            tensors = [self._augmented(image, rng) for image, _, rng in samples]
            return Batch(torch.stack(tensors), *self._labels(samples), reports)
        if self.mixing.pairs == "stream":
            firsts, seconds = samples[0::2], samples[1::2]
        else:
            firsts, seconds = samples, samples[1:] + samples[:1]
        tensors, ratios = [], []
        for i, ((first, _, rng), (second, _, _)) in enumerate(zip(firsts, seconds, strict=True)):
            mixed, ratio = self.mixing(first, second, i, rng)
            tensors.append(self._augmented(mixed, rng))
            ratios.append(ratio)
        mix_targets, _ = self._labels(seconds)
        return Batch(torch.stack(tensors), *self._labels(firsts), reports, mix_targets, torch.tensor(ratios))

    def _sample(self, epoch: int, index: int, unreadable: list[str]) -> _Sample:
        """What is shown for a key, and the generator that its crop has drawn from, to go on with."""
        image, shown = self._read(epoch, index, unreadable)
        rng = sample_rng(self.seed, epoch, index)
        return self.transform(image, rng), shown, rng

    def _augmented(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if self.augment is None:
            return image
        return to_tensor(self.augment(image.permute(1, 2, 0).numpy(), rng))

    def _labels(self, samples: list[_Sample]) -> tuple[Tensor, Tensor]:
        """Targets and indices."""
        indices = [index for _, index, _ in samples]
        return torch.tensor([self.images.targets[index] for index in indices]), torch.tensor(indices)

    def _read(self, epoch: int, index: int, unreadable: list[str]) -> tuple[Image.Image, int]:
        """Image `index`, or the first readable one drawn in its place, and which it is; failures go to `unreadable`."""
        candidate, replacements = index, None
        for _ in range(1 + _MAX_REPLACEMENTS):
            try:
                return self.images.read(candidate, self.channels, self.min_px), candidate
            except UnreadableImage as error:
                unreadable.append(str(error))
                replacements = replacements or sample_rng(self.seed, epoch, index, _REPLACEMENT_STREAM)
                candidate = int(replacements.integers(len(self.images)))
        name = self.images.name(index)
        raise InputError(
            f"cannot read {name} nor {_MAX_REPLACEMENTS} others drawn in its place; first: {unreadable[0]}"
        )


@dataclass(frozen=True)
class _EvalReader:
    images: ImageSet
    transform: EvalFunction
    channels: int
    min_px: int | None

    def __call__(self, keys: range) -> Batch:
        tensors, indices, unreadable = [], [], []
        for index in keys:
            try:
                tensors.append(self.transform(self.images.read(index, self.channels, self.min_px)))
                indices.append(index)
            except UnreadableImage as error:
                unreadable.append(str(error))
        targets = torch.tensor([self.images.targets[index] for index in indices], dtype=torch.int64)
        stacked = torch.stack(tensors) if tensors else self._no_images()
        return Batch(stacked, targets, torch.tensor(indices, dtype=torch.int64), tuple(unreadable))

    def _no_images(self) -> Tensor:
        """An empty batch of the shape and type that the transform gives."""
        return self.transform(Image.new("L" if self.channels == 1 else "RGB", (64, 64)))[None][:0]


def read_batches(
    reader: Callable[[Any], Any], keys: Iterable[Any], workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """`reader(key)` of one key after another, in order, in `workers` processes (0: in this one).

    What a reader raises in a worker is raised here. However the iteration ends, the workers end with it at once, even
    one that hangs in a read. Raises `WorkerDied` while waiting for a batch, and at no other time.
    """
    if workers:
        library()  # compiled here, once, and not in each worker
    pool = _Workers(reader, keys, workers) if workers else None
    batches = pool or map(reader, keys)
    try:
        # torch warns where there is nothing to pin for
        yield from _pinned(batches) if pin_memory and torch.accelerator.is_available() else batches
    finally:
        if pool:
            pool.close()


class _Workers:
    """Processes that read ahead: batch i comes from worker i mod N, by a pipe of its own.

    Not torch's DataLoader: its SIGCHLD handler raises a worker's death anywhere, in the middle of an update too, and
    a worker that hangs holds up its shutdown, and the exit of the program without a limit.
    """

    def __init__(self, reader: Callable[[Any], Any], keys: Iterable[Any], count: int) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []
        self.owner, self.closed = os.getpid(), False
        self.asked: deque[tuple[BaseProcess, Connection]] = deque()
        self.keys = iter(keys)
        context = multiprocessing.get_context()
        atexit.register(self.close)  # runs before multiprocessing's own, which would wait for workers that hang
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(reader, theirs), daemon=True)  # type: ignore
                process.start()
                theirs.close()  # so that the pipe ends with the worker
                self.workers.append((process, ours))
            self.in_turn = itertools.cycle(self.workers)
            for _ in range(_AHEAD * count):
                self._ask()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.asked:
            raise StopIteration
        process, pipe = self.asked.popleft()
        try:
            while not pipe.poll(1):
                if not process.is_alive():  # a process forked by another thread may hold the other end open
                    raise EOFError
            batch = pipe.recv()
        except (EOFError, OSError):
            _say_if_dead(process)
            raise
        if isinstance(batch, Exception):
            raise batch
        self._ask()
        return batch

    def _ask(self) -> None:
        for key in itertools.islice(self.keys, 1):
            process, pipe = worker = next(self.in_turn)
            try:
                pipe.send(key)
            except OSError:
                _say_if_dead(process)
                raise
            self.asked.append(worker)

    def close(self) -> None:
        """Kills the workers, which have nothing to lose; SIGTERM they leave to the main process."""
        if self.closed or os.getpid() != self.owner:  # or a fork of the owner, which has a copy of this object
            return
        self.closed = True
        atexit.unregister(self.close)
        for process, _ in self.workers:
            process.kill()
        for process, _ in self.workers:
            process.join(1)  # one that waits for a dead network disk does not even end so, until the disk answers


def _work(reader: Callable[[Any], Any], pipe: Connection) -> None:
    """A worker: keys in, batches out, until it is killed."""
    # Ctrl-C, and a scheduler's SIGTERM, reach every process; only the main one decides, and may still want batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            batch = reader(pipe.recv())
        except EOFError:  # the parent has gone
            return
        except Exception as error:
            batch = _noted(error)
        try:
            pipe.send(batch)
        except BrokenPipeError:
            return
        except Exception as error:  # torch's RuntimeError: no room in shared memory; others: it cannot be pickled
            kind, remedy = (WorkerDied, f": {_FREE_SHARED}") if type(error) is RuntimeError else (RuntimeError, "")
            pipe.send(kind(f"a data worker cannot send what it has read ({error}){remedy}"))
        del batch  # its shared memory


def _noted(error: Exception) -> Exception:
    if not isinstance(error, InputError):  # whose one line is all that its reader needs
        error.add_note("in a data worker:\n" + traceback.format_exc())
    return error


def _end_with_parent() -> None:
    """Ends this worker when the main process is killed, whatever it hangs in."""
    parent, number = multiprocessing.parent_process(), os.getppid()
    while parent is not None and parent.is_alive() and os.getppid() == number:
        parent.join(1)
    os._exit(1)


def _say_if_dead(process: BaseProcess) -> None:
    process.join(1)
    code = process.exitcode
    if code is None:
        return
    name = signal.Signals(-code).name if code < 0 else ""
    if name == "SIGBUS":
        raise WorkerDied(f"shared memory was exhausted and a data worker ended: {_FREE_SHARED}") from None
    how = f"was killed by {name}" if name else f"ended with code {code}"
    raise WorkerDied(f"a data worker {how}, as when memory is exhausted: lower --workers or free memory") from None


def _pinned(batches: Iterator[Batch]) -> Iterator[Batch]:
    """In page-locked memory, copied there by a thread, one batch ahead of the loop."""
    device = torch.accelerator.current_device_index()

    def fetch(future: Future[Batch | None]) -> None:
        try:
            torch.accelerator.set_device_index(device)  # of this thread, which would begin with the first one
            batch = next(batches, None)
            if batch is not None:
                fields = {name: x.pin_memory() for name, x in batch._asdict().items() if isinstance(x, Tensor)}
                batch = batch._replace(**fields)
            future.set_result(batch)
        except BaseException as error:
            future.set_exception(error)

    def begin() -> Future[Batch | None]:
        future: Future[Batch | None] = Future()
        threading.Thread(target=fetch, args=(future,), daemon=True).start()
        return future

    following = begin()
    while (batch := following.result()) is not None:
        following = begin()
        yield batch
