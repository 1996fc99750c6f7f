"""Weight files of every kind -> networks, and back: ours, the authors', timm's, the Hub's."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.files import check_writable
from normfree.layers import Activation
from normfree.models.network import Network
from normfree.models.table import TABLE, build, defaults
from normfree.weights import ModelInfo, deepmind, hub, timm
from normfree.weights.file import Report, file_kind, read_weights, some, write_weights
from normfree.weights.states import plain_names, read_state

Format = Literal["normfree", "timm", "deepmind"]
# what training alone sees, or what is left out at the end: two networks that differ in it have the same weights
TRAINING_ONLY = {"drop_rate", "stochastic_depth", "skip_init", "global_pool", "features_only", "out_indices"}
GELUS = ("gelu", "gelu_erf")


@dataclass(frozen=True)
class Weights:
    """A weight file in our terms; `report` of a foreign one, `notes` that its reader should see."""

    state: dict[str, Tensor]
    info: ModelInfo
    report: Report | None = None
    notes: tuple[str, ...] = ()


def read_any(path: str | os.PathLike, name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Weights:
    """Tensors and header of a weight file of any kind, a run's folder (its best weights), or "hf://owner/name".

    Args:
        name: our name of the network, needed only where a file does not tell.
        overrides: options of the network that a file without a header of ours is for.

    Raises:
        InputError: in one line, for a file that is missing, damaged, hostile or of no network known here.
    """
    source, overrides = str(path), dict(overrides or {})
    visible = {key: value for key, value in overrides.items() if key not in TRAINING_ONLY}
    if hub.is_hub_uri(source):
        path = hub.fetch(source)
    elif (Path(path) / "best.safetensors").is_file():
        path = Path(path) / "best.safetensors"
    elif not Path(path).is_file():
        folder = " (that is a folder, with no best.safetensors in it)" if Path(path).is_dir() else ""
        raise InputError(f"no weight file {str(path)!r}{folder}")
    try:
        kind = file_kind(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if kind == "normfree":
        state, info = read_weights(path)
        return Weights(plain_names(state, path)[0], info)
    if kind == "haiku":
        return _read_deepmind(Path(path), name, visible)
    state, notes = read_state(Path(path))
    if any(re.match(r"(stem|stages\.\d+\.\d+)\.conv0\.", key) for key in state):
        return _read_own(state, notes, source, name, [visible, overrides])
    return _read_timm(state, notes, source, visible)


def _read_own(
    state: dict[str, Tensor],
    notes: tuple[str, ...],
    source: str,
    name: str | None,
    attempts: Sequence[Mapping[str, Any]],
) -> Weights:
    """A state dict of a network of ours, which shows its architecture and not its options; those are in `attempts`."""
    stem = state.get("stem.conv0.weight", state.get("stem.conv.weight"))
    in_channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    num_classes, depth = timm.size(state, "head.fc"), timm.depth(state)
    candidates = [name] if name else [each for each in TABLE if tuple(defaults(each)["depth"]) == depth]
    fits: dict[str, ModelInfo] = {}
    differences = []
    for candidate in candidates:
        for options in attempts:
            like = _on_meta(candidate, num_classes, in_channels, options)
            differences.append(_difference(like.state_dict(), state))
            if not differences[-1] and like.info is not None:
                fits.setdefault(candidate, like.info)
    if len(fits) == 1:
        candidate, info = next(iter(fits.items()))
        said = f"{source} names no options: those of {candidate} are taken, {_spell(info.overrides) or 'as they are'}"
        if name is None:
            logging.getLogger("normfree").warning(said)
        info = replace(info, source=f"state dict {Path(source).name}")
        return Weights(state, info, Report(matched=list(state)), (*notes, said))
    if fits:
        raise InputError(f"{source} fits {' and '.join(fits)}: name one, as normfree convert IN OUT --model NAME does")
    how = "it was made with other options: give them in create_model(NAME, weights=..., OPTION=...)"
    raise InputError(
        f"{source} does not fit {name or 'any network here'}: {(differences or [f'depth {depth}'])[0]}; {how}"
    )


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


def _read_timm(theirs: dict[str, Tensor], notes: tuple[str, ...], source: str, overrides: Mapping[str, Any]) -> Weights:
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
    if options:
        notes += (f"timm's arithmetic is kept, as options that the file records: {_spell(options)}",)
    return Weights(state, info, report, notes)


def _on_meta(name: str, num_classes: int, in_channels: int, overrides: Mapping[str, Any]) -> Network:
    """A network without memory: names and shapes."""
    with torch.device("meta"):
        return build(name, num_classes, in_channels, overrides)


def _spell(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _difference(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The first tensor that has no counterpart of its name and shape, and how many more; "" where all have."""
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"tensor {wrong[0]!r}{more} differs" if wrong else ""


