"""Networks from weight files, and weight files from networks."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normfree._compat import BatchNorm, ConvNd, unwrapped
from normfree.errors import InputError
from normfree.layers import Activation
from normfree.models.network import Network
from normfree.models.table import TABLE, build, defaults
from normfree.weights import ModelInfo
from normfree.weights.file import DETECTOR, NON_WEIGHT_OPTIONS, Weights, Zoo, difference, some, spelled, write_weights
from normfree.weights.read import read
from normfree.weights.states import plain_names, size
from normfree.weights.timm import with_channels


def _on_meta(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> Network:
    """A network without memory: names and shapes."""
    with torch.device("meta"):
        return build(name, num_classes, in_channels, options)


ZOO = Zoo({name: variant.depth for name, (_, variant) in TABLE.items()}, _on_meta)


def read_any(path: str | os.PathLike, name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Weights:
    """`normfree.weights.read.read` for the networks of this package; InputError for a detector."""
    weights = read(path, ZOO, name, overrides)
    if weights.info.architecture == DETECTOR:
        raise InputError(f"{path} is a detector: use the verbs of `normfree detect`, or normfree.load in Python")
    return weights


def _fill(model: Network, state: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Puts tensors into a network, which takes over their dtypes."""
    own = model.state_dict()
    if model.out_indices is not None:  # a feature extractor drops the layers it does not need
        state = {key: value for key, value in state.items() if key in own}
    if wrong := difference(own, state):
        assert model.info is not None
        raise InputError(f"{path} does not fit this {model.info.architecture}: {wrong}")
    model.load_state_dict(state, assign=True)


def load(path: str | os.PathLike) -> Network:
    """The network in a weight file, in evaluation mode on the CPU, with the file's header as `model.info`.

    Args:
        path: a file that `save` wrote, a run folder, a released `F0_haiku.npz` …, a timm `.safetensors` or `.pth`, a
            state dict of one of our networks with default options, or "hf://owner/name". Tensors keep the dtypes of
            a file that `save` wrote.

    Raises:
        InputError: in one line, for anything else.
    """
    return network_of(read_any(path), path)


def network_of(weights: Weights, path: str | os.PathLike) -> Network:
    """`load`, for a file that has been read."""
    model, info = weights.network, weights.info
    if model is None:
        try:  # no memory is allocated before the shapes are known to agree
            model = _on_meta(info.architecture, info.num_classes, info.in_channels, info.overrides)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {error}") from None
    _fill(model, weights.state, path)
    model.info = info
    return model.eval()


def unfilled(info: ModelInfo) -> Weights:
    """Initial values for a network that `info` describes and whose tensors will be replaced."""
    return Weights(build(info.architecture, info.num_classes, info.in_channels, info.overrides).state_dict(), info)


def from_weights(
    name: str,
    num_classes: int,
    in_channels: int,
    path: str | os.PathLike,
    overrides: Mapping[str, Any],
    class_names: Sequence[str] = (),
    weights: Weights | None = None,
) -> tuple[Network, tuple[str, ...]]:
    """`create_model` with a weight file; also returns notes on what differs from the file.

    `weights` is the content of the file, if it has been read; the network takes over its tensors. The classifier keeps
    the file's rows for those `class_names` that the file knows, in any Unicode form. If the file or the caller names
    no classes, the classifier is kept whole if the number of classes agrees. All other rows are freshly initialised.
    The first convolution is adapted to `in_channels` (`with_channels`), whose mean and standard deviation are the
    averages of the file's. Tensors are converted to the default dtype.
    """
    weights = weights or read_any(path, name, overrides)
    info, state, notes = weights.info, dict(weights.state), list(weights.notes)
    if info.architecture != name:
        raise InputError(f"{path} holds weights of {info.architecture}, not of {name}")
    overrides = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    pooling = {"global_pool"} if num_classes else set()  # a classifier needs pooling, even if the file has none
    options = {key: value for key, value in info.overrides.items() if key not in pooling} | overrides
    # not `weights.network`: a new classifier must get the values that the seed gives it in a fresh network
    model = build(name, num_classes, in_channels, options)
    recorded = defaults(name) | info.overrides
    changed = {
        key: value for key, value in overrides.items() if key not in NON_WEIGHT_OPTIONS and recorded[key] != value
    }
    if changed:
        notes.append(f"unlike the network of {path}: {spelled(changed)}")
    if in_channels != info.in_channels:
        layer = next(key for key, module in model.named_modules() if isinstance(module, nn.Conv2d))
        state = with_channels(state, layer, in_channels, recorded.get("ws_eps"))
        notes.append(
            f"{layer} is adapted from {info.in_channels} to {in_channels} channels, mean and deviation averaged"
        )
        mean, std = (((sum(values) / len(values)),) * in_channels for values in (info.mean, info.std))
        info = replace(info, mean=mean, std=std)
    own = model.state_dict()
    if model.out_indices is None:
        rows, note = rows_kept(info, num_classes, class_names)
        notes += [_counted(own, rows, num_classes), note]
        old = {key: state.pop(key) for key in [*state] if key.startswith("head.fc.")}
        for key in (key for key in own if key.startswith("head.fc.")):
            state[key] = own[key].clone()
            if rows and key in old:
                state[key][[row for row, _ in rows]] = old[key][[row for _, row in rows]].to(own[key].dtype)
    _fill(model, {key: value.to(own[key].dtype) if key in own else value for key, value in state.items()}, path)
    kept = class_names or (info.class_names if num_classes == info.num_classes else ())
    model.info = replace(
        info, num_classes=num_classes, in_channels=in_channels, class_names=tuple(kept), overrides=options
    )
    return model, tuple(notes)


