"""Checkpoints to resume from. They are written atomically and contain no pickles.

A checkpoint is a folder `step-00001234` with safetensors files (written through torch.distributed.checkpoint) and
`manifest.json`: the step, further JSON state, and size and SHA-256 of every file. It is written beside its final name
and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.errors import InputError, one_line, quoted
from normfree.files import sha256, sync

MANIFEST = "manifest.json"
FORMAT = 1  # of a checkpoint


class DamagedCheckpoint(Exception):
    """str() is the reason."""


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any], keep: int
) -> Path:
    """Writes `folder/step-…`, then removes all but the newest `keep` and the remains of interrupted writes.

    Raises:
        OSError: the disk is full, for example. Earlier checkpoints are untouched, and nothing else is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    for stale in folder.glob("partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir()
        names = _write_tensors(partial, tensors)
        files = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "step": step, "names": names, "files": files, "extra": dict(extra)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):  # the error of a write does not name the file
            raise OSError(error.errno, error.strerror or str(error), str(final)) from None
        raise
    sync(folder)
    for old in all_steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Writes tensors through torch.distributed.checkpoint, and returns their sorted names."""
    from torch.distributed import checkpoint as dcp  # slow to import

    # safetensors needs contiguous tensors; a copy on the device would take memory from the next step
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with _quiet():
            dcp.save(packed, storage_writer=dcp.HuggingFaceStorageWriter(str(folder)), no_dist=True)
    except dcp.CheckpointException as error:
        reason = next(reason for reason, _ in error.failures.values())
        raise reason if isinstance(reason, OSError) else OSError(one_line(reason, 300)) from None
    return sorted(packed)


def load_checkpoint(path: Path, into: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads a checkpoint into the tensors of `into`, in place; returns its manifest.

    Raises:
        DamagedCheckpoint: a file is missing, of another size or sum, or a tensor is of another shape.
    """
    manifest = verify(path)
    if manifest["names"] != sorted(into):
        other = sorted(set(manifest["names"]) ^ set(into))[0]
        raise DamagedCheckpoint(f"it belongs to another network (tensor {other!r})")
    packed = {name: tensor.detach().contiguous() for name, tensor in into.items()}
    _fill(path, packed)
    for name, tensor in into.items():
        tensor.detach().copy_(packed[name])
    return manifest


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint that `verify` accepts, on the CPU; DamagedCheckpoint if there are none of these names."""
    from torch.distributed import checkpoint as dcp

    try:
        with _quiet():
            stored: Any = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        tensors = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    except Exception as error:  # torch's reader can raise anything
        raise DamagedCheckpoint(one_line(error)) from None
    _fill(path, tensors)
    return tensors


def _fill(path: Path, tensors: dict[str, Tensor]) -> None:
    """Reads tensors through torch.distributed.checkpoint, in place."""
    from torch.distributed import checkpoint as dcp

    try:
        with _quiet():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    except Exception as error:  # torch's reader can raise anything
        raise DamagedCheckpoint(one_line(error)) from None


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; DamagedCheckpoint unless all files agree with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise DamagedCheckpoint("it is of a newer version of normfree")
        for name, (size, checksum) in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != size or sha256(file) != checksum:
                raise DamagedCheckpoint(f"{name} is missing or differs from the manifest")
        missing = {"step", "names", "extra"} - manifest.keys()
        if missing:
            raise DamagedCheckpoint(f"its manifest has no {min(missing)}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"its manifest cannot be used ({error})") from None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    damaged = []
    for path in reversed(all_steps(folder)):
        try:
            verify(path)
            return path, damaged
        except DamagedCheckpoint as reason:
            damaged.append(f"checkpoint {path} is damaged and is passed over: {reason}")
    return None, damaged


def task_state(folder: Path) -> dict[str, Any]:
    """The state of the task in the newest checkpoint that verifies; empty before the first one."""
    return _newest_manifest(folder)["extra"].get("task", {})


def steps_done(folder: Path) -> int:
    """The step of the newest checkpoint that verifies; 0 before the first one."""
    return _newest_manifest(folder)["step"]


def _newest_manifest(folder: Path) -> dict[str, Any]:
    path, _ = newest_whole(folder)
    return {"step": 0, "extra": {}} if path is None else json.loads((path / MANIFEST).read_text())


def check_free(path: Path) -> None:
    """Raises InputError if a run's folder cannot be created at `path`, because something else is there."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # TensorBoard and safetensors need UTF-8
        raise InputError(
            f"{path}: the name of a run's folder must be UTF-8, and the locale too, as LC_ALL=C.UTF-8"
        ) from None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists: go on with it by --resume {quoted(path)}, or name another folder with --out")


def new_run_folder(path: Path) -> None:
    """Creates a run's folder, which may exist as long as it is empty."""
    check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the run folder {path}: {error.strerror}") from None


def numbered_run_folder(stem: Path) -> Path:
    """Creates STEM-N with the smallest free N; two processes never get the same one."""
    number = 1
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = stem.with_name(f"{stem.name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
            number += 1
    except OSError as error:
        raise InputError(f"cannot create the run folder {stem}-{number}: {error.strerror}") from None


def all_steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest last."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch.distributed.checkpoint, which warns that there is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
