"""Images that cannot be read: each is reported once, and only so many are allowed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from normfree.errors import InputError


class Unreadable:
    """What a run has reported of images that cannot be read, of which `allowed`, a share of `num_images`, may be."""

    def __init__(self, num_images: int, allowed: float):
        self.num_images, self.allowed = num_images, allowed
        self.reported: set[str] = set()
        self.in_training = 0

    def count(self, lines: Iterable[str]) -> tuple[str, ...]:
        """Those lines about training images that are new. Raises InputError once there are too many."""
        new = self._new(lines)
        count = self.in_training + len(new)
        if new and count > self.allowed * self.num_images:
            self.reported.difference_update(new)  # a run that is resumed with these images repaired goes on
            raise InputError(
                f"{count} of {self.num_images} training images cannot be read, more than "
                f"--max-unreadable {self.allowed:g} allows; the last was {new[-1]}"
            )
        self.in_training = count
        return tuple(new)

    def warn(self, lines: Iterable[str]) -> None:
        """Prints a warning for each new line about images of an evaluation."""
        for line in self._new(lines):
            print(f"warning: not counted: {line}", file=sys.stderr)

    def _new(self, lines: Iterable[str]) -> list[str]:
        new = [line for line in lines if line not in self.reported]
        self.reported.update(new)
        return new

    def state_dict(self) -> dict[str, Any]:
        """As JSON, so that a resumed run does not report or count an image again."""
        return {"said": sorted(self.reported), "unreadable": self.in_training}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.reported, self.in_training = set(state["said"]), state["unreadable"]
