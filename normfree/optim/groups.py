"""Which parameter is decayed, and which is clipped."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from normfree.config import InputError


def _is_gain(p: nn.Parameter) -> bool:
    """Bias, gain or scalar; a gain may be stored as (C, 1, 1, 1). The weight of a one-class head is none."""
    return p.ndim <= 1 or (p.ndim > 2 and p.numel() == p.shape[0])


def param_groups(
    model: nn.Module,
    weight_decay: float = 2e-5,
    clipping: float | None = 0.01,
    classifier: nn.Module | Literal["auto"] | None = "auto",
) -> list[dict[str, Any]]:
    """The three groups of the released code (experiment_nfnets.py), for `SGD_AGC`, `AGC` and any torch optimizer.

    - gains, biases, SkipInit gains (every vector and scalar): clipped, not decayed
    - the weight of the classifier: decayed, not clipped (its bias is in the first group)
    - all other weights: clipped and decayed

    Every trainable parameter is in exactly one group; groups that would be empty are left out.

    Args:
        classifier: the last linear layer. "auto" asks `model.get_classifier()`, as networks of ours and timm's offer;
            None clips everything.

    Raises:
        InputError: "auto" and the model does not say; a classifier that is no layer of `model`.
    """
    if classifier == "auto":
        ask = getattr(model, "get_classifier", None)
        if ask is None:
            raise InputError(
                f"{type(model).__name__} has no get_classifier(): pass classifier=model.fc, "
                "or whatever its last linear layer is called, or None to clip every layer"
            )
        classifier = ask()
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if classifier is not None and classifier not in set(model.modules()):
        raise InputError("the classifier given is no layer of the model")
    unclipped = set() if classifier is None else {p for p in classifier.parameters() if not _is_gain(p)}

    vectors, heads, rest = [], [], []
    for p in trainable:
        (vectors if _is_gain(p) else heads if p in unclipped else rest).append(p)
    groups = [
        dict(params=rest, weight_decay=weight_decay, clipping=clipping),
        dict(params=vectors, weight_decay=0.0, clipping=clipping),
        dict(params=heads, weight_decay=weight_decay, clipping=None),
    ]
    assert sorted(map(id, vectors + heads + rest)) == sorted(map(id, trainable))
    return [group for group in groups if group["params"]]