def _load_state(model: Network, state: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Puts tensors into a network, which takes their types."""
    own = model.state_dict()
    if model.out_indices is not None:  # a feature extractor drops the layers it does not need
        state = {key: value for key, value in state.items() if key in own}
    if difference := _difference(own, state):
        assert model.info is not None
        raise InputError(f"{path} does not fit this {model.info.architecture}: {difference}")
    model.load_state_dict(state, assign=True)


def from_weights(
    name: str,
    num_classes: int,
    in_channels: int,
    path: str | os.PathLike,
    overrides: Mapping[str, Any],
    class_names: Sequence[str] = (),
) -> tuple[Network, tuple[str, ...]]:
    """A network as `create_model` makes it from a weight file, and lines that say what of the file is not as it was.

    The classifier keeps the rows of those `class_names` (any Unicode form) that the file knows, the others are new;
    where the file or the caller names no classes, it is kept whole if their number is the same, else it is new. The
    first convolution is adapted to the number of channels (`timm.with_channels`), whose mean and deviation are the
    average of the file's. Tensors take the default type, whatever the file's.
    """
    read = read_any(path, name, overrides)
    info, state, notes = read.info, dict(read.state), list(read.notes)
    if info.architecture != name:
        raise InputError(f"{path} holds weights of {info.architecture}, not of {name}")
    overrides = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    pooling = {"global_pool"} if num_classes else set()  # a classifier needs it, whatever the file does without one
    options = {key: value for key, value in info.overrides.items() if key not in pooling} | overrides
    model = build(name, num_classes, in_channels, options)
    own = model.state_dict()
    recorded = defaults(name) | info.overrides
    changed = {key: value for key, value in overrides.items() if key not in TRAINING_ONLY and recorded[key] != value}
    if changed:
        notes.append(f"unlike the network of {path}: {_spell(changed)}")
    if in_channels != info.in_channels:
        layer = next(key for key, module in model.named_modules() if isinstance(module, nn.Conv2d))
        state = timm.with_channels(state, layer, in_channels, recorded.get("ws_eps"))
        mean, std = (((sum(values) / len(values)),) * in_channels for values in (info.mean, info.std))
        notes.append(
            f"{layer} is adapted from {info.in_channels} to {in_channels} channels, mean and deviation averaged"
        )
        info = replace(info, mean=mean, std=std)
    if model.out_indices is None:
        rows, said = _rows_kept(info, num_classes, class_names)
        notes.append(said)
        old = {key: state.pop(key) for key in [*state] if key.startswith("head.fc.")}
        for key in (key for key in own if key.startswith("head.fc.")):
            state[key] = own[key].clone()
            if rows and key in old:
                state[key][[row for row, _ in rows]] = old[key][[row for _, row in rows]].to(own[key].dtype)
    _load_state(model, {key: value.to(own[key].dtype) if key in own else value for key, value in state.items()}, path)
    kept = class_names or (info.class_names if num_classes == info.num_classes else ())
    model.info = replace(
        info, num_classes=num_classes, in_channels=in_channels, class_names=tuple(kept), overrides=options
    )
    return model, tuple(notes)


def _rows_kept(info: ModelInfo, num_classes: int, class_names: Sequence[str]) -> tuple[list[tuple[int, int]], str]:
    """Pairs of a row of the new classifier and the row of the file's that it takes over; and what is to be said."""
    if not num_classes:
        return [], "the classifier is left out"
    if class_names and info.class_names:
        old = {unicodedata.normalize("NFC", name): row for row, name in enumerate(info.class_names)}
        names = [unicodedata.normalize("NFC", name) for name in class_names]
        rows = [(row, old[name]) for row, name in enumerate(names) if name in old]
        new, gone = [name for name in names if name not in old], [name for name in old if name not in names]
        if not rows:
            return [], f"the classifier is new: none of the {num_classes} classes is among the file's"
        said = f"the classifier keeps its rows for {len(rows)} of {num_classes} classes"
        said += "".join(f"; {what}: {some(names)}" for what, names in (("new", new), ("left out", gone)) if names)
        return rows, said
    if num_classes == info.num_classes:
        unnamed = "" if info.class_names else ", though the file does not name its classes"
        return [(row, row) for row in range(num_classes)], f"the classifier for {num_classes} classes is kept{unnamed}"
    return [], f"the classifier is new: {num_classes} classes, where the file has {info.num_classes or 'none'}"


def load(path: str | os.PathLike) -> Network:
    """The network in a weight file, in evaluation mode on the CPU, with the file's header as `model.info`.

    `path`: a file that `save` wrote, a run's folder, a released `F0_haiku.npz` …, a timm `.safetensors` or `.pth`, a
    state dict of a network of ours with its own options, or "hf://owner/name". Tensors keep the types of a file of
    ours. InputError, in one line, for anything else.
    """
    weights = read_any(path)
    info = weights.info
    try:  # nothing is allocated before the shapes are known to agree
        model = _on_meta(info.architecture, info.num_classes, info.in_channels, info.overrides)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    _load_state(model, weights.state, path)
    model.info = info
    return model.eval()


def save(model: nn.Module, path: str | os.PathLike, info: ModelInfo | None = None) -> None:
    """Writes `model` and what `load` and `predict` need to know as one safetensors file.

    Args:
        model: as `create_model` made it, also inside `torch.compile`, DDP, FSDP2 or an average of its weights; its
            classifier and first convolution may be others. Under FSDP2 all ranks call this.
        info: None: `model.info`, with the number of classes and channels that the network has now.

    Raises:
        InputError: in one line, and nothing is written: a network that `load` would not build again from its tensors,
            `info` of another one, or a place that cannot be written to.
        OSError: the disk is full; the file that was there is still whole.
    """
    network = _unwrapped(model)
    state, _ = plain_names(network.state_dict(), path)
    for key, value in state.items():
        if hasattr(value, "full_tensor"):  # a DTensor, of which this rank has a shard; its class takes long to import
            state[key] = value.full_tensor()
    known = info or getattr(network, "info", None)
    if known is None:
        raise InputError(
            "this network was not made by create_model: pass the one that is inside, or "
            "info=ModelInfo(architecture, num_classes, ...)"
        )
    write_weights(path, state, _described(network, state, known, info is not None))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile` (`_orig_mod`), DDP, DataParallel, AveragedModel, timm's EMA (`module`)."""
    # other people's wrappers may compute something before the network or after it
    if isinstance(model, Network) or type(model).__module__.partition(".")[0] not in ("torch", "timm"):
        return model
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _described(network: nn.Module, state: Mapping[str, Tensor], info: ModelInfo, strict: bool) -> ModelInfo:
    """`info` with the classes and channels that the tensors have; InputError where `load` would build another network.

    `strict`: `info` must say so already.
    """
    first = next((value for value in state.values() if value.ndim == 4), None)
    in_channels = info.in_channels if first is None else first.shape[1]
    extracts = isinstance(network, Network) and network.out_indices is not None  # which has no classifier to count
    num_classes = info.num_classes if extracts else timm.size(state, "head.fc")
    if (num_classes, in_channels) != (info.num_classes, info.in_channels):
        if strict:
            theirs = f"{info.num_classes} classes and {info.in_channels} channels"
            raise InputError(f"info is for {theirs}, the network has {num_classes} and {in_channels}")
        names = info.class_names if num_classes == info.num_classes else ()
        info = replace(info, num_classes=num_classes, class_names=names)
    like = _on_meta(info.architecture, num_classes, in_channels, info.overrides)
    assert like.info is not None
    if in_channels != info.in_channels:
        info = replace(info, in_channels=in_channels, mean=like.info.mean, std=like.info.std)
    difference = _difference(like.state_dict(), state)
    if not difference:
        own, expected = (plain_names(dict(each.named_modules()), "this network")[0] for each in (network, like))
        wrong = [key for key in expected if key not in own or not _alike(own[key], expected[key])]
        difference = f"layer {wrong[0]!r} is another" if wrong else ""
    if difference:
        what = f"{info.architecture}{' with ' + _spell(info.overrides) if info.overrides else ''}"
        how = "torch.save its state_dict() instead"
        raise InputError(f"a weight file cannot describe this network: it is no {what} any more ({difference}); {how}")
    return info


def _alike(own: nn.Module, like: nn.Module) -> bool:
    """Whether two layers compute the same from the same tensors: kind, strides, padding, scales, activation."""
    several = (nn.modules.batchnorm._BatchNorm, nn.Linear)  # which have subclasses that compute the same
    if not isinstance(own, next((kind for kind in several if isinstance(like, kind)), type(like))):
        return False
    spelled = isinstance(like, nn.modules.conv._ConvNd | nn.Linear | Activation)
    return not spelled or own.extra_repr() == like.extra_repr()


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
    if not hub.is_hub_uri(out):
        check_writable(out, "OUT", replace=True)
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
