"""A run as a value: frozen dataclasses that say everything about it, their validation, and JSON."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was given, what is allowed, what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'nfnet_f0'?"`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
