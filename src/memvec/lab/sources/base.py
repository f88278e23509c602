"""The base class of sources: a frozen, validated set of options that yields passages.

The passages depend on the options alone, and passage i does not depend on the number of passages.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from memvec.errors import MemvecError
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


@dataclass(frozen=True)
class SourcedPassage:
    """The `number`-th passage of a source; `name` says which text it is from.

    `before` holds the token ids that precede it in its text, and is empty if there are none.
    """

    number: int
    passage: Passage
    name: str
    before: tuple[int, ...] = ()


class Source(BaseModel):
    """Base class of all sources."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    random_text: ClassVar[bool] = False  # drawn by a program rather than written
    starts_alike: ClassVar[bool] = True  # passage i begins alike at every length

    kind: str = Field(description="which source: a name of the table of sources")
    name: str = Field(default="", description="how the study calls it; default: its kind")
    seed: int = Field(default=0, strict=True, description="seed of everything that is drawn")
    bos: bool = Field(
        default=False,
        strict=True,
        description="where the tokenizer adds a BOS, it is the first token of each passage, to be "
        "crammed like the others (as progressive cramming was run)",
    )

    def settings(self, base: Path | None = None) -> dict[str, Any]:
        """The options that decide the passages, for the record and for the keys of rows."""
        left_out = {"name"} if self.bos else {"name", "bos"}  # keys of older studies lack `bos`
        return self.model_dump(mode="json", exclude=left_out)

    def missing(self, base: Path | None) -> str | None:
        """A sentence about a missing file or library, or None; loads no model."""
        return None

    def too_few(self, count: int, base: Path | None) -> str | None:
        """A sentence if `count` passages are more than there are, or None; may read texts.

        A run asks before it crams anything. None also means that only a model can tell.
        """
        return None

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[SourcedPassage]:
        """`count` passages of `length` tokens. `base`: the folder relative paths start from.

        Raises MemvecError if a file or library is missing, there is too little text, or the model
        cannot sample one (source 'sampled').
        """
        raise MemvecError(f"the source '{self.kind}' has no method passages.")


def seeded_random(*parts: object) -> random.Random:
    """A random generator whose seed is a hash of `parts`, so it does not depend on call order."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
