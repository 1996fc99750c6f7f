"""Weight files of networks and of detectors. What a detector needs is imported only if there is one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from torch import nn

from normfree import models
from normfree.models.files import ZOO, bare, network_of
from normfree.weights import ModelInfo
from normfree.weights.file import DETECTOR, Weights
from normfree.weights.read import read

if TYPE_CHECKING:
    from normfree.tasks.detection.model import Detector


def load(path: str | os.PathLike) -> models.Network | Detector:
    """The network or detector in a weight file, in evaluation mode on the CPU, with the file's header as `model.info`.

    `path` is as in `normfree.models.load`, whose errors are raised.
    """
    return model_of(read(path, ZOO), path)


def model_of(weights: Weights, path: str | os.PathLike) -> models.Network | Detector:
    """`load`, for a file that has been read."""
    if weights.info.architecture != DETECTOR:
        return network_of(weights, path)
    from normfree.tasks.detection.model import detector_of

    return detector_of(weights, path)


def save(model: nn.Module, path: str | os.PathLike, info: ModelInfo | None = None) -> None:
    """Writes a network or detector as one file, which `load` reads; arguments and errors of `normfree.models.save`."""
    detection = sys.modules.get("normfree.tasks.detection.model")  # there is no detector without it
    if detection is not None and isinstance(bare(model), detection.Detector):
        detection.save_detector(model, path, info)
    else:
        models.save(model, path, info)
