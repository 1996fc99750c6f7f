"""Errors that users can cause, and the wording that all of them share."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used. The message is one line: what was given, what is allowed, what to do."""


def one_line(error: object, most: int = 200) -> str:
    """The first `most` characters of an exception's text, on one line; its type if it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'nfnet_f0'?"`, or "" if no known word is close."""
    folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(folded), n=1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def quoted(path: str | os.PathLike[str]) -> str:
    """A path, quoted for a shell command that users can paste."""
    word = os.fspath(path)
    word = f"./{word}" if word.startswith("-") else word
    if word.isprintable():
        return shlex.quote(word)
    escaped = re.sub(rb"[^ -~]|[\\']", lambda found: b"\\x%02x" % ord(found[0]), os.fsencode(word))
    return f"$'{escaped.decode()}'"  # bash and zsh: line breaks, and bytes that are not UTF-8


def check_range(option: str, value: float | None, low: float, high: float) -> None:
    """Raises InputError unless `value` is from `low` to `high`, both included, or None."""
    if value is not None and not low <= value <= high:
        raise InputError(f"--{option} {value}: {low} to {high}")
