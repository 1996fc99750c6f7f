"""Pooled features of frozen networks."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from normfree.config import MAX_PX
from normfree.errors import InputError, check_range
from normfree.models import Network, load
from normfree.weights import ModelInfo


def load_embedder(weights: str, px: int | None = None) -> tuple[Network, ModelInfo]:
    """The network of a weight file in float32 for `embed`, and its header with `px` for the pixels, where given.

    The file may have no classifier, and no names of its classes. Raises InputError.
    """
    check_range("px", px, 8, MAX_PX)
    model = load(weights).float()
    assert model.info is not None
    if model.out_indices is not None:
        raise InputError(f"{weights} gives feature maps (features_only), and has no pooled features")
    info = replace(model.info, eval_px=px or model.info.eval_px)
    model.head.global_pool = "avg"  # also for a file without pooling
    return model, info


def embed(model: Network, images: Tensor) -> Tensor:
    """Pooled features before the classifier, (N, num_features) float32, of prepared images (N, C, H, W)."""
    return model.forward_head(model.forward_features(images), pre_logits=True).float()
