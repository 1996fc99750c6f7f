"""The training stream as a function of (seed, step), evaluation in order, and what becomes of unreadable images."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data import (
    ArrayImages,
    Batch,
    EvalTransform,
    FolderImages,
    LabelledImages,
    Mixing,
    RandAugment,
    Samples,
    TrainTransform,
    cached,
    changed,
    eval_batches,
    fits_in_memory,
    inventory,
    open_evaluation,
    ordered_batches,
    sample_rng,
    stream_batches,
    train_batches,
)
from normfree.data.images import _free_bytes
from normfree.data.loader import WorkerDied, read_batches
from normfree.data.splits import hold_out
from normfree.errors import InputError

NUM_IMAGES, BATCH_SIZE = 23, 5


def arrays(count: int = NUM_IMAGES, kind: type[ArrayImages] = ArrayImages) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    names = [f"array/{index}" for index in range(count)]
    samples = kind(pixels=pixels, names=names)
    return LabelledImages(samples=samples, targets=[i % 2 for i in range(count)], class_names=("even", "odd"))


def stream(
    images: Any = None, start: int = 0, stop: int = 14, workers: int = 0, seed: int = 7, **options: Any
) -> list[Batch]:
    images = arrays() if images is None else images
    return list(
        train_batches(
            images,
            TrainTransform(8),
            batch_size=BATCH_SIZE,
            seed=seed,
            start_step=start,
            stop_step=stop,
            workers=workers,
            **options,
        )
    )


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.indices, b.indices)
        assert a.unreadable == b.unreadable
        for ours_mixed, theirs_mixed in ((a.mix_targets, b.mix_targets), (a.ratios, b.ratios)):
            assert (ours_mixed is None) == (theirs_mixed is None)
            assert ours_mixed is None or torch.equal(ours_mixed, theirs_mixed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures of 2 classes, of which `a/03.png` and `b/05.png` cannot be read."""
    rng = np.random.default_rng(1)
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(12):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number:02d}.png")
    (tmp_path / "a/03.png").write_bytes(b"")
    (tmp_path / "b/05.png").write_bytes(b"no pixels")
    return tmp_path


# --- the training stream ---


