"""Files on other machines, copied whole into a cache of bounded size that evicts the least recently used ones."""

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
    """The folder of data sets and of copies of remote files: $NORMFREE_DATA, or ~/.cache/normfree/data."""
    folder = os.environ.get("NORMFREE_DATA") or "~/.cache/normfree/data"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise InputError(f"{folder}: this user has no such home folder; set NORMFREE_DATA to a folder") from None


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as https://... or s3://..."""
    return "://" in path


def short_hash(text: str) -> str:
    """24 hexadecimal digits."""
    return hashlib.blake2b(os.fsencode(text), digest_size=12).hexdigest()


def open_file(path: str) -> BinaryIO:
    """Opens a local file, or the copy of a remote one, which is downloaded once for all processes of a machine.

    A file at an address is assumed never to change. Raises InputError if a remote file cannot be downloaded.
    """
    if not is_remote(path):
        return open(path, "rb")
    copy = data_folder() / "copies" / f"{short_hash(path)}-{posixpath.basename(path)}"
    with contextlib.suppress(FileNotFoundError):
        os.utime(copy)  # the time of the last use
        return copy.open("rb")
    limit = _cache_bytes()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):
        if copy.exists():
            return copy.open("rb")
        unfinished = copy.with_suffix(".partial")  # the same name each time: what a kill leaves is overwritten
        with plain_errors(path):
            _download(path, unfinished)
        file = unfinished.open("rb")  # opened before it is published: another process may evict it
        unfinished.replace(copy)
    evict(copy, limit, "*.tar")
    return file


def glob_remote(pattern: str) -> list[str]:
    """The addresses of the remote files that match a pattern with wildcards."""
    if pattern.startswith("http"):
        raise InputError(f"{pattern}: a web server does not list its files; name them with braces, as in {{000..099}}")
    with plain_errors(pattern):
        import fsspec

        system, path = fsspec.core.url_to_fs(pattern)
        return [system.unstrip_protocol(name) for name in system.glob(path)]


@contextlib.contextmanager
def plain_errors(address: str) -> Iterator[None]:
    """Turns whatever the libraries that read from `address` raise into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each store has exceptions of its own
        remedy = "install it" if isinstance(error, ImportError) else "check its name, the network and permissions"
        raise InputError(f"cannot read {address} ({one_line(error)}): {remedy}") from None


def _download(address: str, path: Path) -> None:
    """Downloads a whole file, with retries after failures that may pass."""
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
        if response.length:  # if the connection breaks off, `read` returns less and raises nothing
            raise ConnectionError(f"the connection broke off {response.length} bytes before the end")


def _cache_bytes() -> float:
    """The size limit of all copies together: $NORMFREE_CACHE_GB, or 200 GB."""
    limit = os.environ.get("NORMFREE_CACHE_GB") or "200"
    if not re.fullmatch(r"\d+(\.\d+)?", limit):
        raise InputError(f"NORMFREE_CACHE_GB is {limit!r}; give the gigabytes that copies of remote files may take")
    return 1e9 * float(limit)


def evict(newest: Path, limit: float, pattern: str) -> None:
    """Deletes files by `pattern` beside `newest`, least recently used first, until all take at most `limit` bytes."""
    copies = []
    for path in newest.parent.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process may be evicting, too
            copies.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    excess = sum(size for _, size, _ in copies) - limit
    for _, size, path in sorted(copies):
        if excess > 0 and path != newest:
            path.unlink(missing_ok=True)
            excess -= size
