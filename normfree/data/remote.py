"""Files on other machines: copied whole into a cache, where those that were not used for longest make room."""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from normfree.errors import InputError, one_line

_RETRY_SECONDS = (1, 2, 4, 8)


def data_folder() -> Path:
    """Where data sets, and copies of remote files, are kept: $NORMFREE_DATA, or ~/.cache/normfree/data."""
    folder = os.environ.get("NORMFREE_DATA") or "~/.cache/normfree/data"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise InputError(f"{folder}: this user has no such home folder; set NORMFREE_DATA to a folder") from None


def is_remote(path: str) -> bool:
    return "://" in path


def short_hash(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=12).hexdigest()


def open_file(path: str) -> BinaryIO:
    """A file for reading, a remote one by its copy, which is made now where there is none: once, however many ask.

    Raises InputError if a remote file cannot be had; what an address stands for is taken never to change.
    """
    if not is_remote(path):
        return open(path, "rb")
    copy = data_folder() / "copies" / f"{short_hash(path)}-{posixpath.basename(path)}"
    with contextlib.suppress(FileNotFoundError):
        os.utime(copy)  # the newest are the last to make room
        return copy.open("rb")
    limit = _cache_bytes()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):
        if copy.exists():
            return copy.open("rb")
        unfinished = copy.with_suffix(".partial")
        with plain_errors(path):
            _download(path, unfinished)
        file = unfinished.open("rb")  # before it has its name, from when on it may have to make room
        unfinished.replace(copy)
    _make_room(copy, limit)
    return file


def match(pattern: str) -> list[str]:
    """The remote files that fit a pattern with stars."""
    if pattern.startswith("http"):
        raise InputError(f"{pattern}: a web server does not list its files; name them with braces, as in {{000..099}}")
    with plain_errors(pattern):
        import fsspec

        system, path = fsspec.core.url_to_fs(pattern)
        return [system.unstrip_protocol(name) for name in system.glob(path)]


@contextlib.contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Whatever the libraries that fetch from `address` raise, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each store has types of its own
        reason = one_line(error)
        remedy = "install it" if isinstance(error, ImportError) else "check its name, the network and permissions"
        raise InputError(f"cannot read {address} ({reason}): {remedy}") from None


def _download(address: str, path: Path) -> None:
    """Fetches a file whole; tries again after failures that may pass."""
    for seconds in (*_RETRY_SECONDS, None):
        try:
            with _open_remote(address) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            return
        except Exception as error:
            final = isinstance(error, ImportError | ValueError | FileNotFoundError | PermissionError)
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                final = error.code < 500 and error.code not in (408, 429)
            if final or seconds is None:
                raise
            print(f"{address}: {error}; trying again in {seconds} s", file=sys.stderr)
            time.sleep(seconds)


@contextlib.contextmanager
def _open_remote(address: str) -> Iterator[BinaryIO]:
    if not address.startswith(("http://", "https://")):
        import fsspec

        with fsspec.open(address, "rb") as file:
            yield file  # type: ignore
        return
    request = urllib.request.Request(address, headers={"User-Agent": "normfree"})
    with urllib.request.urlopen(request, timeout=60) as response:
        yield response
        if response.length:  # reading stops without a word where the connection does
            raise ConnectionError(f"the connection broke off {response.length} bytes before the end")


def _cache_bytes() -> float:
    """What copies may take together: $NORMFREE_CACHE_GB, or 200 GB."""
    limit = os.environ.get("NORMFREE_CACHE_GB") or "200"
    if not re.fullmatch(r"\d+(\.\d+)?", limit):
        raise InputError(f"NORMFREE_CACHE_GB is {limit!r}; give the gigabytes that copies of remote files may take")
    return 1e9 * float(limit)


def _make_room(newest: Path, limit: float) -> None:
    """Deletes old copies while all of them are above `limit` bytes."""
    copies = []
    for path in newest.parent.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # another process may be making room
            copies.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    excess = sum(size for _, size, _ in copies) - limit
    for _, size, path in sorted(copies):
        if excess > 0 and path != newest:
            path.unlink(missing_ok=True)
            excess -= size
