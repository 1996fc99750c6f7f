"""Image networks without normalization layers: NFNets, adaptive gradient clipping, and the recipe that trains them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normfree.models import create_model, list_models, load, save

__all__ = ["create_model", "list_models", "load", "save"]


def __getattr__(name: str) -> Any:
    """The public names are imported when they are first used: torch takes seconds, `normfree --help` must not."""
    if name in __all__:
        return getattr(import_module("normfree.models"), name)
    raise AttributeError(f"module 'normfree' has no attribute {name!r}")
