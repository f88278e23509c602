"""Which layers read the vectors: attention, knocked-out layers, the logit lens, and the path.

Vectors are crammed by the default recipe with BOS after them, so that every token is predicted at
a position that has to attend to the vectors. The protocol measures for each passage the share of
attention on the vectors in each layer, and the leading tokens that decode when attention to them is
knocked out in one layer, or in a layer and all above it (`memvec.usable.knockout`). It also
measures the prediction of each layer at the first position (`memvec.lab.inside`), and the path of
the vectors when the passage is crammed once more alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from memvec import metrics
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab import inside, slow, slow_inside, slow_use
from memvec.lab.protocols import reading_report
from memvec.lab.protocols.protocol import Compared, Protocol
from memvec.lab.protocols.usable import cases
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Plot
from memvec.lab.report.table import Table
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.spec import RunSpec
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.usable.knockout import knocked_out, layer_count


class ReadingProtocol(Protocol):
    """Attention, knock-outs, logit lens and optimiser path of each passage."""

    preset = "default"
    changes = {"start_rule": "bos"}  # noqa: RUF012
    measures_horizon = True
    extras = {  # noqa: RUF012
        "attention": "for each layer, the share of attention on the vectors, mean over heads and "
        "the positions after them",
        "cut": "for attention to the vectors cut in a layer ('2'), in it and all above ('2+') and "
        "in none: [leading right tokens; mean margin, logits]",
        "lens": "for each layer, what its state makes of the first token at once: [-log2 p, bits; "
        "its rank; id of the arg-max]",
        "path": "the vectors of every step in the plane of their first two principal components: "
        "{x, y, leading: leading right tokens of the best so far, explained: share of the variance "
        "in the plane}",
    }
    not_recomputed = ("path",)

    def problem(self, run: RunSpec) -> str | None:
        if run.recipe or run.budget or run.seeds != (0,):
            return (
                "traces the path of its own recipe with seed 0, so leave out `recipe`, `budget` "
                "and `seeds`"
            )
        return None

    def crammed_besides(
        self, passages: int, tokens: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        return passages, tokens  # each once more, for its path

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        if start_rule != "bos":
            raise MemvecError("protocol 'reading' needs a BOS token after the vectors.")
        ids, vectors = sourced.passage.ids, outcome.vectors.float()
        layers, K = layer_count(lm), len(vectors)
        table = torch.tensor([ids], device=lm.device)
        rows = vectors[None].to(lm.device)
        inputs = lm.reading.inputs(lm, rows, table, "bos")
        cut = {}
        for name, without in cases(layers).items():
            with torch.no_grad(), knocked_out(lm, without, K):
                margin = metrics.margins(lm.logits(rows, table, "bos"), table)
            cut[name] = [float(metrics.horizon(margin > 0)[0]), float(margin.mean())]
        recipe = Recipe.of(self.preset, **self.changes)
        storage = str(outcome.vectors.dtype).removeprefix("torch.")
        path = inside.path_of(lm, ids, K, recipe, storage)
        return {
            "attention": inside.attention_shares(lm, inputs, K),
            "cut": cut,
            "lens": inside.logit_lens(lm, inputs, K, ids[0]),
            "path": path._asdict(),
        }

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        lm, ids, vectors = passage.lm, passage.ids, passage.vectors
        layers = int(lm.config.get_text_config().num_hidden_layers)
        shares = slow_inside.attention_shares(lm, vectors, [*lm.trigger, *ids[:-1]])
        near = 10 * passage.bits_tolerance / len(passage.lm_bits)
        lens = slow_inside.lens(lm, vectors, list(lm.trigger), ids[0])
        bits, again_bits = ([row[0] for row in rows] for rows in (stored["lens"], lens))
        ranks, again_ranks = ([row[1] for row in rows] for rows in (stored["lens"], lens))
        best, again_best = ([row[2] for row in rows] for rows in (stored["lens"], lens))
        ties = slow_inside.may_rank(lm, vectors, list(lm.trigger), ids[0], near)
        tied = [math.inf if tie else 0.0 for _, tie in ties]
        off = [0.05 * row[0] + 0.05 for row in lens]  # early layers may need many bits
        compared = [
            Compared("attention", stored["attention"], shares, [1e-3] * layers),
            Compared("lens", bits, again_bits, off),
            Compared("lens-rank", ranks, again_ranks, [near_by for near_by, _ in ties]),
            Compared("lens-arg-max", best, again_best, tied),
        ]
        for name, without in cases(layers).items():
            with slow_use.apart(lm, without, len(vectors)):
                _, margin = slow.teacher_forced(lm, vectors, ids, "bos")
            again = [float(np.cumprod(margin > 0).sum()), float(margin.mean())]
            tie = bool((np.abs(margin) < slow.TIE).any())
            limits = [float(len(ids)) if tie else 0.0, near]
            compared.append(Compared(f"cut {name}", stored["cut"][name], again, limits))
        return compared

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        return reading_report.tables(data.of(self.name))

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        return reading_report.figures(data.of(self.name))
