"""What every source is: a frozen, validated set of options that yields passages.

What a source yields depends on its options alone, and passage i does not depend on how many are
asked for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


@dataclass(frozen=True)
class SourcedPassage:
    """The `number`-th passage of a source, and where it came from (`name`).

    `before` holds the token ids that precede it in its text, in their order; empty where there is
    no text.
    """

    number: int
    passage: Passage
    name: str
    before: tuple[int, ...] = ()


class Source(BaseModel):
    """What all sources share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    random_text: ClassVar[bool] = False  # drawn by a program rather than written
    starts_alike: ClassVar[bool] = True  # passage i at a shorter length is its beginning

    kind: str = Field(description="which source: a name that memvec.registry lists")
    name: str = Field(default="", description="how the study calls it; default: its kind")
    seed: int = Field(default=0, description="seed of everything that is drawn")
    bos: bool = Field(
        default=False,
        description="where the tokenizer adds a BOS, it is the first token of each passage, to be "
        "crammed like the others (as progressive cramming was run)",
    )

    def settings(self, base: Path | None = None) -> dict[str, Any]:
        """What decides the passages, for the record and for the keys of rows."""
        left_out = {"name"} if self.bos else {"name", "bos"}  # keys without it stay what they were
        return self.model_dump(mode="json", exclude=left_out)

    def missing(self, base: Path | None) -> str | None:
        """A sentence about a missing file or library, without loading a model; None if none is."""
        return None

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[SourcedPassage]:
        """`count` passages of `length` tokens. `base`: the folder relative paths start from."""
        raise NotImplementedError


def seeded_random(*parts: object) -> random.Random:
    """A generator seeded by its purpose, never by order: same parts, same numbers."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
