"""Reads the vectors of the authors' JAX code (tests/golden/README.md) into networks of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.models import Network, NFNet
from normfree.models.bn_resnet import BNResNet
from normfree.models.nf_regnet import NFRegNet
from normfree.models.nf_resnet import NFResNet

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("config")))


def build(config: dict[str, Any]) -> Network:
    """The golden files' network: regularisation off, as they were made."""
    width, depth, num_classes = config["width"], config["depth"], config["num_classes"]
    activation = config["activation"]
    if config["model"] == "NFNet":
        return NFNet(
            width,
            depth,
            num_classes,
            activation=activation,
            second_conv=config["use_two_convs"],
            group_width=config["group_width"],
            se_ratio=config["se_ratio"],
            alpha=config["alpha"],
            stochastic_depth=0.0,
        )
    if config["model"] == "NF_ResNet":
        se_ratio = config["se_ratio"] if config["use_se"] else None
        options = dict(activation=activation, se_ratio=se_ratio, alpha=config["alpha"], stochastic_depth=0.0)
        return NFResNet(width, depth, num_classes, **options)
    if config["model"] == "NF_RegNet":
        return NFRegNet(
            [int(w * config["width_multiplier"]) for w in width],
            depth,
            num_classes,
            activation=activation,
            expansion=config["expansion"],
            group_width=config["group_size"],
            se_ratio=config["se_ratio"],
            alpha=config["alpha"],
            stochastic_depth=0.0,
        )
    return BNResNet(width, depth, num_classes, activation=activation)


def to_state(arrays: dict[str, np.ndarray], prefix: str, depth: list[int]) -> dict[str, Tensor]:
    """Arrays under `prefix` (haiku names, HWIO and IN x OUT) as a state dict of ours."""
    blocks = [f"stages.{i}.{j}" for i in range(4) for j in range(depth[i])]
    state = {}
    for key, value in arrays.items():
        if not key.startswith(prefix):
            continue
        name = re.sub(r"^\w+/~/", "", key.removeprefix(prefix))
        name = re.sub(
            r"^(?:nf_res_block|nf_block|res_block_v2)(?:_(\d+))?/(~/)?", lambda m: f"{blocks[int(m[1] or 0)]}/", name
        )
        name = name.replace("stem_conv", "stem.conv").replace("squeeze_excite/~/linear_1", "se.fc2")
        name = name.replace("squeeze_excite/~/linear", "se.fc1").replace("initial_conv", "stem.conv")
        name = (
            re.sub(r"(^|/)final_bn", "act.bn", re.sub(r"bn(\d)/", r"act\1.bn/", name))
            .replace("/~/", "/")
            .replace("/", ".")
        )
        name = re.sub(r"^linear\.", "head.fc.", name)
        name = re.sub(r"\.(w|scale)$", ".weight", re.sub(r"\.(b|offset)$", ".bias", name))
        name = name.replace("mean_ema", "running_mean").replace("var_ema", "running_var")
        tensor = torch.from_numpy(np.asarray(value))
        if ".bn" in name:
            tensor = tensor.flatten()
        elif tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)
        elif tensor.ndim == 2:
            tensor = tensor.T
        state[name] = tensor.contiguous()
    return state


def to_images(array: np.ndarray) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W)"""
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def relative_error(ours: Tensor, theirs: np.ndarray | Tensor) -> float:
    """Largest difference over the largest magnitude."""
    theirs = torch.as_tensor(theirs)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
