"""The update of all parameters in one pass through memory, on CPUs that have a C++ compiler.

`sweep.cpp` is compiled when it is first needed, in about two seconds, and kept in the user's cache. Without a compiler,
on other devices and in other dtypes the batched operations of agc.py, sgd.py and ema.py do the same.
NORMFREE_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
CHUNK = 16384  # elements of the units of what is not clipped
ITEM = np.dtype(
    [(name, np.uint64) for name in ("p", "g", "m", "e")]
    + [(name, np.int64) for name in ("numel", "unit")]
    + [(name, np.float32) for name in ("clipping", "eps", "lr", "momentum", "decay", "blend")]
    + [("nesterov", np.int32), ("pad", np.int32), ("clipped", np.float64), ("ratio", np.float64)]
)


@dataclass
class Item:
    """One parameter: its update, or with no momentum the clipping of its gradient alone."""

    p: Tensor
    g: Tensor
    whole: bool  # one unit, not one for each index of dimension 0
    clipping: float | None
    eps: float
    m: Tensor | None = None
    e: Tensor | None = None
    lr: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    blend: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the sweep takes it: float32 on the CPU, units in one piece of memory, the same order everywhere."""
        tensors = [t for t in (self.p, self.g, self.m, self.e) if t is not None]
        if not all(t.device.type == "cpu" and t.dtype == torch.float32 and not t.is_sparse for t in tensors):
            return False
        p = self.p
        dense = p.is_contiguous() or (
            p.is_contiguous(memory_format=torch.channels_last)
            if p.ndim == 4
            else p.ndim == 5 and p.is_contiguous(memory_format=torch.channels_last_3d)
        )
        return p.numel() == 0 or (dense and all(t.stride() == p.stride() for t in tensors))


def sweep(items: Sequence[Item]) -> Tensor:
    """Carries them out; counts of clipped units and largest ratios, (2, N). All must fit."""
    rows = []
    for item in items:
        numel = item.p.numel()
        unit = CHUNK if item.clipping is None else numel if item.whole else numel // max(1, item.p.shape[0])
        pointers = (0 if t is None else t.data_ptr() for t in (item.p, item.g, item.m, item.e))
        rates = (item.clipping or 0.0, item.eps, item.lr, item.momentum, item.weight_decay, item.blend)
        rows.append((*pointers, numel, max(1, unit), *rates, item.nesterov, 0, 0, 0))
    table = np.array(rows, ITEM)
    library = load()
    assert library is not None
    library.normfree_sweep(table.ctypes.data, len(items), torch.get_num_threads())
    return torch.from_numpy(np.stack([table["clipped"], table["ratio"]]).astype(np.float32))


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled pass; None where it is switched off or cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if os.environ.get("NORMFREE_NATIVE") == "0" or compiler is None or os.name == "nt":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    library.normfree_sweep.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.normfree_sweep.restype = None
    return library


def _compiled(compiler: str) -> Path:
    """The library in the cache, of a name that depends on source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + version + _processor().encode() + " ".join(FLAGS).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfree"
    library = cache / f"sweep-{key[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, timeout=300, check=True)
            os.replace(built, library)
    return library


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
