"""The kernel that crops and resizes has the bits of Pillow, for any box, processor and process."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import normfree.native
from normfree.data import ArrayImages, EvalTransform, TrainTransform, sample_rng, train_batches, transforms
from normfree.data.transforms import resample
from normfree.native import library, status

KERNEL = Path(normfree.native.__file__).parent / "resample.cpp"
needs_kernels = pytest.mark.skipif(library() is None, reason=f"kernels {status()}")
needs_the_order_of_pillow_13 = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="an older Pillow")


def noise(width: int, height: int, channels: int = 3, contrast: bool = False) -> Image.Image:
    """All values, or with `contrast` black and white only, which overshoot most."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    pixels = np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(np.where(pixels < 128, 0, 255).astype(np.uint8) if contrast else pixels)


def pillow(image: Image.Image, box: tuple[float, float, float, float], px: int, mirrored: bool = False) -> torch.Tensor:
    pixels = np.atleast_3d(np.asarray(image.resize((px, px), Image.Resampling.BICUBIC, box=box)))
    return torch.from_numpy((pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1).copy())


SIDE = st.integers(1, 300)
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@settings(max_examples=400, deadline=None)
@given(SIDE, SIDE, SHARES, SHARES, st.integers(1, 80), st.booleans(), st.booleans(), st.sampled_from([1, 3]))
@example(40, 40, [0, 1], [0, 1], 40, True, True, 3)  # nothing to do
@example(100, 100, [0.1, 0.5], [0.2, 0.6], 40, True, True, 3)  # a crop and nothing else
@example(300, 1, [0, 1], [0, 1], 1, False, True, 1)
@example(1, 300, [0, 1], [0, 1], 40, False, True, 3)
@example(300, 299, [0, 1], [0, 1], 299, False, False, 3)
@example(192, 385, [0, 1], [0, 1], 192, False, True, 3)  # columns first in Pillow 13, and the next one not
@example(193, 194, [0, 1], [0, 1], 192, False, True, 3)
def test_every_box_is_pillows(width, height, across, down, px, whole_pixels, mirrored, channels) -> None:
    left, right, upper, lower = *(share * width for share in across), *(share * height for share in down)
    if whole_pixels:
        left, right, upper, lower = round(left), round(right), round(upper), round(lower)
    if right - left < 0.01 or lower - upper < 0.01:
        left, upper, right, lower = 0, 0, width, height
    image, box = noise(width, height, channels, contrast=px % 2 == 0), (left, upper, right, lower)
    assert torch.equal(resample(image, box, px, mirrored), pillow(image, box, px, mirrored))


@pytest.mark.parametrize("channels", [1, 3])
def test_transforms_are_pillows(channels: int) -> None:
    for index, size in enumerate([(320, 240), (240, 500), (64, 64), (9, 700), (2300, 2000)]):
        image = noise(*size, channels)  # the last one is in pieces, if it is RGB
        for crop in (lambda: TrainTransform(48)(image, sample_rng(0, 0, index)), lambda: EvalTransform(48)(image)):  # noqa: B023
            ours = crop()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transforms, "library", lambda: None)
                assert torch.equal(ours, crop())


@needs_kernels
@needs_the_order_of_pillow_13
def test_the_kernel_is_used_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, other = noise(60, 50), noise(2300, 2000), noise(60, 50).convert("RGBA")
    assert resample(other, (0, 0, 60, 50), 20).shape == (4, 20, 20)
    monkeypatch.setattr(Image.Image, "resize", None)
    for image in (small, small.convert("L"), small.crop((1, 2, 30, 20)), Image.fromarray(np.zeros((30, 40), np.uint8))):
        assert resample(image, (0, 0, 20, 18), 20).dtype == torch.uint8
    with pytest.raises(TypeError):
        resample(large, (0, 0, 60, 50), 20)


@needs_kernels
def test_workers_find_it_compiled(monkeypatch: pytest.MonkeyPatch, fresh_kernels: Callable[[], None]) -> None:
    """The main process compiles it before they start, and their pixels are those of Pillow."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 50, 40, 3), dtype=np.uint8)
    images = ArrayImages(pixels=pixels, names=[str(i) for i in range(12)])
    options = dict(batch_size=4, seed=1, start_step=0, stop_step=6)
    batches = train_batches(images, TrainTransform(24), workers=1, **options)
    found = [next(batches)]
    assert normfree.native._load.cache_info().currsize == 1
    found += batches
    monkeypatch.setattr(transforms, "library", lambda: None)
    for batch, expected in zip(found, train_batches(images, TrainTransform(24), workers=0, **options), strict=True):
        assert torch.equal(batch.images, expected.images)


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors without AVX are x86's")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(processor: str, monkeypatch: pytest.MonkeyPatch, fresh_kernels: Callable[[], None]) -> None:
    """4 and 8 lanes, if the machine has them: equal bits, since the arithmetic is in integers."""
    if processor == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("a processor without AVX2")
    monkeypatch.setenv("NORMFREE_MARCH", processor)
    fresh_kernels()
    assert library() is not None
    for channels in (1, 3):
        for width, height, px in ((97, 61, 32), (61, 197, 33), (20, 20, 50)):
            image, box = noise(width, height, channels, contrast=True), (1.5, 2.25, width - 3.5, height)
            assert torch.equal(resample(image, box, px, True), pillow(image, box, px, True))


PROGRAM = r"""
#include <vector>

#include "kernels.h"

int main() {
    int faults = 0;
    for (int64_t width : {1, 7, 40}) for (int64_t height : {1, 16, 33}) for (int64_t px : {1, 15, 16, 17, 40})
        for (int32_t channels : {1, 3}) for (int32_t first : {0, 1}) for (float inset : {0.0f, 0.4f}) {
            std::vector<uint8_t> in(width * height * (channels == 1 ? 1 : 4), 7), out(channels * px * px);
            normfree_resample(in.data(), width, height, channels, inset, inset, width - inset, height - inset / 2, px,
                              first, first, out.data());
            for (uint8_t value : out) faults += value != 7;
        }
    return faults ? 1 : 0;
}
"""


@needs_kernels
def test_the_kernel_stays_within_its_memory_and_uses_nothing_unset(tmp_path: Path, compiler: list[str]) -> None:
    """In a program under the address sanitizer, which fills uninitialised memory with 255."""
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    flags = [f"-I{KERNEL.parent}", "-O1", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    built = subprocess.run([*compiler, *flags, source, KERNEL, "-o", program], capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    options = "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    ran = subprocess.run([program], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": options})
    assert ran.returncode == 0, ran.stderr[-2000:]
