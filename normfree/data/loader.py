"""Batches: an endless shuffled training stream that is a function of (seed, step), and one pass for evaluation."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normfree.config import InputError
from normfree.data.sources import ImageSet, UnreadableImage
from normfree.data.transforms import sample_rng

TrainFunction = Callable[[Image.Image, np.random.Generator], Tensor]
EvalFunction = Callable[[Image.Image], Tensor]

_ORDER_STREAM, _REPLACEMENT_STREAM = 1, 2
_MAX_REPLACEMENTS = 20


class Batch(NamedTuple):
    """`images` (N, C, H, W), uint8 or float32; `targets` and `indices` (N,) int64; `unreadable`: "name: reason"."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: tuple[str, ...]


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
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `stop_step` (exclusive) of the training stream, the same for any `workers`.

    The stream runs through one permutation of the images an epoch, and batches straddle the ends of epochs, so that all
    are full. An image that cannot be read gives its place to another, drawn by (seed, epoch, index), and is listed in
    its batch's `unreadable`. `transform(image, rng)` gives a tensor (C, H, W); `min_px` goes to `ImageSet.read`.
    Raises `InputError` for a batch larger than the data set and, while iterating, if no replacement can be read either.
    """
    if batch_size > len(images):
        largest = f"{len(images)} is the largest that fits"
        raise InputError(f"the batch size is {batch_size} but there are {len(images)} training images; {largest}")
    reader = _TrainReader(images, transform, seed, channels, min_px)
    keys = _TrainKeys(len(images), batch_size, seed, range(start_step, stop_step))
    return _batches(reader, keys, workers, pin_memory)


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
    return _batches(_EvalReader(images, transform, channels, min_px), keys, workers, pin_memory)


@dataclass(frozen=True)
class _TrainKeys:
    """One list of (epoch, index) for each step."""

    num_images: int
    batch_size: int
    seed: int
    steps: range

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0)
        for step in self.steps:
            keys = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    order = sample_rng(self.seed, epoch, 0, _ORDER_STREAM).permutation(self.num_images)
                keys.append((epoch, int(order[position % self.num_images])))
            yield keys


@dataclass(frozen=True)
class _TrainReader(Dataset):
    """Keys to their batch. An `InputError` is returned, not raised: torch would put a worker's traceback into it."""

    images: ImageSet
    transform: TrainFunction
    seed: int
    channels: int
    min_px: int | None

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | InputError:
        tensors, indices, unreadable = [], [], []
        for epoch, index in keys:
            try:
                image, shown = self._read(epoch, index, unreadable)
            except InputError as error:
                return error
            tensors.append(self.transform(image, sample_rng(self.seed, epoch, index)))
            indices.append(shown)
        targets = [self.images.targets[index] for index in indices]
        return Batch(
            torch.stack(tensors), torch.tensor(targets), torch.tensor(indices), tuple(dict.fromkeys(unreadable))
        )

    def _read(self, epoch: int, index: int, unreadable: list[str]) -> tuple[Image.Image, int]:
        """Image `index`, or the first readable one drawn in its place, and which it is; failures go to `unreadable`."""
        replacements = sample_rng(self.seed, epoch, index, _REPLACEMENT_STREAM)
        candidate = index
        for _ in range(1 + _MAX_REPLACEMENTS):
            try:
                return self.images.read(candidate, self.channels, self.min_px), candidate
            except UnreadableImage as error:
                unreadable.append(str(error))
                candidate = int(replacements.integers(len(self.images)))
        name = self.images.name(index)
        raise InputError(
            f"cannot read {name} nor {_MAX_REPLACEMENTS} others drawn in its place; first: {unreadable[0]}"
        )


@dataclass(frozen=True)
class _EvalReader(Dataset):
    images: ImageSet
    transform: EvalFunction
    channels: int
    min_px: int | None

    def __getitem__(self, keys: range) -> Batch:
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


def _batches(reader: Dataset, keys: Iterable, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Read the keys of one batch after another, in order, in `workers` processes (0: in this one)."""
    with warnings.catch_warnings():
        # More workers than cores is for the user to choose: it is no fault where reading waits for a disk or network.
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
        loader = DataLoader(
            reader,
            sampler=keys,
            batch_size=None,  # a key is a whole batch: the reader makes the tensors
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_main,
            pin_memory=pin_memory and torch.accelerator.is_available(),  # torch warns where there is nothing to pin for
            generator=torch.Generator(),  # of worker seeds, which nothing uses; else each pass would move torch's own
        )
        return _raise_errors(iter(loader))


def _raise_errors(batches: Iterator[Batch | InputError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach every process; only the main one decides, and may still want batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
