"""Random tokens: uniform over a tokenizer's ordinary tokens.

Words of a dictionary are spelled with likely token sequences, so they overstate how many tokens
fit (a limitation the paper states); uniform tokens cost the model about log2 V bits each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from memvec.lab.sources.base import Source, SourcedPassage, seeded_random
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class RandomTokens(Source):
    """Uniform draws from the tokenizer's ordinary tokens."""

    random_text: ClassVar[bool] = True
    kind: Literal["random-tokens"] = "random-tokens"

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[SourcedPassage]:
        yield from random_token_passages(lm, count, length, seed=self.seed)


def random_token_passages(
    lm: FrozenLM, count: int, length: int, *, seed: int
) -> Iterator[SourcedPassage]:
    """`count` passages of `length` uniform tokens; shorter ones begin longer ones."""
    tokens = ordinary_tokens(lm)
    for number in range(count):
        draw = seeded_random("random-tokens", seed, number)
        ids = tuple(draw.choice(tokens) for _ in range(length))
        yield SourcedPassage(number, Passage(ids, number), f"random tokens #{number}")


def ordinary_tokens(lm: FrozenLM) -> list[int]:
    """Every token id but special ones and ids the tokenizer does not use."""
    if lm.tokenizer is None:
        return [i for i in range(lm.vocab_size) if i != lm.bos_id]
    special = special_ids(lm.tokenizer)
    return [i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if i not in special]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens; `all_special_ids` has only those with a role, such as BOS."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
