"""Finding, compiling and caching the kernels, and the reasons for doing without."""

import ctypes
import logging
import os
import pwd
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from normfree import native
from normfree.native import library, status

HERE = library()
needs_kernels = pytest.mark.skipif(HERE is None, reason=f"kernels {status()}")


@pytest.fixture
def messages(fresh_kernels, monkeypatch, tmp_path):
    """What is logged, while the kernels are looked for again in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("NORMFREE_NATIVE", "NORMFREE_MARCH", "CXX", "RANK"):
        monkeypatch.delenv(name, raising=False)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("normfree").addHandler(handler)
    yield lines
    logging.getLogger("normfree").removeHandler(handler)


@pytest.fixture
def compiled(messages, monkeypatch, tmp_path):
    """A compiler of two words that copies this machine's library; returns the commands that it got."""
    log, script = tmp_path / "log", tmp_path / "c++ of a test"
    script.write_text(f"""
        case "$*" in *--version*) echo "stub 1.0"; exit;; esac
        echo "$*" >> '{log}'
        while [ "$1" != -o ]; do shift; done
        cp '{HERE and HERE._name}' "$2"
    """)
    log.touch()
    monkeypatch.setenv("CXX", f"sh '{script}'")
    return lambda: log.read_text().splitlines()


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/normfree").iterdir())


def test_the_compiler_of_this_machine_compiles_them(monkeypatch, tmp_path, fresh_kernels):
    """Without this test, a failure to compile would only skip all tests of the kernels."""
    if os.environ.get("NORMFREE_NATIVE") == "0":
        pytest.skip("NORMFREE_NATIVE=0")
    if library() is None:  # this user may have no cache
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        compiler, version, stem = native._wanted()
        if version is None:
            pytest.skip("no C++ compiler")
        assert native._compile(compiler, version, tmp_path, stem).is_file()  # raises what the compiler says


def test_signatures_are_those_of_the_header():
    """Three of them, written out by hand, with every type there is."""
    pointer, long, int_, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    found = native.signatures()
    assert found["normfree_gelu"] == [pointer, pointer, long, int_]
    assert found["normfree_sweep"] == [pointer, long, int_]
    assert found["normfree_standardize"] == [pointer] * 2 + [real] * 4 + [long] * 2 + [pointer] * 4 + [int_]


def test_the_header_declares_every_kernel_and_all_sources_include_it():
    """A definition that differs from its declaration then does not compile."""
    defined = []
    for source in native.FOLDER.glob("*.cpp"):
        text = source.read_text()
        assert '#include "kernels.h"' in text, source.name
        assert 'extern "C"' not in text, source.name  # the header's
        defined += re.findall(r"^void (normfree_\w+)\(", text, re.MULTILINE)
    assert sorted(defined) == sorted(native.signatures())


def test_a_type_that_the_header_may_not_use(monkeypatch, tmp_path):
    (tmp_path / "kernels.h").write_text("void normfree_some(const float *x, double eps);")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(KeyError, match="double"):
        native.signatures()


@needs_kernels
def test_kernels_are_called_with_the_types_of_the_header():
    for name, types in native.signatures().items():
        function = getattr(HERE, name)
        assert (function.argtypes, function.restype) == (types, None)


@needs_kernels
def test_compiled_once_and_kept(compiled, messages, tmp_path):
    assert status() == "compiled at first use (stub 1.0)"
    assert compiled() == []
    assert library() is not None
    (path,) = cached(tmp_path)
    assert status() == f"on ({path.name}, stub 1.0)"
    native._load.cache_clear()
    native._state.cache_clear()
    assert status() == f"on ({path.name}, stub 1.0)"
    assert len(compiled()) == 1
    assert messages == []


