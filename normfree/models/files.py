"""Weight files of every kind -> networks, and back: ours, the authors', timm's, the Hub's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from normfree.config import InputError
from normfree.models.network import Network
from normfree.models.table import TABLE, build, defaults
from normfree.weights import ModelInfo, deepmind, hub, timm
from normfree.weights.file import Report, file_kind, read_weights, write_weights

Format = Literal["normfree", "timm", "deepmind"]
# what training alone sees: two networks that differ in it compute the same
TRAINING_ONLY = {"drop_rate", "stochastic_depth", "skip_init", "features_only", "out_indices"}
GELUS = ("gelu", "gelu_erf")


@dataclass(frozen=True)
class Weights:
    """A weight file in our terms; `report` of a foreign one, `notes` that its reader should see."""

    state: dict[str, Tensor]
    info: ModelInfo
    report: Report | None = None
    notes: tuple[str, ...] = ()


def read_any(path: str | os.PathLike, name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Weights:
    """Tensors and header of a file of ours, an authors' .npz, a timm .safetensors or .pth, or "hf://owner/name".

    Args:
        name: our name of the network, needed only where a foreign file does not tell.
        overrides: options of the network that a foreign file is for.

    Raises:
        InputError: in one line, for a file that is missing, damaged, hostile or of no network known here.
    """
    overrides = {key: value for key, value in (overrides or {}).items() if key not in TRAINING_ONLY}
    source = str(path)
    if hub.is_hub_uri(source):
        path = hub.fetch(source)
    elif not Path(path).is_file():
        raise InputError(f"no weight file {str(path)!r}" + (" (that is a folder)" if Path(path).is_dir() else ""))
    kind = file_kind(path)
    if kind == "normfree":
        return Weights(*read_weights(path))
    if kind == "haiku":
        return _read_deepmind(Path(path), name, overrides)
    return _read_timm(Path(path), source, overrides)


def _read_deepmind(path: Path, name: str | None, overrides: Mapping[str, Any]) -> Weights:
    tree = deepmind.read_haiku(path)
    family, num_blocks, num_classes, in_channels = deepmind.describe(tree, path)
    if name is not None and not name.startswith(family):
        raise InputError(f"{path} is a haiku weight file of {deepmind.FAMILIES[family][0]}, not of {name}")

    def fit(name: str) -> Weights:
        like = _on_meta(name, num_classes, in_channels, overrides)
        state, report = deepmind.from_haiku(tree, like.state_dict(), family)
        assert like.info is not None
        crop = "resize_crop" if family == "nfnet" else "crop_resize"
        info = replace(like.info, source=f"DeepMind's {path.name}", eval_crop=crop)
        return Weights(state, info, report)

    def same_size(name: str) -> bool:
        return name.startswith(family) and sum(defaults(name)["depth"]) == num_blocks

    tries = [fit(name)] if name is not None else [fit(name) for name in filter(same_size, TABLE)]
    best = next((weights for weights in tries if weights.report and weights.report.complete), None)
    if best is None:
        what = f"does not fit {name}: {tries[0].report}" if name else "is of no network known here: name one"
        raise InputError(f"{path} {what}")
    return best


def _read_timm(path: Path, source: str, overrides: Mapping[str, Any]) -> Weights:
    theirs = timm.read_timm(path)
    config = hub.fetch_config(source) if hub.is_hub_uri(source) else None
    try:
        name, num_classes, in_channels = timm.recognise(theirs)
        prepared = timm.preparation(name, config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{source}: its config.json is not one of timm's") from None
    ours, options = timm.ARCHITECTURES[name]
    like = _on_meta(ours, num_classes, in_channels, {**options, **overrides})
    state, report = timm.from_timm(theirs, like.state_dict())
    if not report.complete:
        raise InputError(f"{source} does not fit {ours} as timm's {name}: {report}")
    assert like.info is not None
    info = replace(like.info, source=f"timm's {name} ({Path(source).name})", **prepared)
    notes = (f"timm's arithmetic is kept, as options that the file records: {_spell(options)}",) if options else ()
    return Weights(state, info, report, notes)


def _on_meta(name: str, num_classes: int, in_channels: int, overrides: Mapping[str, Any]) -> Network:
    """A network without memory: names and shapes."""
    with torch.device("meta"):
        return build(name, num_classes, in_channels, overrides)


def _spell(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def load_state(model: Network, weights: Weights, path: str | os.PathLike) -> None:
    """Puts tensors into a network; a classifier for another number of classes stays as it is."""
    assert model.info is not None
    state, info = weights.state, weights.info
    if info.architecture != model.info.architecture:
        raise InputError(f"{path} holds weights of {info.architecture}, not of {model.info.architecture}")
    own = model.state_dict()
    if model.num_classes != info.num_classes or model.out_indices is not None:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state |= {key: value for key, value in own.items() if key.startswith("head.")}
    if model.out_indices is not None:  # a feature extractor drops the layers it does not need
        state = {key: value for key, value in state.items() if key in own}
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{path} does not fit this {info.architecture}: tensor {wrong[0]!r}{more} differs")
    model.load_state_dict(state, assign=True)


def load(path: str | os.PathLike) -> Network:
    """The network in a weight file, in evaluation mode on the CPU, with the file's header as `model.info`.

    `path`: a file that `save` wrote, a released `F0_haiku.npz` …, a timm `.safetensors` or `.pth`, or
    "hf://owner/name". InputError, in one line, for anything else.
    """
    weights = read_any(path)
    info = weights.info
    try:  # nothing is allocated before the shapes are known to agree
        model = _on_meta(info.architecture, info.num_classes, info.in_channels, info.overrides)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    load_state(model, weights, path)
    model.info = info
    return model.eval()


def save(model: Network, path: str | os.PathLike, info: ModelInfo | None = None) -> None:
    """Writes `model` and `info` (default `model.info`) as one safetensors file that `load` and `predict` take."""
    info = info or model.info
    if info is None:
        raise InputError(
            "this network was not made by create_model: pass info=ModelInfo(architecture, num_classes, ...)"
        )
    write_weights(path, model.state_dict(), info)


def convert_weights(source: str, out: str, format: Format | None = None, name: str | None = None) -> Weights:
    """Reads any weight file and writes one of ours, of timm's or of the authors', or pushes ours to the Hub.

    The function is kept: timm's epsilon of weight standardization, where it is not the target's, goes into the gains.
    Where the target has no such GELU, a note says so; any other difference is refused.

    Args:
        source: as for `load`.
        out: file to write, or "hf://owner/name" to push to.
        format: None: by the ending of `out`: .npz deepmind; .pth, .pt, .bin timm; else normfree.
        name: our name of the network, where `source` does not tell.

    Returns:
        What was read, with the notes of both directions.
    """
    endings: dict[str, Format] = {".npz": "deepmind", ".pth": "timm", ".pt": "timm", ".bin": "timm"}
    format = format or endings.get(Path(out).suffix, "normfree")
    if format not in get_args(Format):
        raise InputError(f"format {format!r}: there are {', '.join(get_args(Format))}")
    weights = read_any(source, name)
    if not hub.is_hub_uri(out):
        return replace(weights, notes=weights.notes + _write(weights, out, format))
    if format != "normfree":
        raise InputError(f"{out}: the Hub gets files in our own format, not {format}'s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        _write(weights, path, format)
        address = hub.push(path, out, card=model_card(weights.info, out))
    return replace(weights, notes=(*weights.notes, f"pushed to {address}"))


def _write(weights: Weights, path: str | os.PathLike, format: Format) -> tuple[str, ...]:
    """Writes a file and returns what its user should know."""
    info = weights.info
    if format == "normfree":
        write_weights(path, weights.state, info)
        return ()
    ours = defaults(info.architecture) | info.overrides
    if format == "timm":
        target, theirs, notes = _timm_counterpart(info.architecture, ours)
        state = timm.with_epsilon(weights.state, ours["ws_eps"], theirs["ws_eps"])
        timm.write_timm(path, timm.to_timm(state, target))
    else:
        family, notes = _deepmind_counterpart(info.architecture, ours)
        state = timm.with_epsilon(weights.state, ours["ws_eps"], None)
        deepmind.write_haiku(path, deepmind.to_haiku(state, family))
    return notes


def _timm_counterpart(name: str, ours: Mapping[str, Any]) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """timm's network that computes what a network of ours with options `ours` does: its name, options, notes."""
    candidates = {
        target: defaults(own) | options for target, (own, options) in timm.ARCHITECTURES.items() if own == name
    }
    if not candidates:
        raise InputError(f"timm has no counterpart of {name}")

    def differences(target: str) -> set[str]:
        theirs = candidates[target]
        return {key for key in ours if ours[key] != theirs[key]} - TRAINING_ONLY - {"ws_eps"}

    target = min(candidates, key=lambda target: len(differences(target)))
    different = differences(target)
    if different - {"activation"}:
        raise InputError(f"timm has no network with what this {name} computes: {', '.join(sorted(different))}")
    notes = (f"it is timm's {target}",)
    if different and ours["activation"] in GELUS:
        notes += ("timm has the erf GELU where this network has the tanh one: outputs differ by 1e-4 to 1e-3",)
    elif different:
        notes += (f'make it with timm.create_model("{target}", act_layer="{ours["activation"]}")',)
    return target, candidates[target], notes


def _deepmind_counterpart(name: str, ours: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Family in the released code of a network of ours with options `ours`, and notes."""
    family = next((family for family in deepmind.FAMILIES if name.startswith(family)), None)
    if family is None:
        raise InputError(f"the released code has no {name}")
    different = [key for key, value in deepmind.FIXED.items() if ours.get(key, value) != value]
    if different:
        raise InputError(f"the released code has no network with what this {name} computes: {', '.join(different)}")
    gelu = ours["activation"] == "gelu_erf"
    return family, ("the released code has the tanh GELU: outputs differ by 1e-4 to 1e-3",) if gelu else ()


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
