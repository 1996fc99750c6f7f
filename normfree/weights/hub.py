"""Weight files from and to the Hugging Face Hub, named `hf://owner/name[@revision][/path/in/repo]`.

The work is done by the optional library huggingface_hub, imported on first use. It follows its own environment
variables (HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE, HF_TOKEN). It checks sizes; hashes are checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from normfree.errors import InputError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_NAME = r"\w(?:[\w.-]*\w)?"
_URI = re.compile(
    rf"hf://(?!(?:models|datasets|spaces|kernels|buckets)/)(?P<owner_name>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?(?:/(?P<file>[^/]+(?:/[^/]+)*))?",
    re.ASCII,
)
_LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"


@dataclass(frozen=True)
class HubURI:
    """A model repository `owner_name`, a branch, tag or commit (None: main), and a path in it or None."""

    owner_name: str
    revision: str | None = None
    file: str | None = None


def is_hub_uri(path: str | os.PathLike) -> bool:
    """Whether `path` is an address hf://..., well-formed or not."""
    return isinstance(path, str) and path.startswith("hf://")


def parse_uri(uri: str) -> HubURI:
    """InputError for anything but `hf://owner/name[@revision][/path/in/repo]`; a revision's `/` is written `%2F`.

    >>> parse_uri("hf://timm/dm_nfnet_f0.dm_in1k@main/model.safetensors")
    HubURI(owner_name='timm/dm_nfnet_f0.dm_in1k', revision='main', file='model.safetensors')
    """
    match = _URI.fullmatch(uri)
    if match is None or {".", ".."} & set((match["file"] or "").split("/")):
        form = "hf://OWNER/NAME[@REVISION][/FILE], as in hf://timm/dm_nfnet_f0.dm_in1k"
        raise InputError(f"{uri!r} names no model on the Hub: write {form}")
    return HubURI(match["owner_name"], match["revision"] and unquote(match["revision"]), match["file"])


def fetch(uri: str, names: Sequence[str] | None = None) -> Path:
    """Path in the cache of one file: the URI's own, else the first of `names` (`WEIGHT_FILES`) that the repository has.

    A file whose content does not match the hash that the Hub lists is deleted and refused, even if it was already in
    the cache. InputError, in one line, for every failure.
    """
    hub = parse_uri(uri)
    files = (hub.file,) if hub.file else tuple(names or WEIGHT_FILES)
    with _plain_errors(hub):
        path = _find(hub, files)
    if path is None:
        what = f"{hub.owner_name} has no file {' or '.join(files)} at revision {hub.revision or 'main'}"
        raise InputError(f"{what}: name one that it has, as in hf://{hub.owner_name}/FILE")
    return path


def fetch_config(uri: str) -> dict[str, Any] | None:
    """The repository's `config.json`, which names architecture and input; None if there is none.

    Errors as in `fetch`; InputError also if the file is not a JSON object.
    """
    hub = parse_uri(uri)
    with _plain_errors(hub):
        path = _find(hub, ("config.json",))
        if path is None:
            return None
        content = path.read_bytes()
    with suppress(ValueError):
        config = json.loads(content)
        if isinstance(config, dict):
            return config
    raise InputError(f"config.json of {hub.owner_name} is no JSON object: name another revision or repository")


def push(path: str | os.PathLike, uri: str, card: str | None = None, private: bool = False) -> str:
    """Uploads one local file, and `card` as README.md, in one commit; returns the commit's web address.

    The file is named `model.safetensors`, or as in the URI. A missing repository is created, public unless `private`.
    InputError, in one line, for every failure.
    """
    hub = parse_uri(uri)
    name = hub.file or WEIGHT_FILES[0]
    if not Path(path).is_file():
        raise InputError(f"no file {str(path)!r} to upload")
    with _plain_errors(hub, writing=True):
        from huggingface_hub import CommitOperationAdd, HfApi

        operations = [CommitOperationAdd(name, Path(path))]
        if card is not None:
            operations.append(CommitOperationAdd("README.md", card.encode()))
        api = HfApi(library_name="normfree")
        api.create_repo(hub.owner_name, private=private, exist_ok=True)
        message = f"Upload {name} with normfree"
        return api.create_commit(hub.owner_name, operations, commit_message=message, revision=hub.revision).commit_url


