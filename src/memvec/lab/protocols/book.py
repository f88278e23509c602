"""How many vectors a whole book needs, by exact horizons of its blocks.

Kuratov et al. say that The Hobbit, 119,203 tokens, would need about 128 vectors of Llama-3.1-8B or
256 of Llama-3.2-1B (`hobbit_in_tokens.ipynb`). They divide its tokens by a decoding capacity, and
do not run it. Here the blocks of a text are crammed by the recipe of the protocol `exact`. The
tokens per vector that decode freely give the number of vectors for the whole text, with an interval
over blocks. Where every block is exact, the vectors of the blocks hold the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from memvec.cramming.outcomes import Outcome
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_length
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.sources import SourcedPassage
from memvec.lab.sources.book import Block
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.statistics import Interval, bootstrap_mean, share_interval
from memvec.writing import read_json


class Book(Protocol):
    """Exact horizons of the blocks of one text (a source of the kind 'book')."""

    preset = "default"
    measures_horizon = True
    extras = {  # noqa: RUF012
        "book_tokens": "tokens of the whole text that the passage is a block of; null: not a block"
    }

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {"book_tokens": sourced.whole if isinstance(sourced, Block) else None}

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for (model, source, length, K), group in by_length(data.of(self.name)):
            whole = read_json(group["extra"].iloc[0])["book_tokens"]
            per_vector = tokens_per_vector(group)
            exact = share_interval(int((group["exact"] == 1).sum()), len(group))
            line: TableLine = [
                ("model", model),
                ("source", source),
                ("block", length),
                ("K", K),
                ("blocks", len(group)),
                ("exact", str(exact)),
                *interval("tokens / vector", per_vector),
                ("tokens of the text", whole),
                *interval("vectors for it", _needed(whole, per_vector)),
            ]
            if compare:
                hobbit = published.published()["book"]["values"]
                line += interval("for The Hobbit", _needed(hobbit["tokens"], per_vector))
                line.append(("paper, not run", hobbit["vectors"].get(data.published_as(model))))
            lines.append(line)
        return [
            Table.of(
                "book",
                "Vectors for a whole book",
                "Tokens per vector: leading tokens of a block that decode freely, divided by K; "
                "mean over blocks with its 95 % bootstrap interval. Vectors: the text's tokens "
                "divided by that mean, rounded up. Where all blocks are exact, fewer vectors may "
                "be enough.",
                lines,
            )
        ]


def tokens_per_vector(rows: pd.DataFrame) -> Interval:
    """Exact tokens per vector: mean over blocks of one length and K, 95 % bootstrap interval."""
    return bootstrap_mean((rows["horizon"] / rows["vectors"]).tolist())


def _needed(tokens: int | None, per_vector: Interval) -> tuple[int | None, int | None, int | None]:
    """Vectors that `tokens` tokens need, with the interval; None where a rate is 0 or unknown."""

    def at(rate: float) -> int | None:
        return -int(-tokens // rate) if tokens is not None and rate > 0 else None

    # More tokens per vector are fewer vectors.
    return at(per_vector.value), at(per_vector.high), at(per_vector.low)
