"""Kernels in C++ for CPUs, where a C++ compiler is at hand.

The sources here are compiled when they are first needed, in a few seconds, and the library is kept in the user's cache.
Without a compiler, on other devices and in other dtypes PyTorch's operations do the same. NORMFREE_NATIVE=0 switches
them off.
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
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
SIGNATURES = {
    "normfree_sweep": (c_void_p, c_int64, c_int32),
    "normfree_gelu": (c_void_p, c_void_p, c_int64, c_int32),
    "normfree_gelu_gradient": (c_void_p,) * 3 + (c_int64, c_int32),
    "normfree_gate_gradient": (c_void_p,) * 5 + (c_int64,) * 3 + (c_int32,),
    "normfree_standardize": (c_void_p,) * 2 + (c_float,) * 4 + (c_int64,) * 2 + (c_void_p,) * 4 + (c_int32,),
    "normfree_standardize_gradient": (c_void_p,) * 2
    + (c_float,)
    + (c_void_p,) * 4
    + (c_int64,) * 2
    + (c_void_p,) * 2
    + (c_int32,),
    "normfree_conv1x1_filter_gradient": (c_void_p,) * 4 + (c_int64,) * 3 + (c_int32,) * 2,
    "normfree_resample": (c_void_p, c_int64, c_int64, c_int32) + (c_float,) * 4 + (c_int64, c_int32, c_int32, c_void_p),
    "normfree_conv1x1": (c_void_p,) * 5 + (c_int64,) * 3 + (c_int32,) * 3,
    "normfree_winograd": (c_void_p,) * 5 + (c_int64,) * 11 + (c_int32,) * 2,
    "normfree_winograd_filter_gradient": (c_void_p,) * 4 + (c_int64,) * 11 + (c_int32,),
}


def native_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they are there and take tensors such as these: float32, plain, on the CPU."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return None
        if not torch._C._has_storage(tensor):  # of vmap, which batched gradients use
            return None
    # whoever watches or replaces operations, such as a counter of FLOPs, would not see the kernels
    return None if torch._C._len_torch_dispatch_stack() else library()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if os.environ.get("NORMFREE_NATIVE") == "0" or compiler is None or os.name == "nt":
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, types in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def _compiled(compiler: str) -> Path:
    """The library in the cache, of a name that depends on sources, compiler and processor."""
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    texts = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.[ch]*")))
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    key = hashlib.sha256(texts + version + _processor().encode() + " ".join(FLAGS).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfree"
    compiled = cache / f"native-{key[:16]}.so"
    if not compiled.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / compiled.name
            command = [compiler, *FLAGS, *map(str, sources), "-o", str(built)]
            subprocess.run(command, capture_output=True, timeout=300, check=True)
            os.replace(built, compiled)
    return compiled


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
