"""Weight files converted between our format, timm's and DeepMind's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from normfree.errors import InputError
from normfree.files import check_writable
from normfree.models.files import read_any
from normfree.models.table import defaults
from normfree.weights import ModelInfo, deepmind, hub, timm
from normfree.weights.file import NON_WEIGHT_OPTIONS, Weights, write_weights

Format = Literal["normfree", "timm", "deepmind"]
GELUS = ("gelu", "gelu_erf")
OTHER_GELU = "outputs differ by 1e-4 to 1e-3"


def convert_weights(source: str, out: str, format: Format | None = None, name: str | None = None) -> Weights:
    """Reads a weight file of any kind and writes it in our format, timm's or DeepMind's, or pushes it to the Hub.

    The converted network computes the same function. A different epsilon of weight standardization is folded into the
    gains. If the target has only the other GELU, a note says so; any other difference is refused.

    Args:
        source: as for `load`.
        out: file to write, or "hf://owner/name" to push to.
        format: None: from the suffix of `out`: .npz deepmind; .pth, .pt, .bin timm; otherwise normfree.
        name: our name of the network, if `source` fits several.

    Returns:
        What was read, with notes from reading and writing.

    Raises:
        InputError: `source` cannot be read, `out` cannot be written, or the target has no such network.
    """
    suffixes: dict[str, Format] = {".npz": "deepmind", ".pth": "timm", ".pt": "timm", ".bin": "timm"}
    format = format or suffixes.get(Path(out).suffix, "normfree")
    if format not in get_args(Format):
        raise InputError(f"format {format!r}: there are {', '.join(get_args(Format))}")
    if not hub.is_hub_uri(out):
        check_writable(out, "OUT", replace=True)
    weights = read_any(source, name)
    if not hub.is_hub_uri(out):
        return replace(weights, notes=weights.notes + _write(weights, out, format))
    if format != "normfree":
        raise InputError(f"{out}: only our own format can be pushed to the Hub, not {format}'s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        _write(weights, path, format)
        address = hub.push(path, out, card=model_card(weights.info, out))
    return replace(weights, notes=(*weights.notes, f"pushed to {address}"))


def _write(weights: Weights, path: str | os.PathLike, format: Format) -> tuple[str, ...]:
    """Writes the file and returns notes for the user."""
    info = weights.info
    if format == "normfree":
        write_weights(path, weights.state, info)
        return ()
    options = defaults(info.architecture) | info.overrides
    if format == "timm":
        target, eps, notes = _timm_target(info.architecture, options)
        timm.write_timm(path, timm.to_timm(timm.with_epsilon(weights.state, options["ws_eps"], eps), target))
    else:
        family, notes = _deepmind_target(info.architecture, options)
        state = timm.with_epsilon(weights.state, options["ws_eps"], None)
        deepmind.write_haiku(path, deepmind.to_haiku(state, family))
    return notes


def _timm_target(name: str, options: Mapping[str, Any]) -> tuple[str, float | None, tuple[str, ...]]:
    """timm's network that computes the same, its epsilon of weight standardization, and notes."""
    candidates = {
        target: defaults(ours) | theirs for target, (ours, theirs) in timm.ARCHITECTURES.items() if ours == name
    }
    if not candidates:
        raise InputError(f"timm has no counterpart of {name}")

    def differences(target: str) -> set[str]:
        theirs = candidates[target]
        return {key for key in options if options[key] != theirs[key]} - NON_WEIGHT_OPTIONS - {"ws_eps"}

    target = min(candidates, key=lambda target: len(differences(target)))
    different = differences(target)
    if different - {"activation"}:
        raise InputError(f"timm has no network that computes the same as this {name}: {', '.join(sorted(different))}")
    notes = (f"it is timm's {target}",)
    if different and options["activation"] in GELUS:
        notes += (f"timm has the erf GELU, this network the tanh GELU: {OTHER_GELU}",)
    elif different:
        notes += (f'create it with timm.create_model("{target}", act_layer="{options["activation"]}")',)
    return target, candidates[target]["ws_eps"], notes


def _deepmind_target(name: str, options: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The network's family in the released code, and notes."""
    family = next((family for family in deepmind.FAMILIES if name.startswith(family)), None)
    if family is None:
        raise InputError(f"the released code has no {name}")
    different = [key for key, value in deepmind.FIXED.items() if options.get(key, value) != value]
    if different:
        raise InputError(f"the released code has no network that computes the same: {', '.join(different)}")
    erf = options["activation"] == "gelu_erf"
    return family, (f"the released code has the tanh GELU: {OTHER_GELU}",) if erf else ()


def model_card(info: ModelInfo, uri: str) -> str:
    """README.md of a Hub repository."""
    license_line = f"license: {info.licence.lower()}\n" if info.licence else ""
    return f"""---
{license_line}library_name: normfree
pipeline_tag: image-classification
tags:
- normalizer-free
---
# {info.architecture}

An image network without normalization layers, {info.num_classes} classes, for pictures of {info.eval_px} px.
{f"Source: {info.source}." if info.source else ""}

```python
import normfree

model = normfree.load("{uri}")
```

`normfree predict {uri} IMAGE` labels pictures.
"""
