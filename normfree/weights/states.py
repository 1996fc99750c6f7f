"""State dicts from files without a header: torch's and timm's, and checkpoints of any training script."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from normfree.errors import InputError, one_line
from normfree.weights.file import (
    NON_WEIGHT_OPTIONS,
    ModelInfo,
    Report,
    Weights,
    Zoo,
    difference,
    file_kind,
    some,
    spelled,
)
from normfree.weights.pickles import Placeholder, Refused, load_torch, walk

# parts of names that compilation, sharding and activation checkpointing insert
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
# keys under which training scripts store weights, preferred ones first: averages, then the network itself
_PLACES = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "params_ema", "averages", "swa"),
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights", "params"),
)


def plain_names(state: Mapping[str, Any], path: object) -> tuple[dict[str, Any], list[str]]:
    """`state` without the prefixes of wrappers, and the names that do not belong to the network.

    Wrappers are `torch.compile`, DDP, FSDP, averages, and modules with the network as an attribute. InputError if there
    are several networks.

    >>> plain_names({"n_averaged": 3, "module._orig_mod.stem.conv.bias": 1, "module.head.fc.bias": 2}, "x.pth")
    ({'stem.conv.bias': 1, 'head.fc.bias': 2}, [])
    """
    state = {_WRAPPERS.sub("", key).lstrip("."): value for key, value in state.items() if key != "n_averaged"}
    prefixes = list(dict.fromkeys(match[1] for key in state if (match := re.match(r"((?:[^.]+\.)*?)stem\.", key))))
    if len(prefixes) > 1:
        raise InputError(f"{path} holds several networks ({some([*map(repr, prefixes)])}): save the one to be read")
    prefix = prefixes[0] if prefixes else ""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return inside, [key for key in state if not key.startswith(prefix)]


def depth(state: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of blocks in each of the four stages, whose names timm shares."""
    blocks = {match.groups() for key in state if (match := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    return tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(4))


def size(state: Mapping[str, Tensor], layer: str) -> int:
    """The number of outputs of a linear layer or convolution; 0 if there is none of that name."""
    return state[f"{layer}.bias"].numel() if f"{layer}.bias" in state else 0


def is_own(state: Mapping[str, Any]) -> bool:
    """Whether the names of a state dict are those of our networks; timm counts the same convolutions from 1."""
    return any(re.match(r"(stem|stages\.\d+\.\d+)\.conv0\.", key) for key in state)


def read_own_state(
    state: dict[str, Tensor],
    notes: tuple[str, ...],
    source: str,
    zoo: Zoo,
    name: str | None,
    overrides: Mapping[str, Any],
) -> Weights:
    """A bare state dict of one of our networks. It shows the architecture; options are `overrides` or the defaults."""
    stem = state.get("stem.conv0.weight", state.get("stem.conv.weight"))
    in_channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    num_classes, blocks = size(state, "head.fc"), depth(state)
    whole = {key: value for key, value in overrides.items() if key not in NON_WEIGHT_OPTIONS}
    attempts = [whole] if whole == overrides else [whole, overrides]  # the file may be that of a feature extractor
    fits: dict[str, Any] = {}
    differences = []
    for candidate in [name] if name else [each for each in zoo.depths if zoo.depths[each] == blocks]:
        for options in attempts:
            network = zoo.outline(candidate, num_classes, in_channels, options)
            differences.append(difference(network.state_dict(), state))
            if not differences[-1]:
                fits.setdefault(candidate, network)
    if len(fits) > 1:
        raise InputError(f"{source} fits {' and '.join(fits)}: name one, as normfree convert IN OUT --model NAME does")
    if not fits:
        how = "it was made with other options: give them in create_model(NAME, weights=..., OPTION=...)"
        reason = (differences or [f"depth {blocks}"])[0]
        raise InputError(f"{source} does not fit {name or 'any network here'}: {reason}; {how}")
    candidate, network = next(iter(fits.items()))
    info: ModelInfo = network.info
    note = f"{source} records no options; assuming those of {candidate}: {spelled(info.overrides) or 'the defaults'}"
    if name is None:
        logging.getLogger("normfree").warning(note)
    info = replace(info, source=f"state dict {Path(source).name}")
    return Weights(state, info, Report(matched=list(state)), (*notes, note), network)


def read_state(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A state dict with plain names from a .safetensors or torch file, and notes on where in the file it was.

    From a checkpoint, an average of the weights is preferred. No code in a file runs. InputError, in one line, for
    anything else.
    """
    try:
        place, state = _pick(load_torch(path), path) if file_kind(path) == "torch" else ("", load_file(path))
        state, left = plain_names(state, path)
        tensors = {key: _copy(value) for key, value in state.items()}
    except InputError:
        raise
    except Refused as error:
        raise InputError(f"{path} is refused: a weight file has no business with {error}") from None
    except Exception as error:  # a damaged pickle or archive can raise nearly every type
        reason = one_line(error, 120)
        raise InputError(f"{path} is damaged or not a weight file ({reason})") from None
    notes = [f"the weights are its {place!r}"] if place else []
    notes += [f"left out: {some(left)}"] if left else []
    return tensors, tuple(notes)


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory that torch aligned: sums over unaligned tensors differ in the last bit."""
    if tensor.is_complex() or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _pick(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The path of the state dict in a torch file ("" for the file itself), and the state dict."""
    everything = dict(walk(content))
    found = {
        place: each
        for place, each in everything.items()
        if isinstance(each, Mapping) and any(isinstance(value, Tensor) for value in each.values())
    }
    found = {place: each for place, each in found.items() if any("stem." in str(key) for key in each)} or found
    if not found:
        for each in everything.values():
            if isinstance(each, Placeholder) and "." in type(each).__name__:
                raise Refused(f"{type(each).__name__}: save the network's state_dict()")
        raise InputError(f"{path} holds no state dict, a mapping of names to tensors")

    def rank(place: str) -> int:
        return min((_PLACES.index(part) for part in place.split("/") if part in _PLACES), default=len(_PLACES))

    place = min(found, key=rank)
    same = [each for each in found if rank(each) == rank(place)]
    if len(same) > 1:
        raise InputError(f"{path} holds several state dicts ({some([*map(repr, same)])}): save the one to be read")
    for value in found[place].values():
        if isinstance(value, Placeholder):
            raise Refused(type(value).__name__)
    return place, {str(key): value for key, value in found[place].items() if isinstance(value, Tensor)}