@needs_kernels
@pytest.mark.parametrize("damage", [lambda data: data[:5000], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_a_damaged_library_is_compiled_again(damage, compiled, fresh_kernels, tmp_path):
    library()
    (path,) = cached(tmp_path)
    whole = path.read_bytes()
    path.unlink()  # the loaded file stays intact
    path.write_bytes(damage(whole))
    fresh_kernels()
    assert library() is not None
    assert len(compiled()) == 2
    assert cached(tmp_path) == [path]
    assert path.read_bytes() == whole


@needs_kernels
def test_another_compiler_processor_or_source_is_another_library(compiled, fresh_kernels, monkeypatch, tmp_path):
    def again() -> int:
        fresh_kernels()
        assert library() is not None
        return len(compiled())

    assert again() == 1
    monkeypatch.setenv("NORMFREE_MARCH", "x86-64-v2")
    assert again() == 2
    assert "-march=x86-64-v2" in compiled()[-1]
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -DOTHER")
    assert again() == 3
    assert compiled()[-1].startswith("-DOTHER ")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    assert again() == 4
    assert again() == 4
    assert {path.suffix for path in cached(tmp_path)} == {".so"}


@needs_kernels
def test_a_library_in_the_cache_needs_no_compiler(compiled, messages, fresh_kernels, monkeypatch, tmp_path):
    library()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    fresh_kernels()
    assert library() is not None
    assert status() == f"on ({cached(tmp_path)[0].name}, no compiler)"
    assert messages == []


def no_home(patch, tmp_path):
    patch.delenv("XDG_CACHE_HOME")
    patch.delenv("HOME", raising=False)
    patch.setattr(pwd, "getpwuid", {}.__getitem__)


def no_compiler(patch, tmp_path):
    patch.setenv("PATH", str(tmp_path))


def open_folder(patch, tmp_path):
    (tmp_path / "cache/normfree").mkdir(parents=True)
    (tmp_path / "cache/normfree").chmod(0o777)


def folder_of_another(patch, tmp_path):
    patch.setattr(os, "geteuid", lambda: 4242)
    patch.setattr(Path, "stat", lambda *args: os.stat_result((0o755, 0, 0, 0, 4243, 0, 0, 0, 0, 0)))


def no_room(patch, tmp_path):
    (tmp_path / "full").write_text(
        "case $1 in --version) echo 1;; *) echo 'cc1: fatal error: no space' >&2; exit 1; esac"
    )
    patch.setenv("CXX", f"sh {tmp_path / 'full'}")


def not_loaded(patch, tmp_path):
    (tmp_path / "empty").write_text("""case $1 in --version) echo 1;; *) eval : \\> "\\${$#}"; esac""")
    patch.setenv("CXX", f"sh {tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("without", "why"),
    [
        (no_home, "no home folder to keep them in; set XDG_CACHE_HOME to a folder"),
        (no_compiler, "need a C++ compiler, such as g++ or clang++, and none is on the PATH"),
        (lambda patch, _: patch.setenv("CXX", "no-such-compiler -O3"), "and CXX=no-such-compiler -O3 does not run"),
        (lambda patch, _: patch.setenv("CXX", "c++ '"), "No closing quotation"),
        (
            lambda patch, _: patch.setenv("XDG_CACHE_HOME", "/dev/null"),
            "/dev/null/normfree: Not a directory; XDG_CACHE",
        ),
        (open_folder, "/cache/normfree; set XDG_CACHE_HOME to a folder of yours"),
        (folder_of_another, "/cache/normfree; set XDG_CACHE_HOME to a folder of yours"),
        (no_room, "does not compile them: cc1: fatal error: no space"),
        (not_loaded, ".so: file too short"),
    ],
)
def test_the_reason_is_logged_once(without, why, messages, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        without(patch, tmp_path)
        assert library() is None
        assert library() is None
        assert status().startswith("off: ")
        assert why in status()
    assert len(messages) == 1
    assert messages[0].startswith("normfree: the kernels are off: ")
    assert why in messages[0]


def test_nothing_is_logged_if_the_user_switches_them_off(messages, monkeypatch):
    monkeypatch.setenv("NORMFREE_NATIVE", "0")
    assert library() is None
    assert status() == "off: NORMFREE_NATIVE=0"
    assert messages == []


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_only_an_absolute_cache_folder_counts(value, monkeypatch, tmp_path):
    """According to the XDG base directory specification."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert native._cache_folder() == tmp_path / ".cache/normfree"


@needs_kernels
def test_concurrent_threads_compile_once(compiled, tmp_path):
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: (barrier.wait(), library())[1], range(4)))
    assert found[0] is not None
    assert all(one is found[0] for one in found)
    assert len(compiled()) == 1


@needs_kernels
def test_concurrent_processes_leave_one_library(compiled, tmp_path):
    compiler, version, stem = native._wanted()
    folder = native._cache_folder()
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: native._compile(compiler, version, folder, stem), range(8)))
    assert sorted(found) == cached(tmp_path)


def test_a_forward_of_a_user_without_a_home(tmp_path):
    code = """
import os, pwd
pwd.getpwuid = {}.__getitem__
import torch
from normfree import native
from normfree.functional import gelu
for _ in range(2):
    gelu(torch.ones(3))
print(native.status())
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "NORMFREE_NATIVE")}
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("off: this user has no home folder")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("normfree: the kernels are off: this user has no home folder")
