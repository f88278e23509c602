"""Source `book`: one text from its start to its end, in blocks of equal length.

Other sources take one passage of a text. Here passage i is the i-th block of the text. Each passage
has the token count of the whole text, so that a study can compute the vectors for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from memvec.errors import MemvecError
from memvec.lab.sources.base import Source, SourcedPassage
from memvec.lab.sources.text_readers import missing_texts, read_texts
from memvec.lab.sources.written import MAX_BEFORE
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


@dataclass(frozen=True)
class Block(SourcedPassage):
    """A block of a text of `whole` tokens."""

    whole: int = 0


class WholeBook(Source):
    """A text cut into blocks; an incomplete last block is left out."""

    kind: Literal["book"] = "book"
    starts_alike: ClassVar[bool] = False  # block i of another length begins elsewhere

    path: str | None = Field(default=None, description="the text: a file, or a folder of files")

    def missing(self, base: Path | None) -> str | None:
        """A sentence if there is no such file, or nothing in it."""
        if self.path is None:
            return f"source '{self.name}' needs a path."
        return missing_texts(self.path, base)

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[SourcedPassage]:
        """The first `count` blocks of `length` tokens. Raises MemvecError if there are fewer,
        or no such file.
        """
        if problem := self.missing(base):
            raise MemvecError(problem)
        texts = read_texts(str(self.path), base, "text", {})
        ids = lm.tokenize("\n\n".join(text for _, text in texts))
        blocks = len(ids) // length
        if count > blocks:
            raise MemvecError(
                f"source '{self.name}' has {len(ids)} tokens, {blocks} blocks of {length}: lower "
                f"passages from {count} to {blocks}."
            )
        for number in range(count):
            at = number * length
            passage = Passage(tuple(ids[at : at + length]), 0, at)
            before = tuple(ids[max(0, at - MAX_BEFORE) : at])
            yield Block(number, passage, f"{texts[0][0]}, block {number}", before, len(ids))