def _find(hub: HubURI, files: Sequence[str]) -> Path | None:
    """Verified path in the cache of the first of `files` that the repository has; None if it has none of them."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError, RevisionNotFoundError

    repo, revision = hub.owner_name, hub.revision
    try:
        # ask once; hf_hub_download would ask a server that cannot be reached again and again, for 23 s
        with suppress(RemoteEntryNotFoundError):
            get_hf_file_metadata(hf_hub_url(repo, files[0], revision=revision))
    except RevisionNotFoundError:
        raise
    except (HTTPError, OfflineModeIsEnabled):
        cached = [try_to_load_from_cache(repo, file, revision=revision) for file in files]
        for path in cached:
            if isinstance(path, str):
                return _verified(Path(path))
        if None not in cached:  # the cache knows that the repository has none
            return None
        raise
    for file in files:
        with suppress(RemoteEntryNotFoundError):
            return _verified(Path(hf_hub_download(repo, file, revision=revision, library_name="normfree")))
    return None


def _verified(path: Path) -> Path:
    """`path` if its content matches the hash in its blob's name: sha256 for LFS files, git's own for others.

    Blobs with other names, and caches without symbolic links, have no hash to compare with.
    """
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    expected = blob.name
    with path.open("rb") as file:
        if re.fullmatch("[0-9a-f]{64}", expected):
            found = hashlib.file_digest(file, "sha256").hexdigest()
        elif re.fullmatch("[0-9a-f]{40}", expected):
            git = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
            found = hashlib.file_digest(file, lambda: git).hexdigest()
        else:
            return path
    if found != expected:
        for place in (path.resolve(), blob, path):  # the blob may itself be a link, to where repositories share content
            place.unlink(missing_ok=True)
        hashes = f"hash {found[:12]}, where the Hub lists {expected[:12]}"
        raise InputError(f"{path.name} is damaged ({hashes}) and was deleted: try again")
    return path


@contextmanager
def _plain_errors(hub: HubURI, writing: bool = False) -> Iterator[None]:
    """Turns every failure of huggingface_hub, its absence included, into one InputError."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise InputError('hf:// addresses need huggingface_hub: pip install "normfree[hub]"') from None
    try:
        yield
    except InputError:
        raise
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise InputError(_reason(error, hub, writing)) from None


def _reason(error: Exception, hub: HubURI, writing: bool) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # these two wrap a more informative error
    site, repo = constants.ENDPOINT, hub.owner_name
    status, answer = 0, str(error)
    if isinstance(error, errors.HfHubHTTPError):
        status, answer = error.response.status_code, error.server_message
    answer = " ".join((answer or type(error).__name__).split())[:200]
    if isinstance(error, errors.OfflineModeIsEnabled):
        place = "nothing can be uploaded" if writing else f"{repo} is not in the cache {constants.HF_HUB_CACHE}"
        return f"HF_HUB_OFFLINE is set and {place}: unset it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {hub.revision or 'main'!r}: name a branch, tag or commit that it has"
    if writing and status in (401, 403):
        return f"no permission to write to {repo} at {site}: {_LOG_IN}, with a token that has write access"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access at {site}/{repo}, then {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"{site} has no repository {repo}, or it is private: check the name, or {_LOG_IN}"
    if status:
        return f"{site} answered {status} for {repo} ({answer}): check HF_ENDPOINT and HF_TOKEN, or try again later"
    if isinstance(error, errors.HTTPError):
        return f"no connection to {site} ({answer}): check the network and HF_ENDPOINT, or try again"
    return f"{'uploading to' if writing else 'downloading from'} {repo} failed ({answer})"
