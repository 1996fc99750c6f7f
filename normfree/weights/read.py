"""One reader for weight files of every kind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfree.errors import InputError
from normfree.weights import hub
from normfree.weights.deepmind import read_deepmind
from normfree.weights.file import DETECTOR, NON_WEIGHT_OPTIONS, Weights, Zoo, file_kind, read_weights
from normfree.weights.states import is_own, plain_names, read_own_state, read_state
from normfree.weights.timm import read_timm


def find_file(path: str | os.PathLike) -> Path:
    """The weight file that `read` reads: `path`, the best weights of a run folder, the copy of a file of the Hub.

    Raises:
        InputError: there is none.
    """
    if hub.is_hub_uri(path):
        return hub.fetch(str(path))
    if (best := Path(path) / "best.safetensors").is_file():
        return best
    if not Path(path).is_file():
        folder = " (that is a folder, with no best.safetensors in it)" if Path(path).is_dir() else ""
        raise InputError(f"no weight file {str(path)!r}{folder}")
    return Path(path)


def read(
    path: str | os.PathLike, zoo: Zoo, name: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Weights:
    """The content of a weight file of any kind, of a run folder (its best weights), or of "hf://owner/name".

    Args:
        path: file, folder or address.
        zoo: the networks that the file may be for.
        name: our name of the network; needed only if the file fits several.
        overrides: options of the network in a file that records none.

    Raises:
        InputError: in one line, for a file that is missing, damaged, hostile, or for no network in `zoo`.
    """
    source, overrides = str(path), dict(overrides or {})
    whole = {key: value for key, value in overrides.items() if key not in NON_WEIGHT_OPTIONS}
    path = find_file(path)
    try:
        kind = file_kind(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if kind == "normfree":
        state, info = read_weights(path)
        return Weights(state if info.architecture == DETECTOR else plain_names(state, path)[0], info)
    if kind == "haiku":
        return read_deepmind(Path(path), zoo, name, whole)
    state, notes = read_state(Path(path))
    if is_own(state):
        return read_own_state(state, notes, source, zoo, name, overrides)
    config = hub.fetch_config(source) if hub.is_hub_uri(source) else None
    return read_timm(state, notes, source, zoo, whole, config)
