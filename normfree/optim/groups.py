"""Parameter groups: which parameters are decayed and clipped, and the settings of AGC that a group may have."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from normfree.errors import InputError

Units = Literal["channel", "tensor"]
CLIPPING_KEYS = ("clipping", "clip_eps", "units", "transposed")
_SYNONYMS = {"clip": "clipping", "clip_factor": "clipping", "clipping_factor": "clipping"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Default(float):
    """A default value of an argument, distinguishable from the same number passed by the user."""


def plain(value: float | None) -> float | None:
    """The value as a plain float, for groups and files."""
    return float(value) if isinstance(value, Default) else value


def clipping_settings(group: Mapping[str, Any]) -> tuple:
    """λ, ε, units and `transposed` of a group; InputError if one is out of range."""
    clipping, eps, units = group["clipping"], group["clip_eps"], group.get("units", "channel")
    if clipping is not None and not 0 < clipping < math.inf:
        raise InputError(f"clipping {clipping}: a positive number, or None to leave a group unclipped")
    if not 0 < eps < math.inf:
        raise InputError(f"eps {eps}: a positive number; the paper's is 1e-3")
    if units not in get_args(Units):
        raise InputError(f"units {units!r}: {' or '.join(get_args(Units))}")
    return clipping, eps, units, group.get("transposed", 0)


@lru_cache
def check_keys(keys: frozenset[str], options: tuple[str, ...] = CLIPPING_KEYS) -> None:
    """Raises InputError for a key of a group that looks like a misspelt option, which would be ignored.

    Other keys are allowed: users and schedulers store names, initial learning rates and more in groups.
    """
    for name in keys.difference(options):
        close = difflib.get_close_matches(name.lower(), options, n=1, cutoff=0.85) or [_SYNONYMS.get(name)]
        if close[0]:
            raise InputError(f"a parameter group has the key {name!r}; did you mean {close[0]!r}?")


def check_arguments(groups: Collection[Mapping[str, Any]], **arguments: Any) -> None:
    """Raises InputError for an argument without effect: all groups have another value of their own.

    Groups that are exempt (clipping None) and vectors without decay do not count, since these follow from roles.
    """
    for name, value in arguments.items():
        if isinstance(value, Default) or any(name not in group for group in groups):
            continue
        values = [group[name] for group in groups if not (name == "weight_decay" and _is_undecayed(group))]
        if value is None or any(values):
            values = [other for other in values if other is not None]
        if any(other != value for other in values):
            others = " and ".join("None, which exempts them" if x is None else str(x) for x in dict.fromkeys(values))
            raise InputError(f"{name} {value} has no effect: all groups set their own, {others}; set it in one place")


def _is_undecayed(group: Mapping[str, Any]) -> bool:  # parameters may be (name, parameter), as in torch
    return group["weight_decay"] == 0 and all(_is_gain(p[1] if isinstance(p, tuple) else p) for p in group["params"])


def default_settings(
    groups: Sequence[Mapping[str, Any]], clipping: float | None, eps: float, units: Units | None
) -> dict[str, Any]:
    """The settings for groups without their own; InputError for an argument that no group would use."""
    check_arguments(groups, clipping=clipping, clip_eps=eps, **({"units": units} if units else {}))
    settings = {"clipping": plain(clipping), "clip_eps": float(eps), "units": units or "channel"}
    clipping_settings(settings)
    return settings


def fill_missing(
    saved: Sequence[dict[str, Any]], current: Sequence[Mapping[str, Any]], keys: Iterable[str]
) -> list[dict[str, Any]]:
    """The groups of a saved state; those of `keys` that one lacks are taken from the current group."""
    pairs = zip(saved, current, strict=False)
    filled = [{key: group[key] for key in keys if key in group} | loaded for loaded, group in pairs]
    return filled + list(saved[len(current) :])  # all that were saved: torch compares the number of groups


def as_groups(params_or_groups: Any) -> list[dict[str, Any]]:
    """Turns a tensor, tensors or optimizer groups into groups: new dictionaries with lists of parameters."""
    if isinstance(params_or_groups, nn.Module):
        raise InputError("pass model.parameters(), or param_groups(model), not the model")
    items = [params_or_groups] if isinstance(params_or_groups, Tensor) else list(params_or_groups)
    if not items and isinstance(params_or_groups, Iterator):
        raise InputError("there are no parameters: model.parameters() can be iterated only once, so call it again")
    if items and not isinstance(items[0], Mapping):
        return [{"params": items}]
    groups = [dict(group) for group in cast("list[Mapping[str, Any]]", items)]
    for group in groups:
        if not isinstance(params := group["params"], set):  # torch's optimizers refuse sets, which have no order
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
    return groups


def _is_gain(p: Tensor) -> bool:
    """Whether `p` is a bias, gain or scalar. A gain may be stored as (C, 1, 1, 1); a one-class head (1, C) is none."""
    return p.ndim <= 1 or (p.ndim > 2 and p.numel() == p.shape[0])


def param_groups(
    model: nn.Module,
    weight_decay: float | Literal["optimizer"] = "optimizer",
    clipping: float | Literal["optimizer"] | None = "optimizer",
    classifier: nn.Module | Literal["auto"] | None = "auto",
    exempt: nn.Module | Sequence[nn.Module] = (),
) -> list[dict[str, Any]]:
    """The three groups of the released code (experiment_nfnets.py), for `SGD_AGC`, `AGC` and any torch optimizer.

    - gains, biases, SkipInit gains (every vector and scalar): clipped, not decayed
    - the classifier's weight: decayed, not clipped (its bias is in the first group)
    - all other weights: clipped and decayed. Transposed convolutions, whose output channels are not dimension 0, have
      groups of their own with the key `transposed`.

    Every trainable parameter is in exactly one group, and no group is empty. A group sets only what its role implies,
    `clipping: None` or `weight_decay: 0.0`; the optimizer's arguments set the rest.

    Args:
        weight_decay: at least 0, for decayed weights; "optimizer" leaves it to the optimizer's argument.
        clipping: λ > 0 for clipped parameters, or None to clip nothing; "optimizer" leaves it to the argument of
            `SGD_AGC`, `AGC` or `adaptive_clip_grad_`. If both are given, they must be equal.
        classifier: the last linear layer. "auto" calls `model.get_classifier()`, which our networks and timm's have;
            None clips everything.
        exempt: modules whose parameters are not clipped (a stem, normalization layers), submodules included.

    Raises:
        InputError: "auto" for a model without `get_classifier`; a classifier or exempt module that is not part of
            `model`; a classifier without a weight; an exempt module without trainable parameters; numbers out of range.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"param_groups takes the model, which knows the roles of its parameters, not {type(model)}")
    if weight_decay != "optimizer" and (weight_decay is None or not 0 <= weight_decay < math.inf):
        raise InputError(f"weight_decay {weight_decay}: a number of at least 0")
    if clipping != "optimizer":
        clipping_settings({"clipping": clipping, "clip_eps": 1.0})
    if auto := classifier == "auto":
        get_classifier = getattr(model, "get_classifier", None)
        if get_classifier is None:
            raise InputError(f"{type(model).__name__} has no get_classifier(): pass classifier=, a layer or None")
        classifier = get_classifier()
    modules = set(model.modules())
    if classifier is not None and classifier not in modules:
        raise InputError("the given classifier is not a layer of the model")
    unclipped = set() if classifier is None else {p for p in classifier.parameters() if not _is_gain(p)}
    if classifier is not None and not (unclipped or auto):
        raise InputError(f"the given classifier, {type(classifier).__name__}, has no weight")
    for module in [exempt] if isinstance(exempt, nn.Module) else exempt:
        inside = {p for p in module.parameters() if p.requires_grad} if module in modules else set()
        if not inside:
            why = "is not a layer of the model" if module not in modules else "has no trainable parameters"
            raise InputError(f"the exempt module {type(module).__name__} {why}")
        unclipped |= inside
    transposed = {m.weight: m.groups for m in modules if isinstance(m, _TRANSPOSED) and not _is_gain(m.weight)}

    groups: dict[tuple, list[nn.Parameter]] = {}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if any(map(nn.parameter.is_lazy, trainable)):
        raise InputError("lazy layers have no shapes yet: run a batch through the model before param_groups")
    for p in trainable:
        groups.setdefault((p in unclipped, _is_gain(p), transposed.get(p, 0)), []).append(p)
    assert sum(map(len, groups.values())) == len(trainable)
    result = []
    for (exempted, vector, conv_groups), params in sorted(groups.items(), key=lambda item: item[0]):
        settings = {"weight_decay": 0.0 if vector else weight_decay, "clipping": None if exempted else clipping}
        group = {"params": params} | {name: value for name, value in settings.items() if value != "optimizer"}
        result.append(group | ({"transposed": conv_groups} if conv_groups else {}))
    return result


def split_by_layer(groups: Iterable[Mapping[str, Any]], layers: Mapping[nn.Parameter, int]) -> list[dict[str, Any]]:
    """The groups, each split into groups of one layer, whose number is their key `layer`. The order is kept."""
    split: dict[tuple[int, int], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for p in group["params"]:
            part = split.setdefault((number, layers[p]), dict(group) | {"params": [], "layer": layers[p]})
            part["params"].append(p)
    return list(split.values())
