"""Which parameter is decayed, and which is clipped; what optimizer groups may say of it."""

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
_OTHER_WORDS = {"clip": "clipping", "clip_factor": "clipping", "clipping_factor": "clipping"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Default(float):
    """A number as the default of an argument, told from the same number where the user gave it."""


def plain(value: float | None) -> float | None:
    """The number alone, as it goes into groups and files."""
    return float(value) if isinstance(value, Default) else value


def clipping_of(group: Mapping[str, Any], ours: tuple[str, ...] = CLIPPING_KEYS) -> tuple:
    """λ, ε, units and `transposed` of a group, checked. `ours`: see `check_names`."""
    check_names(frozenset(group), ours)
    clipping, eps, units = group["clipping"], group["clip_eps"], group.get("units", "channel")
    if clipping is not None and not 0 < clipping < math.inf:
        raise InputError(f"clipping {clipping}: a positive number, or None to leave a group unclipped")
    if not 0 < eps < math.inf:
        raise InputError(f"eps {eps}: a positive number; the paper's is 1e-3")
    if units not in get_args(Units):
        raise InputError(f"units {units!r}: {' or '.join(get_args(Units))}")
    return clipping, eps, units, group.get("transposed", 0)


@lru_cache
def check_names(names: frozenset[str], ours: tuple[str, ...] = CLIPPING_KEYS) -> None:
    """InputError for a group's key that is close to one of `ours`: a misspelt option would do nothing.

    Others pass: users and schedulers keep names, initial rates and more in groups.
    """
    for name in names.difference(ours):
        close = difflib.get_close_matches(name.lower(), ours, n=1, cutoff=0.85) or [_OTHER_WORDS.get(name)]
        if close[0]:
            raise InputError(f"a parameter group has the key {name!r}; did you mean {close[0]!r}?")


def check_given(groups: Collection[Mapping[str, Any]], **given: Any) -> None:
    """InputError for an argument that no group would take, since each has a value of its own.

    Exemption (clipping None) and no decay of vectors are roles, which contradict nothing.
    """
    for name, value in given.items():
        if isinstance(value, Default) or any(name not in group for group in groups):
            continue
        own = [group[name] for group in groups if not (name == "weight_decay" and _is_undecayed(group))]
        if value is None or any(own):
            own = [other for other in own if other is not None]
        if any(other != value for other in own):
            said = " and ".join("None, which exempts them" if x is None else str(x) for x in dict.fromkeys(own))
            raise InputError(f"{name} {value} would do nothing: all groups have their own, {said}; give one of them")


def _is_undecayed(group: Mapping[str, Any]) -> bool:  # torch's optimizers take parameters with names, too
    return group["weight_decay"] == 0 and all(_is_gain(p[1] if isinstance(p, tuple) else p) for p in group["params"])


def settle(groups: Sequence[Mapping[str, Any]], clipping: float | None, eps: float, units: Units | None) -> dict:
    """The settings of groups that do not say; an argument that was given must have one."""
    check_given(groups, clipping=clipping, clip_eps=eps, **({"units": units} if units else {}))
    settings = {"clipping": plain(clipping), "clip_eps": float(eps), "units": units or "channel"}
    clipping_of(settings)
    return settings


def keep_missing(
    saved: Sequence[dict[str, Any]], own: Sequence[Mapping[str, Any]], keys: Iterable[str]
) -> list[dict[str, Any]]:
    """The groups of a saved state with those of `keys` that it lacks, from the groups that it is to replace."""
    filled = [{key: mine[key] for key in keys if key in mine} | group for group, mine in zip(saved, own, strict=False)]
    return filled + list(saved[len(own) :])  # as many as were saved, which torch compares


def as_groups(params_or_groups: Any) -> list[dict[str, Any]]:
    """A tensor, tensors, or optimizer groups -> groups, which are new dictionaries with lists of parameters."""
    if isinstance(params_or_groups, nn.Module):
        raise InputError("pass model.parameters(), or param_groups(model), not the model")
    items = [params_or_groups] if isinstance(params_or_groups, Tensor) else list(params_or_groups)
    if not items and isinstance(params_or_groups, Iterator):
        raise InputError("there are no parameters: model.parameters() can be gone through once, so call it again")
    if items and not isinstance(items[0], Mapping):
        return [{"params": items}]
    groups = [dict(group) for group in cast("list[Mapping[str, Any]]", items)]
    for group in groups:
        if not isinstance(params := group["params"], set):  # which has no order: torch's optimizers refuse it
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
    return groups


def _is_gain(p: Tensor) -> bool:
    """Bias, gain or scalar; a gain may be stored as (C, 1, 1, 1). The weight of a one-class head is none."""
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
    - the weight of the classifier: decayed, not clipped (its bias is in the first group)
    - all other weights: clipped and decayed; those of transposed convolutions in groups of their own, which say
      `transposed`, since their output channels are not dimension 0

    Every trainable parameter is in exactly one group; groups that would be empty are left out. They say what follows
    from roles, `clipping: None` and `weight_decay: 0.0`, and no more than that: the rest is the optimizer's.

    Args:
        weight_decay: at least 0, of what is decayed; "optimizer": what the optimizer's own argument says.
        clipping: λ > 0 of what is clipped, or None to clip nothing; "optimizer": what the own argument of `SGD_AGC`,
            `AGC` or `adaptive_clip_grad_` says. Given in both places, the two must be equal.
        classifier: the last linear layer. "auto" asks `model.get_classifier()`, as networks of ours and timm's offer;
            None clips everything.
        exempt: modules of which nothing is clipped, what is inside them included (a stem, normalization layers).

    Raises:
        InputError: "auto" and the model does not say; a classifier or an exempt module that is no layer of `model`, a
            classifier without a weight, an exempt module with nothing to train; numbers out of range.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"param_groups takes the model, which knows the roles of its parameters, not {type(model)}")
    if weight_decay != "optimizer" and (weight_decay is None or not 0 <= weight_decay < math.inf):
        raise InputError(f"weight_decay {weight_decay}: a number of at least 0")
    if clipping != "optimizer":
        clipping_of({"clipping": clipping, "clip_eps": 1.0})
    if asked := classifier == "auto":
        ask = getattr(model, "get_classifier", None)
        if ask is None:
            raise InputError(f"{type(model).__name__} has no get_classifier(): pass classifier=, a layer or None")
        classifier = ask()
    modules = set(model.modules())
    if classifier is not None and classifier not in modules:
        raise InputError("the classifier given is no layer of the model")
    unclipped = set() if classifier is None else {p for p in classifier.parameters() if not _is_gain(p)}
    if classifier is not None and not (unclipped or asked):
        raise InputError(f"the classifier given, {type(classifier).__name__}, has no weight")
    for module in [exempt] if isinstance(exempt, nn.Module) else exempt:
        inside = {p for p in module.parameters() if p.requires_grad} if module in modules else set()
        if not inside:
            what = "is no layer of the model" if module not in modules else "has nothing to train"
            raise InputError(f"the exempt module {type(module).__name__} {what}")
        unclipped |= inside
    transposed = {m.weight: m.groups for m in modules if isinstance(m, _TRANSPOSED) and not _is_gain(m.weight)}

    groups: dict[tuple, list[nn.Parameter]] = {}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if any(map(nn.parameter.is_lazy, trainable)):
        raise InputError("lazy layers have no shapes yet: run a batch through the model before param_groups")
    for p in trainable:
        vector, left_alone = _is_gain(p), p in unclipped
        groups.setdefault((left_alone, vector, transposed.get(p, 0)), []).append(p)
    assert sum(map(len, groups.values())) == len(trainable)
    result = []
    for (left_alone, vector, convs), params in sorted(groups.items(), key=lambda item: item[0]):
        says = {"weight_decay": 0.0 if vector else weight_decay, "clipping": None if left_alone else clipping}
        group = {"params": params} | {name: value for name, value in says.items() if value != "optimizer"}
        result.append(group | ({"transposed": convs} if convs else {}))
    return result
