"""State dicts from files that say nothing of their network: torch's and timm's, checkpoints of any training script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from normfree.config import InputError
from normfree.weights.file import file_kind, some
from normfree.weights.pickles import Placeholder, Refused, Stored, TorchFile

# what compilation, sharding and recomputation put into names, wherever it is
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
# where scripts keep weights, the best first: averages, then the network as it is
_AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "params_ema", "averages", "swa")
_CURRENT = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights", "params")


def plain_names(state: Mapping[str, Any], path: object) -> tuple[dict[str, Any], list[str]]:
    """`state` without what wrappers put before the names of a network's tensors, and the names that are not of it.

    Wrappers are `torch.compile`, DDP, FSDP, averages, and modules that have the network as an attribute. InputError
    where a file holds several networks.

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


def read_state(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A state dict with plain names from a .safetensors or a torch file, and notes on which one of it that is.

    Of a checkpoint: an average of the weights, where there is one. Nothing of a file is run. InputError, in one line,
    for anything else.
    """
    try:
        if file_kind(path) != "torch":
            state, left = plain_names(load_file(path), path)
            tensors = {key: value.clone() for key, value in state.items()}
            place = ""
        else:
            with TorchFile(path) as file:
                place, found = _pick(file.content, path)
                state, left = plain_names(found, path)
                tensors = {key: file.tensor(stored) for key, stored in state.items()}
    except InputError:
        raise
    except Refused as error:
        raise InputError(f"{path} is refused: a weight file has no business with {error}") from None
    except Exception as error:  # a damaged pickle or archive can raise nearly every type
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path} is damaged or no weight file ({reason})") from None
    notes = [f"the weights are its {place!r}"] if place else []
    notes += [f"left out: {some(left)}"] if left else []
    return tensors, tuple(notes)


def _pick(content: Any, path: Path) -> tuple[str, dict[str, Stored]]:
    """The state dict in a torch file and where it is: "" for the file itself."""
    mappings = {place: each for place, each in _walk(content) if isinstance(each, Mapping)}
    found = {
        place: {str(key): value for key, value in each.items() if isinstance(value, Stored | Placeholder)}
        for place, each in mappings.items()
        if any(isinstance(value, Stored) for value in each.values())
    }
    found = {place: each for place, each in found.items() if any("stem." in key for key in each)} or found
    if not found:
        names = (type(each).__name__ for _, each in _walk(content) if isinstance(each, Placeholder))
        whole = next((name for name in names if "." in name), None)
        if whole is not None:
            raise Refused(f"{whole}: save the network's state_dict()")
        raise InputError(f"{path} holds no state dict: names with tensors are expected")
    ranks = [*_AVERAGES, *_CURRENT]

    def rank(place: str) -> int:
        return min((ranks.index(part) for part in place.split("/") if part in ranks), default=len(ranks))

    place = min(found, key=rank)
    same = [each for each in found if rank(each) == rank(place)]
    if len(same) > 1:
        raise InputError(f"{path} holds several state dicts ({some([*map(repr, same)])}): save the one to be read")
    state = {}
    for key, value in found[place].items():
        if isinstance(value, Placeholder):
            raise Refused(type(value).__name__)
        state[key] = value
    return place, state


def _walk(content: Any, place: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Everything in mappings and sequences within each other, once, and where it is."""
    seen = set() if seen is None else seen
    if id(content) in seen:
        return
    seen.add(id(content))
    yield place, content
    items = content.items() if isinstance(content, Mapping) else ()
    items = enumerate(content) if isinstance(content, list | tuple) else items
    for key, value in items:
        yield from _walk(value, f"{place}/{key}".lstrip("/"), seen)
