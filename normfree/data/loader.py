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
from normfree.data.images import ImageSet, UnreadableImage
from normfree.data.mixing import Mixing
from normfree.data.randaugment import RandAugment
from normfree.data.transforms import sample_rng, to_tensor
from normfree.native import library

TrainFunction = Callable[[Image.Image, np.random.Generator], Tensor]
EvalFunction = Callable[[Image.Image], Tensor]
_Sample = tuple[Tensor, int, np.random.Generator]

_ORDER_STREAM, _REPLACEMENT_STREAM = 1, 2
_MAX_REPLACEMENTS = 20


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

    With `mixing`, image p of the stream is made of images 2p and 2p + 1 of the one without, so that it passes the data
    set twice as fast, as the released code's does. `augment` works on what has been cropped and mixed.

    Raises `InputError` for a batch larger than the data set and, while iterating, if no replacement can be read either.
    """
    if batch_size > len(images):
        largest = f"{len(images)} is the largest that fits"
        raise InputError(f"the batch size is {batch_size} but there are {len(images)} training images; {largest}")
    reader = _TrainReader(images, transform, seed, channels, min_px, mixing, augment)
    images_per_step = batch_size if mixing is None else 2 * batch_size
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
class _TrainReader(Dataset):
    """Keys to their batch. An `InputError` is returned, not raised: torch would put a worker's traceback into it."""

    images: ImageSet
    transform: TrainFunction
    seed: int
    channels: int
    min_px: int | None
    mixing: Mixing | None
    augment: RandAugment | None

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | InputError:
        unreadable: list[str] = []
        try:
            samples = [self._sample(epoch, index, unreadable) for epoch, index in keys]
        except InputError as error:
            return error
        reports = tuple(dict.fromkeys(unreadable))
        if self.mixing is None:
            tensors = [self._augmented(image, rng) for image, _, rng in samples]
            return Batch(torch.stack(tensors), *self._labels(samples), reports)
        firsts, seconds = samples[0::2], samples[1::2]
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
class _EvalReader(Dataset):
    images: ImageSet
    transform: EvalFunction
    channels: int
    min_px: int | None

    def __getitem__(self, keys: range) -> Batch | InputError:
        tensors, indices, unreadable = [], [], []
        for index in keys:
            try:
                tensors.append(self.transform(self.images.read(index, self.channels, self.min_px)))
                indices.append(index)
            except UnreadableImage as error:
                unreadable.append(str(error))
            except InputError as error:
                return error
        targets = torch.tensor([self.images.targets[index] for index in indices], dtype=torch.int64)
        stacked = torch.stack(tensors) if tensors else self._no_images()
        return Batch(stacked, targets, torch.tensor(indices, dtype=torch.int64), tuple(unreadable))

    def _no_images(self) -> Tensor:
        """An empty batch of the shape and type that the transform gives."""
        return self.transform(Image.new("L" if self.channels == 1 else "RGB", (64, 64)))[None][:0]


def read_batches(reader: Dataset, keys: Iterable, workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Read the keys of one batch after another, in order, in `workers` processes (0: in this one)."""
    if workers:
        library()  # compiled here, once, and not in each worker
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
    error = None
    for batch in batches:
        if isinstance(batch, InputError):
            error = InputError(str(batch))  # `batch` itself would hold this frame
            break
        yield batch
    del batches  # ends the workers; left to the garbage collector with the error's frames, they would not end
    if error:
        raise error


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach every process; only the main one decides, and may still want batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
