"""The catalogue of sources: their names, their options, and how each one gives its passages.

Every source is a frozen, validated set of options with one method: `passages(lm, count, length)`.
What it gives depends on its options alone; passage i does not depend on how many are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from memvec.errors import MemvecError
from memvec.passages.chunks import Rule, Splitter
from memvec.passages.found import Found
from memvec.passages.hub import hub_texts
from memvec.passages.natural import natural_passages
from memvec.passages.random_tokens import random_token_passages
from memvec.passages.random_words import (
    frequent_words,
    list_name,
    random_word_passages,
    read_words,
)
from memvec.passages.sampled import sampled_passages
from memvec.passages.texts import read_texts

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class Source(BaseModel):
    """What all sources share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    random_text: ClassVar[bool] = False  # drawn by a program rather than written

    name: str = Field(default="", description="how the study calls it; default: its kind")
    seed: int = Field(default=0, description="seed of everything that is drawn")

    def settings(self, base: Path | None = None) -> dict[str, Any]:
        """What decides the passages, for the record and for the keys of rows."""
        return self.model_dump(mode="json", exclude={"name"})

    def missing(self, base: Path | None) -> str | None:
        """A sentence about what is not there, found without a model; None if all is."""
        return None

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[Found]:
        """`count` passages of `length` tokens. `base`: the folder relative paths start from."""
        raise NotImplementedError


class Natural(Source):
    """Written texts: where they are, and how a passage is taken from one."""

    path: str | None = Field(default=None, description="file, folder or - for standard input")
    dataset: str | None = Field(default=None, description="Hub data set, if there is no path")
    split: str = Field(default="train", description="split of the Hub data set")
    revision: str | None = Field(default=None, description="revision of the Hub data set")
    column: str = Field(default="text", description="column of a table that holds the text")
    where: dict[str, str] = Field(default={}, description="keep table rows with these values")
    rule: Rule = Field(
        default="suffix",
        description="'suffix': the paper's, second half of the sentences; 'start': from the start",
    )
    chunk_words: tuple[int, int] | None = Field(
        default=None, description="draw chunks of so many words; default: each text is a chunk"
    )
    splitter: Splitter = Field(default="punctuation", description="how sentences are found")

    def missing(self, base: Path | None) -> str | None:
        if self.path in (None, "-"):
            return None if self.path or self.dataset else f"source '{self.name}' needs a path."
        file = Path(str(self.path)).expanduser()
        file = file if file.is_absolute() or base is None else base / file
        return None if file.exists() else f"source missing: there is no file or folder {file}."

    def texts(self, base: Path | None) -> list[tuple[str, str]]:
        """(name, text) of the texts that passages are taken from."""
        if self.path is not None:
            return read_texts(self.path, base, self.column, self.where)
        if self.dataset is None:
            raise MemvecError(f"source '{self.name}' needs a path or a dataset.")
        return hub_texts(self.dataset, self.split, self.column, self.revision)

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[Found]:
        yield from natural_passages(
            lm,
            self.texts(base),
            count,
            length,
            rule=self.rule,
            words=self.chunk_words,
            seed=self.seed,
            splitter=self.splitter,
        )


class Files(Natural):
    """Your own texts: txt, md, jsonl, parquet, csv, a folder of them, or standard input."""

    kind: Literal["files"] = "files"


class Hub(Natural):
    """Any data set of the Hub with a column of texts."""

    kind: Literal["hub"] = "hub"


class Pg19(Natural):
    """The paper's 1000 chunks of 50 PG-19 validation books."""

    kind: Literal["pg19"] = "pg19"
    dataset: str | None = "yurakuratov/pg19_valid_1k_chunks"


class Fanfics(Natural):
    """The paper's chunks of 21 fan fictions published after October 2024."""

    kind: Literal["fanfics"] = "fanfics"
    dataset: str | None = "yurakuratov/fanfics_1k_chunks"


class RandomWords(Source):
    """Words drawn evenly from a list of frequent ones."""

    random_text: ClassVar[bool] = True
    kind: Literal["random-words"] = "random-words"
    words: str | None = Field(default=None, description="word file; default: wordfreq's 100,000")
    drawn_lengths: bool = Field(
        default=False, description="each length uniform in [2, length], as in the paper"
    )

    def missing(self, base: Path | None) -> str | None:
        try:
            _ = read_words(self.words, base) if self.words else frequent_words()
        except MemvecError as error:
            return str(error)
        return None

    def settings(self, base: Path | None = None) -> dict[str, Any]:
        return {**super().settings(base), "list": list_name(*self._list(base))}

    def _list(self, base: Path | None) -> tuple[tuple[str, ...], str | None]:
        return (read_words(self.words, base) if self.words else frequent_words()), self.words

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[Found]:
        words, _ = self._list(base)
        yield from random_word_passages(
            lm, words, count, length, seed=self.seed, drawn_lengths=self.drawn_lengths
        )


class RandomTokens(Source):
    """Uniform draws from the tokenizer's ordinary tokens."""

    random_text: ClassVar[bool] = True
    kind: Literal["random-tokens"] = "random-tokens"

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[Found]:
        yield from random_token_passages(lm, count, length, seed=self.seed)


class Sampled(Source):
    """Text the model itself generated."""

    kind: Literal["sampled"] = "sampled"
    temperature: float = Field(default=1.0, gt=0, description="of the draw")

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[Found]:
        yield from sampled_passages(lm, count, length, seed=self.seed, temperature=self.temperature)


AnySource = Annotated[
    Files | Hub | Pg19 | Fanfics | RandomWords | RandomTokens | Sampled,
    Field(discriminator="kind"),
]
SOURCES: dict[str, type[Source]] = {
    "files": Files,
    "hub": Hub,
    "pg19": Pg19,
    "fanfics": Fanfics,
    "random-words": RandomWords,
    "random-tokens": RandomTokens,
    "sampled": Sampled,
}
