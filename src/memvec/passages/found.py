"""What a source gives: a passage, the tokens that stood before it, and where it came from."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from memvec.passages.passage import Passage


@dataclass(frozen=True)
class Found:
    """The `number`-th passage of a source; the same one whatever else is asked for.

    `before` holds the real tokens just before it (nearest last); empty where there is no text.
    """

    number: int
    passage: Passage
    name: str
    before: tuple[int, ...] = ()


def rng(*parts: object) -> random.Random:
    """A generator seeded by what it is for, never by order: same parts, same numbers."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
