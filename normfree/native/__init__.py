"""Kernels in C++ for CPUs, where a C++ compiler is at hand.

The sources here are compiled when they are first needed, in a few seconds, and the library is kept in the user's cache,
where it also serves without a compiler. Where there are no kernels, a line on standard error says why, and PyTorch's
operations do the same, as on other devices and in other dtypes. What the environment says of it:

- `NORMFREE_NATIVE=0` switches the kernels off.
- `NORMFREE_MARCH`: the processor to compile for, as of the compiler's option -march; else this machine's.
- `CXX`: the compiler, with its options if need be; else c++, g++ or clang++.
- `XDG_CACHE_HOME`: the folder of all caches; else ~/.cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
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


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be had, which is said once."""
    return _state()[0]


def status() -> str:
    """One line: `on (FILE, COMPILER)`, `off: REASON`, or `compiled at first use (COMPILER)`: this compiles nothing.

    FILE's name tells kernels apart: it holds the hash of its content.
    """
    if not _load.cache_info().currsize:
        with contextlib.suppress(_NoKernels, OSError):  # which are the reasons below
            _, version, stem = _wanted()
            folder = _cache_folder()
            if version and os.access(folder, os.W_OK) and not _kept(folder, stem):
                return f"compiled at first use ({version})"
    return _state()[1]


class _NoKernels(Exception):
    """Why there are none, in one line; then all that the compiler said, if it was asked."""


_LOADING = threading.Lock()


@functools.cache
def _state() -> tuple[ctypes.CDLL | None, str]:
    with _LOADING:  # threads that come at once compile once, and say once that there is nothing
        return _load()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its status."""
    try:
        compiler, version, stem = _wanted()
        folder = _cache_folder()
        path = _kept(folder, stem) or _compile(compiler, version, folder, stem)
        loaded = ctypes.CDLL(str(path))
    except (_NoKernels, OSError) as error:
        reason = str(error.args[0])
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.filename}: {error.strerror}; XDG_CACHE_HOME may name another folder to keep them in"
        first = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
        if first and os.environ.get("NORMFREE_NATIVE") != "0":
            message = "normfree: the kernels are off: %s. PyTorch's operations do the same, more slowly"
            logging.getLogger("normfree").warning(message, reason)
        return None, f"off: {reason}"
    for name, types in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded, f"on ({path.name}, {version or 'no compiler'})"


def _wanted() -> tuple[list[str], str | None, str]:
    """The compiler's command, its version (None: there is none), and how the names of fitting libraries begin.

    They depend on sources, processor and options, and on the compiler where there is one.
    """
    if os.environ.get("NORMFREE_NATIVE") == "0":
        raise _NoKernels("NORMFREE_NATIVE=0")
    if os.name == "nt":
        raise _NoKernels("they are not built on Windows")
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, COMPILERS), COMPILERS[0])]
    except ValueError as error:
        raise _NoKernels(f"CXX is {os.environ['CXX']!r}: {error}") from None
    version = None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        version = _run([*compiler, "--version"]).stdout.partition("\n")[0]
    texts = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.[ch]*")))
    stem = f"native-{_hash(texts, *_flags(), _processor())}"
    return compiler, version, f"{stem}-{_hash(*compiler, version)}" if version else stem


def _flags() -> tuple[str, ...]:
    return *FLAGS, f"-march={os.environ.get('NORMFREE_MARCH') or 'native'}"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _cache_folder() -> Path:
    """Where libraries are kept. What lies there is run, so nobody else may write to it but root."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "normfree"
    except RuntimeError:
        raise _NoKernels("this user has no home folder to keep them in; set XDG_CACHE_HOME to a folder") from None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
        raise _NoKernels(f"other users may write to {folder}; set XDG_CACHE_HOME to a folder of yours")
    return folder


def _kept(folder: Path, stem: str) -> Path | None:
    """The library in the cache, if it is whole: its name ends in the hash of its content."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError):
            if path.stem.endswith(f"-{_hash(path.read_bytes())}"):
                return path
    return None


def _compile(compiler: list[str], version: str | None, folder: Path, stem: str) -> Path:
    """A new library in the cache, which has its name when it is whole."""
    if not version:
        found = f"CXX={os.environ['CXX']} does not run" if os.environ.get("CXX") else "none is on the PATH"
        raise _NoKernels(f"they need a C++ compiler, such as g++ or clang++, and {found}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / "native.so"
        sources = sorted(map(str, Path(__file__).parent.glob("*.cpp")))
        try:
            done = _run([*compiler, *_flags(), *sources, "-o", str(built)], TMPDIR=temporary)
        except subprocess.TimeoutExpired:
            raise _NoKernels(f"{shlex.join(compiler)} did not compile them in 300 s") from None
        if done.returncode:
            lines = done.stderr.split("\n")
            first = next((line for line in lines if "error" in line), lines[0])
            raise _NoKernels(f"{shlex.join(compiler)} does not compile them: {first.strip()}", done.stderr)
        path = folder / f"{stem}-{_hash(built.read_bytes())}.so"
        os.replace(built, path)
    return path


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LC_ALL": "C", **environment}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, env=env)


def _hash(*parts: str | bytes) -> str:
    return hashlib.sha256(b"\0".join(os.fsencode(part) for part in parts)).hexdigest()[:12]
