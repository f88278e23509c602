"""Spaces of the trained numbers: inputs, keys and values of all layers or of one, a shared basis.

Each run of a spec names a space in its recipe (`recipe = { space = "prefix" }`) and K. The space
fixes the count of numbers of a vector, so rows are compared by their counts of numbers and of
stored bits, not by K. The measure is the exact horizon within the recipe's budget, as in the
protocol `exact`. In every space a BOS token follows the vectors (start rule 'bos'), so that the
same tokens are predicted.

Each passage's vectors are also measured in context mode, on `texts` continuations that the model
writes after the text. The first word of each continuation is given, because keys and values alone
predict no token. With `recipe = { preset = "usable", space = "prefix" }` the vectors are crammed
for both modes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from memvec.cramming.outcomes import Outcome
from memvec.lab import slow_use
from memvec.lab.protocols import protocol, spaces_report
from memvec.lab.protocols.exact import exact_result
from memvec.lab.protocols.protocol import Capacity, Card, Compared, Protocol
from memvec.lab.protocols.usable import held_out_words
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Plot
from memvec.lab.report.table import Table
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.spec import RunSpec
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.usable.queries import text_inputs


class Spaces(Protocol):
    """Exact horizons and KL as context, by space."""

    preset = "default"
    changes = {"start_rule": "bos"}  # noqa: RUF012
    measures_horizon = True
    extras = {  # noqa: RUF012
        "space": "where the trained numbers of a vector are read",
        "numbers": "numbers of the passage's vectors, all K together",
        "words": "token ids of the held-out texts that were read after each context",
        "kl": "KL from the model after the text, after [the vectors, nothing]: mean over the "
        "words after the first, nats per token",
    }

    not_recomputed = ("words",)

    class Options(protocol.Options):
        """The held-out texts that are read after the vectors."""

        texts: int = Field(default=2, ge=1, description="held-out continuations of each passage")
        words: int = Field(default=24, ge=2, description="tokens of each continuation")

    def problem(self, run: RunSpec) -> str | None:
        if run.recipe.get("start_rule", "bos") != "bos":
            return "compares spaces after one start rule, so start_rule must be 'bos'"
        if len(run.seeds) > 1:
            return "says how good the vectors of one start are: leave one of seeds"
        return None

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        ids, vectors = sourced.passage.ids, outcome.vectors.float()
        words = held_out_words(lm, ids, options)
        return {
            "space": space_of(lm),
            "numbers": vectors.numel(),
            "words": words.tolist(),
            "kl": list(divergences(lm, vectors, ids, words)),
        }

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        lm, ids, vectors = passage.lm, passage.ids, passage.vectors
        words = [[int(token) for token in row] for row in stored["words"]]
        bos = [] if lm.bos_id is None else [lm.bos_id]
        text = slow_use.context_ids(lm, ids, len(vectors))["text"]
        kl = [
            slow_use.divergence_and_nll(lm, front, before, text, words, given=1)[0]
            for front, before in ((vectors, []), (None, bos))
        ]
        near = 2 * passage.bits_tolerance / len(passage.lm_bits)
        numbers = float(vectors.numel())
        same = 0.0 if stored["space"] == space_of(lm) else 1.0
        return [
            Compared("space", [same], [0.0], [0.0]),
            Compared("numbers", [float(stored["numbers"])], [numbers], [0.0]),
            Compared("kl", [float(value) for value in stored["kl"]], kl, [near, near]),
        ]

    def capacity(self, rows: pd.DataFrame) -> Capacity | None:
        r = exact_result(rows)
        return Capacity(r.horizon.mean, r.horizon.low, r.horizon.high, str(r.horizon))

    def cards(self, data: Data) -> list[Card]:
        return spaces_report.cards(data, data.of(self.name))

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        return spaces_report.tables(data, data.of(self.name))

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        return spaces_report.figures(data, data.of(self.name))


def space_of(lm: FrozenLM) -> str:
    """The space of a model's reading, with its layer or its count of numbers."""
    options = lm.reading.options
    more = {"prefix-layer": f" {options.get('layer')}", "shared-basis": f" {lm.numbers}"}
    return lm.reading.space + more.get(lm.reading.space, "")


@torch.no_grad()
def divergences(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int], words: Tensor
) -> tuple[float, float]:
    """KL from the model after the text, nats per word: (after the vectors, after nothing).

    `vectors` (K, D), or as many numbers per vector as the space has; `words` are token ids of
    several texts of one length, each of whose first word is given.
    """
    words = words.to(lm.device)
    M = len(words)

    def after(inputs: Tensor) -> Tensor:
        whole = torch.cat([inputs.expand(M, -1, -1).to(lm.dtype), lm.embed(words[:, :-1])], 1)
        return lm.head(lm.states_of(whole, keep=words.shape[1] - 1)).log_softmax(-1)

    text, nothing = after(text_inputs(lm, ids)), after(text_inputs(lm, ()))
    rows = vectors[None].expand(M, -1, -1).to(lm.device)
    read = lm.head(lm.states(rows, words, "first-token")).log_softmax(-1)
    first, second = (float((text.exp() * (text - q)).sum(-1).mean()) for q in (read, nothing))
    return first, second
