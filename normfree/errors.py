"""What is said when something the user gave cannot be used."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was given, what is allowed, what to do."""


def one_line(error: object, most: int = 200) -> str:
    """The text of an exception on one line, at most `most` characters of it; its type where it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'nfnet_f0'?"`, or nothing where no known word is close."""
    folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(folded), n=1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as a word of a shell command that is printed to be pasted."""
    word = os.fspath(path)
    word = f"./{word}" if word.startswith("-") else word
    if word.isprintable():
        return shlex.quote(word)
    escaped = re.sub(rb"[^ -~]|[\\']", lambda found: b"\\x%02x" % ord(found[0]), os.fsencode(word))
    return f"$'{escaped.decode()}'"  # of bash and zsh, for line breaks and bytes that are no UTF-8


def check_range(option: str, value: float | None, low: float, high: float) -> None:
    """Raises InputError unless `value` is from `low` to `high`, both included, or None."""
    if value is not None and not low <= value <= high:
        raise InputError(f"--{option} {value}: {low} to {high}")
