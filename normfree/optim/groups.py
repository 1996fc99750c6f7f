"""Which parameter is decayed, and which is clipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from normfree.config import InputError

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _is_gain(p: Tensor) -> bool:
    """Bias, gain or scalar; a gain may be stored as (C, 1, 1, 1). The weight of a one-class head is none."""
    return p.ndim <= 1 or (p.ndim > 2 and p.numel() == p.shape[0])


def param_groups(
    model: nn.Module,
    weight_decay: float = 2e-5,
    clipping: float | None = 0.01,
    classifier: nn.Module | Literal["auto"] | None = "auto",
    exempt: Sequence[nn.Module] = (),
) -> list[dict[str, Any]]:
    """The three groups of the released code (experiment_nfnets.py), for `SGD_AGC`, `AGC` and any torch optimizer.

    - gains, biases, SkipInit gains (every vector and scalar): clipped, not decayed
    - the weight of the classifier: decayed, not clipped (its bias is in the first group)
    - all other weights: clipped and decayed; those of transposed convolutions in groups of their own, which say
      `transposed`, since their output channels are not dimension 0

    Every trainable parameter is in exactly one group; groups that would be empty are left out.

    Args:
        classifier: the last linear layer. "auto" asks `model.get_classifier()`, as networks of ours and timm's offer;
            None clips everything.
        exempt: modules of which nothing is clipped, what is inside them included (a stem, normalization layers).

    Raises:
        InputError: "auto" and the model does not say; a classifier or an exempt module that is no layer of `model`, or
            has nothing to train.
    """
    if classifier == "auto":
        ask = getattr(model, "get_classifier", None)
        if ask is None:
            raise InputError(
                f"{type(model).__name__} has no get_classifier(): pass classifier=model.fc, "
                "or whatever its last linear layer is called, or None to clip every layer"
            )
        classifier = ask()
    modules = set(model.modules())
    if classifier is not None and classifier not in modules:
        raise InputError("the classifier given is no layer of the model")
    unclipped = set() if classifier is None else {p for p in classifier.parameters() if not _is_gain(p)}
    for module in exempt:
        inside = {p for p in module.parameters() if p.requires_grad}
        if module not in modules or not inside:
            what = "is no layer of the model" if module not in modules else "has nothing to train"
            raise InputError(f"the exempt module {type(module).__name__} {what}")
        unclipped |= inside
    transposed = {m.weight: m.groups for m in modules if isinstance(m, _TRANSPOSED) and not _is_gain(m.weight)}

    groups: dict[tuple, list[nn.Parameter]] = {}
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        vector, left_alone = _is_gain(p), p in unclipped
        groups.setdefault((left_alone, vector, transposed.get(p, 0)), []).append(p)
    assert sum(map(len, groups.values())) == len(trainable)
    return [
        dict(params=params, weight_decay=0.0 if vector else weight_decay, clipping=None if left_alone else clipping)
        | ({"transposed": convs} if convs else {})
        for (left_alone, vector, convs), params in sorted(groups.items(), key=lambda item: item[0])
    ]
