"""Image networks without normalization layers: NFNets, adaptive gradient clipping, and the recipe that trains them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfree.analysis.signal import signal_propagation
    from normfree.conversion.convert import convert_to_nf
    from normfree.models import create_model, list_models
    from normfree.tasks.detection.model import create_detector
    from normfree.tasks.files import load, save

__all__ = ["convert_to_nf", "create_detector", "create_model", "list_models", "load", "save", "signal_propagation"]

_HOMES = {
    "convert_to_nf": "normfree.conversion.convert",
    "create_detector": "normfree.tasks.detection.model",
    "create_model": "normfree.models",
    "list_models": "normfree.models",
    "load": "normfree.tasks.files",
    "save": "normfree.tasks.files",
    "signal_propagation": "normfree.analysis.signal",
}


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first used: torch takes seconds, `normfree --help` must not."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'normfree' has no attribute {name!r}")
