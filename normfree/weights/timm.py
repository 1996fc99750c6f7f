"""timm's normalizer-free networks: their counterparts among ours, names and shapes of tensors, files.

timm's arithmetic differs slightly (docs/parity.md). With the options in `ARCHITECTURES`, which a converted file
records, a network of ours computes the same to rounding.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.errors import InputError
from normfree.files import replacing
from normfree.weights.file import ModelInfo, Report, Weights, Zoo, spelled, write_tensors
from normfree.weights.states import depth, size

_EPS = {"ws_eps": 1e-5}
_DM = _EPS | {"activation": "gelu_erf"}
_OWN = _EPS | {"padding": "symmetric", "gamma_in_conv": True, "skip_gain": False}
_RES = _OWN | {"pool_shortcut": True}


def _reg(final_width: int, *width: int) -> dict[str, Any]:
    return _OWN | {"channel_divisor": 8, "width": width, "final_width": final_width}


# timm's name -> our name, and the options with which ours computes the same
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"dm_nfnet_f{i}": (f"nfnet_f{i}", _DM) for i in range(7)},
    **{f"nfnet_f{i}": (f"nfnet_f{i}", _OWN | _DM) for i in range(8)},
    **{name: (name, {}) for name in ("nfnet_l0", "eca_nfnet_l0", "eca_nfnet_l1", "eca_nfnet_l2", "test_nfnet")},
    **{f"nf_resnet{i}": (f"nf_resnet{i}", _RES) for i in (26, 50, 101)},
    **{f"nf_seresnet{i}": (f"nf_resnet{i}", _RES | {"se_ratio": 1 / 16}) for i in (26, 50, 101)},
    **{f"nf_ecaresnet{i}": (f"nf_resnet{i}", _RES | {"eca": True}) for i in (26, 50, 101)},
    "nf_regnet_b0": ("nf_regnet_b0", _reg(960, 40, 80, 160, 328)),
    "nf_regnet_b1": ("nf_regnet_b1", _reg(960, 40, 80, 160, 328)),
    "nf_regnet_b2": ("nf_regnet_b2", _reg(1064, 40, 88, 176, 368)),
    "nf_regnet_b3": ("nf_regnet_b3", _reg(1152, 40, 96, 184, 400)),
    "nf_regnet_b4": ("nf_regnet_b4", _reg(1344, 48, 112, 216, 464)),
    "nf_regnet_b5": ("nf_regnet_b5", _reg(1536, 64, 128, 256, 528)),
}

# our name -> the repository of timm's Hub with weights for it; all have the licence Apache-2.0
PUBLISHED: dict[str, str] = {
    **{f"nfnet_f{i}": f"timm/dm_nfnet_f{i}.dm_in1k" for i in range(7)},
    **{name: f"timm/{name}.ra2_in1k" for name in ("nfnet_l0", "eca_nfnet_l0", "eca_nfnet_l1")},
    **{name: f"timm/{name}.ra2_in1k" for name in ("nf_resnet50", "nf_regnet_b1")},
    "eca_nfnet_l2": "timm/eca_nfnet_l2.ra3_in1k",
    "test_nfnet": "timm/test_nfnet.r160_in1k",
}

_RESNETS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 26, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101}
_REGNET_DEPTHS = ((1, 3, 6, 6), (2, 4, 7, 7), (2, 4, 8, 8), (2, 5, 9, 9), (2, 6, 11, 11), (3, 7, 14, 14))
_REGNETS: dict[tuple[int, ...], int] = {depth: number for number, depth in enumerate(_REGNET_DEPTHS)}

# timm's training px, test px and crop fraction for its own weights, if they differ from our variant's
_PREPARED = {"nf_resnet50": (256, 288, 0.94), "nf_regnet_b1": (256, 288, 0.9), "nfnet_l0": (224, 288, 1.0)}
_PREPARED["test_nfnet"] = (160, 160, 0.95)
_PREPARED |= {
    f"eca_nfnet_l{i}": (px, test_px, 1.0) for i, (px, test_px) in enumerate([(224, 288), (256, 320), (320, 384)])
}

_BLOCK = {"conv0": "conv1", "conv1": "conv2", "conv1b": "conv2b", "conv2": "conv3"}
_BLOCK |= {"conv_shortcut": "downsample.conv", "skip_gain": "skipinit_gain"}


def timm_name(key: str) -> str:
    """timm's name of our tensor `key`.

    >>> timm_name("stages.1.0.conv1b.gain"), timm_name("stem.conv0.weight")
    ('stages.1.0.conv2b.gain', 'stem.conv1.weight')
    """
    if key.startswith("stem."):
        return re.sub(r"conv(\d)", lambda found: f"conv{int(found[1]) + 1}", key)
    if key.startswith("stages."):
        stages, i, j, layer, *rest = key.split(".")
        return ".".join([stages, i, j, _BLOCK.get(layer, "attn_last" if layer == "se" else layer), *rest])
    return key


def read_timm(
    theirs: dict[str, Tensor],
    notes: tuple[str, ...],
    source: str,
    zoo: Zoo,
    overrides: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> Weights:
    """timm's state dict in our terms; `config`: the config.json of its repository."""
    try:
        name, num_classes, in_channels = recognise(theirs)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    ours, options = ARCHITECTURES[name]
    network = zoo.outline(ours, num_classes, in_channels, {**options, **overrides})
    state, report = from_timm(theirs, network.state_dict())
    if not report.complete:
        raise InputError(f"{source} does not fit {ours} as timm's {name}: {report}")
    try:
        prepared = preparation(name, in_channels, config)
        info = replace(network.info, source=f"timm's {name} ({Path(source).name})", **prepared)
        info = ModelInfo.from_metadata(info.to_metadata())  # which checks what the config.json says
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise InputError(f"{source}: its config.json is not one of timm's") from None
    if options:
        notes += (f"timm's arithmetic is kept by options that the file records: {spelled(options)}",)
    return Weights(state, info, report, notes, network)