def _counted(own: Mapping[str, Tensor], rows: Sequence[Any], num_classes: int) -> str:
    """How many tensors and parameters of a network come from a file, if its classifier has these rows of it."""
    sizes = {key: value.numel() for key, value in own.items()}
    head = [key for key in sizes if key.startswith("head.fc.")]
    total = sum(sizes[key] for key in head)
    new = total - total * len(rows) // max(num_classes, 1)
    tensors = len(sizes) - (len(head) if new else 0)
    fresh = f"; {new:,} parameters of the classifier are new" if new else ""
    return f"{tensors} of {len(sizes)} tensors, {sum(sizes.values()) - new:,} parameters, are taken over{fresh}"


def rows_kept(info: ModelInfo, num_classes: int, class_names: Sequence[str]) -> tuple[list[tuple[int, int]], str]:
    """Pairs of rows (new classifier, file's classifier) to be copied, and a note for the user."""
    if not num_classes:
        return [], "the classifier is left out"
    if class_names and info.class_names:
        old = {unicodedata.normalize("NFC", name): row for row, name in enumerate(info.class_names)}
        names = [unicodedata.normalize("NFC", name) for name in class_names]
        rows = [(row, old[name]) for row, name in enumerate(names) if name in old]
        new, gone = [name for name in names if name not in old], [name for name in old if name not in names]
        loose = {_loosely(name): name for name in old}
        close = [f"{name} ({loose[_loosely(name)]} in the file)" for name in new if _loosely(name) in loose]
        spelled = f"; spelled differently: {some(close)}" if close else ""
        if not rows:
            return [], f"the classifier is new: none of the {num_classes} classes is among the file's{spelled}"
        note = f"the classifier keeps its rows for {len(rows)} of {num_classes} classes"
        note += "".join(f"; {what}: {some(names)}" for what, names in (("new", new), ("left out", gone)) if names)
        return rows, note + spelled
    if num_classes == info.num_classes:
        unnamed = "" if info.class_names else ", though the file does not name its classes"
        return [(row, row) for row in range(num_classes)], f"the classifier for {num_classes} classes is kept{unnamed}"
    return [], f"the classifier is new: {num_classes} classes, where the file has {info.num_classes or 'none'}"


def _loosely(name: str) -> str:
    """A class name without case, spaces and punctuation."""
    return "".join(filter(str.isalnum, name.casefold()))


def save(model: nn.Module, path: str | os.PathLike, info: ModelInfo | None = None) -> None:
    """Writes `model` as one safetensors file, with a header that `load` and `predict` need.

    Args:
        model: a network of `create_model`, possibly wrapped by `torch.compile`, DDP, FSDP2 or a weight average. Its
            classifier and first convolution may have been replaced. Under FSDP2 all ranks must call this.
        info: None: `model.info` with the network's current number of classes and channels.

    Raises:
        InputError: in one line, and nothing is written: `load` could not rebuild the network, `info` contradicts it,
            or the file cannot be written.
        OSError: the disk is full. The old file is still whole.
    """
    network = bare(model)
    state, _ = plain_names(full_state(network), path)
    known = info or getattr(network, "info", None)
    if known is None:
        raise InputError(
            "this network was not made by create_model: pass the one that is inside, or "
            "info=ModelInfo(architecture, num_classes, ...)"
        )
    write_weights(path, state, _described(network, state, known, info is not None))


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; sharded tensors whole, for which all ranks must call this."""
    # a DTensor, whose class is slow to import
    whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value  # noqa: E731
    return {key: whole(value) for key, value in model.state_dict().items()}


def bare(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile` (`_orig_mod`), DDP, DataParallel, AveragedModel, timm's EMA (`module`)."""
    # other wrappers may compute something before or after the network
    if isinstance(model, Network) or type(model).__module__.partition(".")[0] not in ("torch", "timm"):
        return model
    inner = unwrapped(model)
    return bare(inner) if isinstance(inner, nn.Module) else model


def _described(network: nn.Module, state: Mapping[str, Tensor], info: ModelInfo, strict: bool) -> ModelInfo:
    """`info` with the classes and channels of the tensors; InputError if `load` would build a different network.

    `strict`: `info` must already have them.
    """
    first = next((value for value in state.values() if value.ndim == 4), None)
    in_channels = info.in_channels if first is None else first.shape[1]
    extracts = isinstance(network, Network) and network.out_indices is not None  # no classifier to count
    num_classes = info.num_classes if extracts else size(state, "head.fc")
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
    wrong = difference(like.state_dict(), state)
    if not wrong:
        own, expected = (plain_names(dict(each.named_modules()), "this network")[0] for each in (network, like))
        layers = [key for key in expected if key not in own or not _computes_the_same(own[key], expected[key])]
        wrong = f"layer {layers[0]!r} is another" if layers else ""
    if wrong:
        what = f"{info.architecture}{' with ' + spelled(info.overrides) if info.overrides else ''}"
        how = "torch.save its state_dict() instead"
        raise InputError(f"a weight file cannot describe this network: it is no longer {what} ({wrong}); {how}")
    return info


def _computes_the_same(own: nn.Module, like: nn.Module) -> bool:
    """Whether two layers with equal tensors are equal functions, by class, stride, padding, scales and activation."""
    open_classes = (BatchNorm, nn.Linear)  # subclasses of these compute the same
    if not isinstance(own, next((cls for cls in open_classes if isinstance(like, cls)), type(like))):
        return False
    has_settings = isinstance(like, ConvNd | nn.Linear | Activation)
    return not has_settings or own.extra_repr() == like.extra_repr()
