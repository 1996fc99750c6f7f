"""Kernels in C++ for CPUs. They need a C++ compiler; README.md explains how they work, kernels.h what they take.

The sources are compiled when they are first needed, which takes a few seconds. The library is kept in the user's cache
and needs no compiler from then on. Without kernels, one line on standard error gives the reason, and PyTorch's
operations compute the same, as they do on other devices and in other dtypes. Environment variables:

- `NORMFREE_NATIVE=0` switches the kernels off.
- `NORMFREE_MARCH`: the processor to compile for (the compiler's -march); default: this machine's.
- `CXX`: the compiler, which may have options; default: c++, g++ or clang++.
- `XDG_CACHE_HOME`: the folder of all caches; default: ~/.cache.
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
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor, nn

from normfree._compat import dispatch_mode_active, has_storage

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
C_TYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float}
FOLDER = Path(__file__).parent


def native_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library of kernels if it is there and takes these tensors: plain float32 tensors on the CPU. Else None."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return None
        if not has_storage(tensor):  # a tensor of vmap, which batched gradients use
            return None
    # a dispatch mode, such as a FLOP counter, would not see the kernels
    return None if dispatch_mode_active() else library()


def library() -> ctypes.CDLL | None:
    """The library of kernels, compiled at the first call. None if they are off, with one warning that says why."""
    return _state()[0]


def status() -> str:
    """One line: `on (FILE, COMPILER)`, `off: REASON` or `compiled at first use (COMPILER)`. Compiles nothing.

    FILE identifies the kernels, since its name has the hash of its content.
    """
    if not _load.cache_info().currsize:
        with contextlib.suppress(_NoKernels, OSError):  # _state gives them as the reason
            _, version, stem = _wanted()
            folder = _cache_folder()
            if version and os.access(folder, os.W_OK) and not _kept(folder, stem):
                return f"compiled at first use ({version})"
    return _state()[1]


class _NoKernels(Exception):
    """The reason in one line, then the compiler's output if it ran."""


_LOADING = threading.Lock()


@functools.cache
def _state() -> tuple[ctypes.CDLL | None, str]:
    with _LOADING:  # concurrent threads compile once and warn once
        return _load()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
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
    for name, types in signatures().items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded, f"on ({path.name}, {version or 'no compiler'})"


def signatures() -> dict[str, list[type]]:
    """Argument types of every kernel that kernels.h declares. Raises KeyError for a type that it may not use."""
    text = re.sub("//.*", "", (FOLDER / "kernels.h").read_text(encoding="utf-8"))
    kernels = re.findall(r"void (normfree_\w+)\((.*?)\);", text, re.DOTALL)
    return {
        name: [ctypes.c_void_p if "*" in arg else C_TYPES[arg.split()[0]] for arg in args.split(",")]
        for name, args in kernels
    }


def _wanted() -> tuple[list[str], str | None, str]:
    """The compiler's command, its version (None without a compiler), and the prefix of file names that fit.

    The prefix depends on sources, processor, options and the compiler, if there is one.
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
    texts = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*")))
    stem = f"native-{_hash(texts, *_flags(), _processor())}"
    return compiler, version, f"{stem}-{_hash(*compiler, version)}" if version else stem


def _flags() -> tuple[str, ...]:
    return *FLAGS, f"-march={os.environ.get('NORMFREE_MARCH') or 'native'}"


def _processor() -> str:
    """The features that -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _cache_folder() -> Path:
    """The folder for libraries. They are executed, so nobody but this user and root may write to it."""
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
    """The library in the cache, if its content has the hash in its name."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError):
            if path.stem.endswith(f"-{_hash(path.read_bytes())}"):
                return path
    return None


def _compile(compiler: list[str], version: str | None, folder: Path, stem: str) -> Path:
    """Compiles the library into the cache; it is renamed to its final name when it is complete."""
    if not version:
        found = f"CXX={os.environ['CXX']} does not run" if os.environ.get("CXX") else "none is on the PATH"
        raise _NoKernels(f"they need a C++ compiler, such as g++ or clang++, and {found}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / "native.so"
        sources = sorted(map(str, FOLDER.glob("*.cpp")))
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