def test_batches_are_full_and_typed() -> None:
    for batch in stream():
        assert batch.images.shape == (BATCH_SIZE, 3, 8, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert torch.equal(batch.targets, batch.indices % 2)
        assert batch.unreadable == ()


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = torch.cat([batch.indices for batch in stream()]).tolist()
    epochs = [tuple(order[start : start + NUM_IMAGES]) for start in range(0, 3 * NUM_IMAGES, NUM_IMAGES)]
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert order[:NUM_IMAGES] != list(range(NUM_IMAGES))
    assert torch.cat([batch.indices for batch in stream(seed=8)]).tolist() != order


def test_an_image_is_cropped_anew_each_epoch() -> None:
    crops = torch.cat([batch.images[batch.indices == 4] for batch in stream()])
    assert len(crops) >= 3
    assert not torch.equal(crops[0], crops[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_anywhere_gives_the_rest_of_the_stream(workers: int) -> None:
    whole = stream()
    for start in (1, 4, 9) if workers == 0 else (4,):  # step 4 straddles the end of the first epoch
        assert_same(stream(start=start, workers=workers), whole[start:])


def test_the_stream_is_what_it_says() -> None:
    """Image by image: order, crop, nothing else."""
    images, transform = arrays(), TrainTransform(8)
    keys = order(3)
    for step, batch in enumerate(stream(images)):
        for i, (epoch, index) in enumerate(keys[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]):
            assert int(batch.indices[i]) == index
            assert torch.equal(batch.images[i], transform(images.read(index), sample_rng(7, epoch, index)))
        assert batch.mix_targets is batch.ratios is None


def order(epochs: int) -> list[tuple[int, int]]:
    """(epoch, index) of every place in the stream."""
    permutations = [sample_rng(7, epoch, 0, 1).permutation(NUM_IMAGES).tolist() for epoch in range(epochs)]
    return [(epoch, index) for epoch, permutation in enumerate(permutations) for index in permutation]


def test_workers_do_not_change_anything() -> None:
    assert_same(stream(workers=2), stream())


def test_spawned_workers_do_not_change_anything(folder: Path) -> None:
    images = open_evaluation(str(folder), ["a", "b"])
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = stream(images, workers=1, stop=4)
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert_same(spawned, stream(images, stop=4))


def test_more_workers_than_cores_are_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._utils.cpu_count", lambda: 1)
    assert_same(stream(workers=2, stop=2), stream(stop=2))


def test_neither_pinning_without_accelerator_warns_nor_is_torchs_generator_moved() -> None:
    before = torch.get_rng_state()
    batches = train_batches(
        arrays(),
        TrainTransform(8),
        batch_size=5,
        seed=7,
        start_step=0,
        stop_step=2,
        workers=0,
        pin_memory=True,
    )
    assert_same(list(batches), stream(stop=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_grey_images() -> None:
    batches = train_batches(
        arrays(), TrainTransform(8), batch_size=5, seed=0, start_step=0, stop_step=1, workers=0, channels=1
    )
    assert next(batches).images.shape == (5, 1, 8, 8)


def test_min_px_is_passed_on(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "0.jpg")
    images = FolderImages(root=str(tmp_path), paths=["0.jpg"])
    sizes = []

    def note(image: Image.Image, _: np.random.Generator) -> torch.Tensor:
        sizes.append(image.size)
        return torch.zeros(1, 1, 1, dtype=torch.uint8)

    for min_px in (None, 30):
        list(train_batches(images, note, batch_size=1, seed=0, start_step=0, stop_step=1, workers=0, min_px=min_px))
    assert sizes == [(64, 64), (32, 32)]


def test_a_batch_larger_than_the_data_set() -> None:
    with pytest.raises(InputError, match="batch size is 5 but there are 4 training images; 4 is the largest") as caught:
        train_batches(arrays(4), TrainTransform(8), batch_size=5, seed=0, start_step=0, stop_step=1, workers=0)
    assert "\n" not in str(caught.value)
    assert len(stream(arrays(5), stop=2)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_left_to_the_main_process(number: signal.Signals) -> None:
    """Ctrl-C must not take the workers away from a run that is about to write its last checkpoint."""
    batches = train_batches(
        arrays(kind=SlowImages), TrainTransform(8), batch_size=5, seed=7, start_step=0, stop_step=6, workers=1
    )
    received = [next(batches)]
    children = multiprocessing.active_children()
    assert children
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, number)
    received += batches
    assert_same(received, stream(stop=6))


class SlowImages(ArrayImages):
    """Slow enough for the workers to be at work still when the first batch arrives."""

    def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
        time.sleep(0.02)
        return super().read(index, channels, min_px)


# --- workers that end, hang or fail ---


def double(key: int) -> torch.Tensor:
    """Hangs at key 2, as a read from a dead network disk does; fails at 3; at 4 ends as where shared memory does."""
    if key == 2:
        time.sleep(600)
    if key == 3:
        raise KeyError("no such column")
    if key == 4:
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGBUS)
    return torch.tensor([2 * key])


def test_a_worker_that_dies_is_said_in_one_line_where_its_batch_is_awaited() -> None:
    batches = read_batches(double, [0, 1, 2, 0, 1, 0], workers=2)
    assert [int(next(batches)), int(next(batches))] == [0, 2]
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(5)  # and nothing is raised here, which may be in the middle of an update
        assert not child.is_alive()
    with pytest.raises(WorkerDied, match=r"data worker was killed by SIGKILL.* lower --workers") as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    with pytest.raises(WorkerDied, match=r"^shared memory was exhausted .* lower --workers"):
        next(read_batches(double, [4], workers=1))


def test_workers_that_hang_end_with_the_iteration() -> None:
    batches = read_batches(double, [0, 2, 2, 2], workers=3)
    assert int(next(batches)) == 0
    children = multiprocessing.active_children()
    assert len(children) == 3
    began = time.monotonic()
    batches.close()  # type: ignore
    assert all(not child.is_alive() for child in children)
    assert time.monotonic() - began < 3


HANG = """
import os, signal, sys, time
from normfree.data.loader import read_batches

def read(key):
    if key:
        time.sleep(600)
    return key

if __name__ == "__main__":
    batches = read_batches(read, [0, 1, 1, 1], workers=2)
    print(next(batches), flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_that_hang_end_with_the_program(end: str, tmp_path: Path) -> None:
    """Left in the middle of an iteration, or killed: where the output ends, all that held it open have ended."""
    (tmp_path / "hang.py").write_text(HANG.format(end=end))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(tmp_path / "hang.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_what_a_reader_raises_in_a_worker_is_raised() -> None:
    batches = read_batches(double, [0, 3], workers=2)
    assert int(next(batches)) == 0
    with pytest.raises(KeyError, match="no such column") as caught:
        next(batches)
    assert "in double" in "".join(caught.value.__notes__)
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="cannot send what it has read"):
        next(read_batches(lambda _: lambda: None, [0], workers=1))  # a function in a function cannot be pickled


def test_no_room_in_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    with pytest.raises(WorkerDied, match=r"No space left on device .* lower --workers, or give more shared memory"):
        next(read_batches(double, [0], workers=1))


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with one, as far as pinning goes; lists the threads that pin."""
    threads: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return threads


@pytest.mark.parametrize("workers", [0, 2])
def test_a_thread_pins_the_batches(workers: int, accelerator: list[str]) -> None:
    assert_same(stream(workers=workers, pin_memory=True, mixing=MIXING), stream(mixing=MIXING))
    assert len(accelerator) == 14 * 5  # tensors
    assert threading.main_thread().name not in accelerator


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_and_hanging_workers_behind_the_pinning_thread(workers: int, accelerator: list[str]) -> None:
    batches = read_batches(double_batch, [0, 3], workers, pin_memory=True)
    assert int(next(batches).images) == 0
    with pytest.raises(KeyError, match="no such column"):
        next(batches)
    batches = read_batches(double_batch, [0, 2], workers=1, pin_memory=True)
    assert int(next(batches).images) == 0
    began = time.monotonic()
    batches.close()  # type: ignore
    assert time.monotonic() - began < 3
    assert not multiprocessing.active_children()


def double_batch(key: int) -> Batch:
    return Batch(double(key), torch.tensor([0]), torch.tensor([0]), ())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_leaves_the_workers_alone() -> None:
    batches = read_batches(double, [0, 1, 0], workers=1)
    assert int(next(batches)) == 0
    if not (child := os.fork()):
        batches.close()  # type: ignore
        os._exit(0)
    os.waitpid(child, 0)
    assert [int(batch) for batch in batches] == [2, 0]


# --- samples without labels, and the samples of other tasks ---


@dataclass(frozen=True)
class Boxes:
    """Samples as detection makes them: images of different sizes, with boxes."""

    images: Samples

    def random(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        width = int(rng.integers(4, 40))
        pixels = torch.from_numpy(np.array(self.images.read(index).crop((0, 0, width, 6))))
        return {"image": pixels, "boxes": torch.tensor([[0, 0, width, 6]] * (index % 3)), "index": index}

    def whole(self, index: int) -> tuple[int, tuple[int, int]]:
        return index, self.images.read(index).size


def as_lists(samples: list[Any], unreadable: tuple[str, ...]) -> tuple[list[Any], tuple[str, ...]]:
    return samples, unreadable


@pytest.mark.parametrize(("workers", "pin_memory"), [(0, False), (2, False), (2, True)])
def test_any_task_can_make_its_own_batches(
    workers: int, pin_memory: bool, folder: Path, accelerator: list[str]
) -> None:
    """Pool, order, replacement of unreadable images and pinning are those of the classification stream."""
    images = open_evaluation(str(folder), ["a", "b"]).samples
    sample = Boxes(images).random
    batches = list(stream_batches(images, sample, as_lists, 5, 7, range(2, 12), workers, pin_memory))
    expected = stream(images, start=2, stop=12)
    assert len(batches) == 10
    for (samples, unreadable), classified in zip(batches, expected, strict=True):
        assert [sample["index"] for sample in samples] == classified.indices.tolist()
        assert unreadable == classified.unreadable
        for sample in samples:
            assert sample["boxes"].shape == (sample["index"] % 3, *([4] if sample["index"] % 3 else []))
            assert sample["image"].shape[1] < 40
    assert len(accelerator) == (10 * 5 * 2 if pin_memory else 0)


def test_batches_in_order_for_any_task(folder: Path) -> None:
    images = open_evaluation(str(folder), ["a", "b"]).samples
    batches = list(ordered_batches(images, Boxes(images).whole, as_lists, 6, workers=1))
    assert [index for samples, _ in batches for index, _ in samples] == [i for i in range(24) if i not in (3, 17)]
    assert {size for samples, _ in batches for _, size in samples} == {(40, 30)}
    assert [len(unreadable) for _, unreadable in batches] == [1, 0, 1, 0]


def test_samples_without_labels_have_targets_of_minus_one(folder: Path) -> None:
    images = open_evaluation(str(folder), ["a", "b"])
    for ours, theirs in zip(stream(images.samples), stream(images), strict=True):
        assert ours.targets.tolist() == [-1] * BATCH_SIZE
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.indices, theirs.indices)
    batch = next(evaluate(images.samples, 0))
    assert (batch.targets.tolist(), batch.targets.dtype) == ([-1] * 4, torch.int64)
    assert inventory(train=images.samples) == {"train": {"": [24, ANY]}}
    assert [len(part) for part in hold_out(images.samples, 0.25, 0)] != [24, 0]
    was, now = inventory(train=images.samples), inventory(train=images.samples.subset(range(23)))
    assert changed(was, now) == "the data set has 23 train images and had 24"


# --- mixing and augmentation ---

MIXING, IN_BATCH, AUGMENT = Mixing(0.2, 1.0), Mixing(0.2, 1.0, "batch"), RandAugment(2, 10, "pil")


def test_mixed_images_are_made_of_two_in_order() -> None:
    images, transform, keys = arrays(), TrainTransform(8), order(7)
    for step, batch in enumerate(stream(images, mixing=MIXING, augment=AUGMENT)):
        assert batch.images.dtype == torch.uint8
        assert batch.mix_targets is not None
        assert batch.ratios is not None
        assert batch.ratios.dtype == torch.float32
        for i in range(BATCH_SIZE):
            place = 2 * (step * BATCH_SIZE + i)
            (epoch, index), (mix_epoch, mix_index) = keys[place], keys[place + 1]
            rng = sample_rng(7, epoch, index)
            first = transform(images.read(index), rng)
            second = transform(images.read(mix_index), sample_rng(7, mix_epoch, mix_index))
            mixed, ratio = MIXING(first, second, i, rng)
            expected = torch.from_numpy(AUGMENT(mixed.permute(1, 2, 0).numpy(), rng)).permute(2, 0, 1)
            assert torch.equal(batch.images[i], expected)
            assert (int(batch.indices[i]), int(batch.targets[i])) == (index, images.targets[index])
            assert int(batch.mix_targets[i]) == images.targets[mix_index]
            assert float(batch.ratios[i]) == pytest.approx(ratio)


@pytest.mark.parametrize("augment", [None, AUGMENT])
def test_pairs_of_a_batch_are_neighbours_that_are_read_once(augment: RandAugment | None) -> None:
    """An image is the first of the pair with the next one, and the second of that with the one before."""
    images, transform, keys = arrays(), TrainTransform(8), order(4)
    read = []

    class Counted(ArrayImages):
        def read(self, index: int, channels: int = 3, min_px: int | None = None) -> Image.Image:
            read.append(index)
            return super().read(index, channels, min_px)

    for step, batch in enumerate(stream(arrays(kind=Counted), mixing=IN_BATCH, augment=augment)):
        part = keys[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        rngs = [sample_rng(7, epoch, index) for epoch, index in part]
        crops = [transform(images.read(index), rng) for (_, index), rng in zip(part, rngs, strict=True)]
        assert batch.mix_targets is not None
        assert batch.ratios is not None
        assert batch.indices.tolist() == [index for _, index in part]
        assert batch.mix_targets.tolist() == batch.targets.roll(-1).tolist()
        for i, (rng, crop) in enumerate(zip(rngs, crops, strict=True)):
            mixed, ratio = IN_BATCH(crop, crops[(i + 1) % BATCH_SIZE], i, rng)
            if augment:
                mixed = torch.from_numpy(augment(mixed.permute(1, 2, 0).numpy(), rng)).permute(2, 0, 1)
            assert torch.equal(batch.images[i], mixed)
            assert float(batch.ratios[i]) == pytest.approx(ratio)
    assert read == [index for _, index in keys[: 14 * BATCH_SIZE]]


def test_a_batch_of_one_has_no_pairs() -> None:
    with pytest.raises(InputError, match="at least 2"):
        train_batches(
            arrays(), TrainTransform(8), batch_size=1, seed=0, start_step=0, stop_step=1, workers=0, mixing=IN_BATCH
        )


@pytest.mark.parametrize(
    "options",
    [{"augment": AUGMENT}, {"mixing": MIXING}, {"mixing": MIXING, "augment": AUGMENT}, {"mixing": IN_BATCH}],
)
def test_mixed_and_augmented_streams_hang_on_seed_and_step_alone(options: dict) -> None:
    whole = stream(**options)
    for start in (1, 4, 9):  # step 2, and with mixing step 4 as well, straddle the end of an epoch
        assert_same(stream(start=start, **options), whole[start:])
    assert_same(stream(start=3, workers=2, **options), whole[3:])
    assert not torch.equal(stream(seed=8, **options)[0].images, whole[0].images)


def test_augmentation_begins_where_the_crop_ended() -> None:
    for plain, augmented in zip(stream(), stream(augment=RandAugment(0)), strict=True):
        assert torch.equal(plain.images, augmented.images)  # no operations, and the crops are the same ones


@pytest.mark.parametrize("channels", [1, 3])
def test_float_crops_are_mixed_as_they_are_and_cut_off_for_augmentation(channels: int) -> None:
    transform = TrainTransform(8, style="paper")
    options: dict = dict(batch_size=5, seed=7, start_step=0, stop_step=4, workers=0, channels=channels)
    mixed = list(train_batches(arrays(), transform, mixing=MIXING, **options))
    augmented = list(train_batches(arrays(), transform, mixing=MIXING, augment=RandAugment(0), **options))
    for a, b in zip(mixed, augmented, strict=True):
        assert a.images.shape == b.images.shape == (5, channels, 8, 8)
        assert (a.images.dtype, b.images.dtype) == (torch.float32, torch.uint8)
        assert torch.equal(a.images.clamp(0, 255).to(torch.uint8), b.images)
        assert a.images.frac().any()


def test_partners_that_cannot_be_read_are_replaced(folder: Path) -> None:
    images = open_evaluation(str(folder), ["a", "b"])
    assert isinstance(images.samples, FolderImages)
    for path in images.samples.paths[:18]:  # most of them, so that first and second partners are hit
        (folder / path).write_bytes(b"")
    batches = stream(images, stop=24, mixing=MIXING)
    assert_same(stream(images, stop=24, mixing=MIXING, workers=2), batches)
    assert_same(stream(images, start=11, stop=24, mixing=MIXING), batches[11:])
    assert {name for batch in batches for name in batch.unreadable} >= {
        f"a/{i:02d}.png: the file is empty" for i in range(12)
    }
    for batch in batches:
        assert batch.mix_targets is not None
        assert set(batch.indices.tolist()) <= set(range(18, 24))
        assert batch.targets.tolist() == batch.mix_targets.tolist() == [1] * BATCH_SIZE


# --- unreadable images ---


def test_unreadable_images_are_replaced_and_reported(folder: Path) -> None:
    images = open_evaluation(str(folder), ["a", "b"])
    batches = stream(images, stop=24)  # 120 places = 5 epochs
    names = [images.name(i) for i in range(len(images))]
    bad = {names.index(name) for name in ("a/03.png", "b/05.png")}
    shown = torch.cat([batch.indices for batch in batches]).tolist()
    assert len(bad) == 2
    assert not bad & set(shown)
    assert all(batch.images.shape == (BATCH_SIZE, 3, 8, 8) for batch in batches)
    assert all(batch.targets.tolist() == [images.targets[i] for i in batch.indices.tolist()] for batch in batches)
    reports = Counter(report for batch in batches for report in batch.unreadable)
    assert set(reports) == {"a/03.png: the file is empty", "b/05.png: not an image in a known format"}
    assert min(reports.values()) >= 5
    assert_same(stream(images, stop=24, workers=2), batches)
    assert_same(stream(images, start=11, stop=24), batches[11:])


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error_of_one_line(workers: int, folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    images = open_evaluation(str(folder), ["a", "b"])
    with pytest.raises(InputError, match=r"cannot read [ab]/\d\d.png nor 20 others .* the file is empty$") as caught:
        stream(images, workers=workers)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()  # though the error holds the frames that it passed


# --- pixels that stay in memory ---


@pytest.mark.parametrize("options", [{}, {"channels": 1}, {"mixing": MIXING, "augment": AUGMENT}, {"workers": 2}])
def test_cached_images_give_the_same_batches(options: dict, folder: Path) -> None:
    """Over five epochs, with images that cannot be read; the files are read once."""
    images = open_evaluation(str(folder), ["a", "b"])
    kept = cached(images, options.get("channels", 3))
    batches = stream(kept, stop=24, **options)
    assert_same(batches, stream(images, stop=24, **options))
    assert {name for batch in batches for name in batch.unreadable} >= {"a/03.png: the file is empty"}
    if not options.get("workers"):
        for path in folder.glob("*/*.png"):
            path.write_bytes(b"")
        shown = [int(index) for batch in batches for index in batch.indices]
        assert all(kept.read(index, options.get("channels", 3)) for index in shown)


def test_cached_images_are_decoded_as_they_would_be(tmp_path: Path) -> None:
    """JPEGs at a fraction of their size, where `min_px` allows that; a subset caches for itself."""
    pixels = np.random.default_rng(2).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(pixels[number:]).save(tmp_path / f"{number}.jpg", quality=80)
    paths = ["0.jpg", "1.jpg", "2.jpg"]
    files = FolderImages(root=str(tmp_path), paths=paths)
    images = LabelledImages(samples=files, targets=[0, 1, 1], class_names=("a", "b"), notes=("so",))
    kept = cached(images, 3, 40)
    for _ in range(2):
        for channels, min_px in ((3, 40), (3, None), (1, 40)):
            assert np.array_equal(kept.read(0, channels, min_px), images.read(0, channels, min_px))
    assert kept.read(0, 3, 40).size == (65, 50)
    part = kept.subset([2, 0])
    assert np.array_equal(part.read(0, 3, 40), images.read(2, 3, 40))
    assert (part.targets, part.name(1), part.size(1), len(part)) == ([1, 0], "0.jpg", (130, 100), 2)
    assert (kept.notes, kept.class_names, kept.source(1)) == (("so",), ("a", "b"), images.source(1))
    assert np.array_equal(kept.order(sample_rng(0, 0, 0)), images.order(sample_rng(0, 0, 0)))
    there = arrays()
    assert cached(there).samples is there.samples
    assert cached(there.samples) is there.samples
    assert np.array_equal(cached(files).read(0), images.read(0))


def test_what_fits_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pictures of 3,600 bytes, of which two are unreadable."""
    images = open_evaluation(str(folder), ["a", "b"])
    for free, fits in ((2**40, True), (4 * 22 * 3600, True), (4 * 22 * 3600 - 4, False)):
        monkeypatch.setattr("normfree.data.images._free_bytes", lambda free=free: free)
        assert fits_in_memory(images) == fits
    monkeypatch.setattr("normfree.data.images._free_bytes", lambda: float("inf"))
    pixels = np.broadcast_to(np.uint8(0), (2**30 // 768 + 1, 16, 16, 3))  # one more than a GiB holds
    names = [""] * len(pixels)
    many = ArrayImages(pixels=pixels, names=names)
    assert not fits_in_memory(many)
    assert fits_in_memory(ArrayImages(pixels=pixels[:9], names=names[:9]))
    assert fits_in_memory(images.subset([]))
    read = []
    monkeypatch.setattr(ArrayImages, "size", lambda _, index: read.append(index) or (4000, 3000))
    assert not fits_in_memory(many)
    assert read == [0]  # of a large data set, which may be far away, no more than that


def test_free_memory_is_what_the_system_says() -> None:
    free = _free_bytes()
    assert free > 2**20
    assert os.path.exists("/proc/meminfo") == (free < float("inf"))


# --- evaluation ---


def evaluate(images: Any, workers: int, batch_size: int = 5, **options: Any) -> Iterator[Batch]:
    return eval_batches(images, EvalTransform(8), batch_size=batch_size, workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(workers: int) -> None:
    images = arrays()
    batches = list(evaluate(images, workers))
    assert [len(batch.images) for batch in batches] == [5, 5, 5, 5, 3]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(NUM_IMAGES))
    assert torch.cat([batch.targets for batch in batches]).tolist() == images.targets
    assert torch.equal(batches[4].images[2], EvalTransform(8)(images.read(22)))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_unreadable_images_out(workers: int, folder: Path) -> None:
    images = open_evaluation(str(folder), ["b", "a"])
    batches = list(evaluate(images, workers))
    assert [len(batch.images) for batch in batches] == [4, 5, 5, 4, 4]
    assert torch.cat([batch.indices for batch in batches]).tolist() == [i for i in range(24) if i not in (3, 17)]
    assert torch.cat([batch.targets for batch in batches]).tolist() == [1] * 11 + [0] * 11
    assert [batch.unreadable for batch in batches if batch.unreadable] == [
        ("a/03.png: the file is empty",),
        ("b/05.png: not an image in a known format",),
    ]


@pytest.mark.parametrize(("crop", "dtype"), [("center", torch.uint8), ("resize_crop", torch.float32)])
def test_a_batch_of_unreadable_images_is_empty(crop: Any, dtype: torch.dtype, folder: Path) -> None:
    images = open_evaluation(str(folder), ["a", "b"]).subset([3, 17, 0])
    batches = list(eval_batches(images, EvalTransform(8, crop), batch_size=2, workers=0, channels=1))
    assert batches[0].images.shape == (0, 1, 8, 8)
    assert batches[0].images.dtype == batches[1].images.dtype == dtype
    assert batches[0].targets.dtype == batches[0].indices.dtype == torch.int64
    assert len(batches[0].targets) == len(batches[0].indices) == 0
    assert len(batches[0].unreadable) == 2
    assert len(batches[1].images) == 1
