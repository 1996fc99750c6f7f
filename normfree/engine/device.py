"""Devices, their memory, and the precision on them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

from normfree.errors import InputError, nearest


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, else the first of CUDA, MPS and CPU that exists; InputError if there is none."""
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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in `precision`, "float32" or "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def processor() -> str:
    """The name of this machine's processor, with family and model numbers, which tell generations apart."""
    with contextlib.suppress(OSError, KeyError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
        about = {key.strip(): value.strip() for key, _, value in lines}
        return f"{about['model name']}, family {about['cpu family']} model {about['model']}"
    return platform.processor() or platform.machine()


def memory_gib(device: torch.device) -> float:
    """Total memory of the device; for a CPU and for MPS, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 8.0


def keep_freed_memory() -> None:
    """Lets this process keep freed memory, in blocks of up to 32 MiB, for its next step, if the C library is glibc.

    Else the maps of every step are fresh pages of the system, each of which it clears first: 4 to 8 % of a step of the
    small networks on a CPU. It is for whoever owns the process, such as the command `normfree train`: it holds for
    everything in it.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 2**31 - 1)
