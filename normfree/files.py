"""Atomic writes, and locks on folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from normfree.errors import InputError, one_line

_LOCK_SECONDS = 8  # until the data workers of a killed process have ended and released it
# errors of a full or failing disk; all others concern the name or place of a file
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def utf8(text: str) -> bytes:
    """UTF-8 in any locale. Bytes of file names that are not UTF-8 are escaped as Python does: \\udc80 to \\udcff."""
    with contextlib.suppress(UnicodeEncodeError):  # in other locales Python escapes all non-ASCII letters
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return text.encode("utf-8", "backslashreplace")


def check_writable(
    path: str | os.PathLike[str] | None,
    option: str = "--out",
    *,
    endings: Sequence[str] = (),
    replace: bool = False,
    parents: bool = False,
) -> None:
    """Raises InputError if results could not be written to `path`, the value of `option`. Called before the work.

    Its name must have one of `endings`. With `replace` a file may be there already; with `parents` folders on the way
    may be missing, as they will be made. A file is made and removed at once: permissions, read-only file systems and
    long names are for the system to judge. None is no path, and fine.
    """
    if path is None:
        return
    path = probe = os.fspath(path)
    if endings and os.path.splitext(path)[1] not in endings:
        raise InputError(f"{option} {path}: the name must end in {' or '.join(endings)}")
    folder = os.path.dirname(path) or "."
    while parents and not os.path.lexists(os.path.dirname(probe) or "."):
        probe = os.path.dirname(probe)
    try:
        if not (replace and os.path.exists(path)) or os.path.isdir(path):
            open(probe, "xb").close()
            os.unlink(probe)
        elif os.path.isfile(path):  # not a pipe, which this could close, nor a device
            open(path, "ab").close()
    except FileExistsError:
        kind = "is a folder and " if os.path.isdir(path) else ""
        raise InputError(f"{option} {path} {kind}exists; nothing was written") from None
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"there is no folder {folder}; create it first" if missing else (error.strerror or str(error)).lower()
        raise InputError(f"{option} {path} cannot be written: {reason}") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to it at the end: readers never see half a file.

    The file gets the mode that `open` would give it. Where `path` is a symbolic link, its target is replaced. With
    `durable` the file is on the disk before it gets its name: it survives a loss of power.

    Raises:
        InputError: `path` cannot be written to. Everything on the disk is as it was.
        OSError: the disk is full or fails. Everything on the disk is as it was.
    """
    final = Path(os.path.realpath(path))
    temporary = final.with_name(f".{final.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        final.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        temporary.chmod(mode)  # a library may have replaced the file by one that only its owner can read
        if durable:
            sync(temporary)
        temporary.replace(final)
    except OSError as error:
        reason = one_line(error) if error.errno is None else os.strerror(error.errno)
        if error.errno in _DISK:
            raise OSError(error.errno, reason, str(path)) from None
        raise InputError(f"cannot write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file is on the disk; for a folder, if the system supports that."""
    with contextlib.suppress(
        *[OSError] if path.is_dir() else []
    ):  # Windows cannot open folders, some file systems cannot sync them
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Locks the folder of a run for this process; InputError if another process has it."""
    try:
        with FileLock(folder / ".lock", timeout=_LOCK_SECONDS):
            yield
    except Timeout:
        raise InputError(f"another process is working in {folder}: wait for it, or stop it") from None
