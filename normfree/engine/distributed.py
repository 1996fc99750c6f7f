"""Devices."""

from __future__ import annotations

import torch

from normfree.config import InputError, nearest


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the first of CUDA, MPS and CPU that is there; InputError if it is not there."""
    available = ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    if name is None:
        return torch.device(available[0])
    kind, _, index = name.partition(":")
    if kind not in available or (index and not (kind == "cuda" and index.isdigit())):
        raise InputError(f"no device {name!r} here{nearest(name, available)}; there is {', '.join(available)}")
    if index and int(index) >= torch.cuda.device_count():
        raise InputError(f"no device {name!r} here; there are {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)
