"""Recipes: functions from a data path to a run. `normfree train --recipe NAME` starts from one of these."""

from collections.abc import Callable

from normfree.config import ClassificationRun
from normfree.recipes import imagenet, small

RECIPES: dict[str, Callable[[str], ClassificationRun]] = {
    "mnist5k": small.mnist5k,
    **imagenet.RECIPES,
}