def recognise(state: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """The name of timm's architecture, the number of classes and of input channels.

    InputError if the tensors are of none of `ARCHITECTURES`.
    """
    blocks = depth(state)
    gate = "eca" if any(key.endswith("attn_last.conv.weight") for key in state) else ""
    name = ""
    if "stem.conv4.weight" in state:
        number = blocks[0] - 1
        inner, outer = (size(state, f"stages.0.0.conv{i}") for i in (1, 3))
        if any(key.endswith("skipinit_gain") for key in state):
            name = f"dm_nfnet_f{number}"
        else:
            light = "test_nfnet" if blocks == (1, 1, 1, 1) else f"{gate}_nfnet_l{number}".lstrip("_")
            name = light if 4 * inner == outer else f"nfnet_f{number}"
    elif "stem.conv.weight" in state and "final_conv.weight" in state:
        name = f"nf_regnet_b{_REGNETS.get(blocks)}"
    elif "stem.conv.weight" in state:
        gate = gate or ("se" if any(".attn_last." in key for key in state) else "")
        name = f"nf_{gate}resnet{_RESNETS.get(blocks)}"
    stem = state.get("stem.conv1.weight", state.get("stem.conv.weight"))
    if name not in ARCHITECTURES or stem is None or stem.ndim != 4:
        raise InputError(
            "normfree did not write this file, nor are its tensors those of one of timm's normalizer-free networks; "
            "`normfree models` lists published weights"
        )
    return name, size(state, "head.fc"), stem.shape[1]


def preparation(name: str, in_channels: int, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of `ModelInfo` that describe images, from a repository's config.json or else from timm's table.

    timm squeezes images to a square for DeepMind's weights, as the authors do, and crops the center for its own. Where
    the config.json has mean and deviation of another number of channels, it takes their average.
    """
    prepared: dict[str, Any] = {}
    if name in _PREPARED:
        train_px, eval_px, crop = _PREPARED[name]
        prepared = dict(train_px=train_px, eval_px=eval_px, crop_fraction=crop)
    if name == "test_nfnet":
        prepared |= dict.fromkeys(("mean", "std"), (0.5,) * in_channels)
    prepared["eval_crop"] = "resize_crop" if name.startswith("dm_") else "center"
    if config is not None:
        cfg = config.get("pretrained_cfg", {})
        train = cfg["input_size"]
        prepared |= dict(train_px=train[-1], eval_px=cfg.get("test_input_size", train)[-1])
        for key in ("mean", "std"):
            values = tuple(cfg[key])
            fit = len(values) == in_channels
            prepared[key] = values if fit else (sum(values) / len(values),) * in_channels
        prepared |= dict(crop_fraction=cfg.get("test_crop_pct", cfg["crop_pct"]), licence=cfg.get("license", ""))
        prepared["eval_crop"] = "resize_crop" if cfg.get("crop_mode") == "squash" else "center"
    return prepared


def _timm_key(key: str, names: Mapping[str, Any]) -> str:
    """NF-RegNets call their gate `attn`, all others `attn_last`."""
    name = timm_name(key)
    return name if name in names else name.replace(".attn_last.", ".attn.")


def from_timm(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
    """timm's tensors under our names and in our shapes: gains (C,), squeeze-excite (out, in).

    `like` is a state dict of the network to be filled. The report lists what differs in name or shape.
    """
    report, ours, left = Report(), {}, dict(state)
    for key, own in like.items():
        value = left.pop(_timm_key(key, state), None)
        if value is None:
            report.missing.append(key)
        elif [side for side in value.shape if side > 1] != [side for side in own.shape if side > 1]:
            report.reshaped.append(f"{key} {tuple(value.shape)} for {tuple(own.shape)}")
        else:
            ours[key] = value.reshape(own.shape).float()
            report.matched.append(key)
    report.unexpected = sorted(left)
    return ours, report


def to_timm(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The inverse of `from_timm` for timm's architecture `name`."""
    theirs = {}
    for key, value in state.items():
        theirs_key = timm_name(key)
        if "regnet" in name:
            theirs_key = theirs_key.replace(".attn_last.", ".attn.")
        if key.endswith(".gain") or re.search(r"\.se\.fc\d\.weight$", key):
            value = value.reshape(*value.shape, *[1] * (4 - value.ndim)) if value.ndim > 1 else value.view(-1, 1, 1, 1)
        theirs[theirs_key] = value.detach().cpu().contiguous()
    return theirs


def write_timm(path: str | os.PathLike, state: dict[str, Tensor]) -> None:
    """Writes a state dict as .safetensors, or with torch.save for any other suffix."""
    if Path(path).suffix == ".safetensors":
        write_tensors(path, state, {"format": "pt"})
        return
    content = io.BytesIO()  # torch.save gives no reason if it cannot write
    torch.save(state, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _deviation(weight: Tensor, eps: float | None) -> Tensor:
    """The divisor of weight standardization with epsilon `eps` for each output channel: (out,) float64."""
    var, fan_in = weight.double().flatten(1).var(1, correction=0), weight[0].numel()
    return (var * fan_in).clamp(min=1e-4).sqrt() if eps is None else ((var + eps) * fan_in).sqrt()


def with_epsilon(state: Mapping[str, Tensor], old: float | None, new: float | None) -> dict[str, Tensor]:
    """`state` with gains changed so that epsilon `new` gives the same standardized weights as `old` (`WSConv`)."""
    state = dict(state)
    if old == new:
        return state
    for key in [key for key in state if key.endswith(".gain")]:
        weight = state[key.removesuffix("gain") + "weight"]
        state[key] = (state[key] * _deviation(weight, new) / _deviation(weight, old)).to(state[key].dtype)
    return state


def with_channels(state: Mapping[str, Tensor], layer: str, channels: int, eps: float | None) -> dict[str, Tensor]:
    """`state` with its first convolution, called `layer`, adapted to another number of channels, as in timm.

    For one channel, the filter is summed over its channels. For more, the channels are repeated and scaled down in
    proportion. Weight standardization would undo the change in scale, so the gain takes the ratio. One channel, or a
    multiple of the old number, then gives what equal channels gave before.
    """
    state = dict(state)
    weight, gain = state[f"{layer}.weight"], f"{layer}.gain"
    if channels == 1:
        new = weight.sum(1, keepdim=True)
    else:
        new = weight[:, [i % weight.shape[1] for i in range(channels)]] * (weight.shape[1] / channels)
    state[f"{layer}.weight"] = new
    if gain in state:
        state[gain] = (state[gain] * _deviation(new, eps) / _deviation(weight, eps)).to(state[gain].dtype)
    return state
