import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# no deadlines, since machines are shared; in CI the same examples every time
settings.register_profile("normfree", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("normfree")

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}


def draw(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """A noisy picture of one colour, of odd and even sides."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(20, 33)), int(rng.integers(20, 33)), 3)
    pixels = np.clip(rng.normal(colour, 40, size), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


@pytest.fixture
def photos(tmp_path) -> Path:
    """ROOT/train/CLASS and ROOT/validation/CLASS: 3 classes, 24 + 6 pictures each."""
    root = tmp_path / "photos"
    for c, (name, colour) in enumerate(COLOURS.items()):
        for part, count in (("train", 24), ("validation", 6)):
            for i in range(count):
                draw(root / part / name / f"{i:02d}.jpg", colour, 1000 * c + 100 * (part == "train") + i)
    return root
