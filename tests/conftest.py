import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from normfree import native

# no deadlines, since machines are shared; in CI the same examples every time
settings.register_profile("normfree", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("normfree")


def pytest_configure(config: pytest.Config) -> None:
    config.option.randomly_reset_seed = False  # of pytest-randomly, which is here for the order
    native.library()  # compiled once, before there are workers; what is said if there are no kernels is said here


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws does not hang on the tests before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


pytest_runtest_call = pytest_runtest_setup


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"kernels {native.status()}")
    if seed := config.getoption("randomly_seed", None):
        terminalreporter.write_line(f"the same order: pytest --randomly-seed={seed}")


COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}


def draw(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """A noisy picture of one colour, of odd and even sides."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(20, 33)), int(rng.integers(20, 33)), 3)
    pixels = np.clip(rng.normal(colour, 40, size), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


@pytest.fixture
def fresh_kernels() -> Iterator[Callable[[], None]]:
    """Has the kernels looked for again, and each time that it is called; afterwards they are what they were."""

    def forget() -> None:
        native._state.cache_clear()
        native._load.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
        patch.setattr(native, "_state", functools.cache(native._state.__wrapped__))
        yield forget


@pytest.fixture
def compiler() -> list[str]:
    """The command of the C++ compiler, with the option that names the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NORMFREE_NATIVE", raising=False)
        command, version, _ = native._wanted()
    return [*command, native._flags()[-1]] if version else pytest.skip("no C++ compiler")


@pytest.fixture
def photos(tmp_path) -> Path:
    """ROOT/train/CLASS and ROOT/validation/CLASS: 3 classes, 24 + 6 pictures each."""
    root = tmp_path / "photos"
    for c, (name, colour) in enumerate(COLOURS.items()):
        for part, count in (("train", 24), ("validation", 6)):
            for i in range(count):
                draw(root / part / name / f"{i:02d}.jpg", colour, 1000 * c + 100 * (part == "train") + i)
    return root
