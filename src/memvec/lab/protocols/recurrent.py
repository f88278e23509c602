"""Recurrent memory: how many of the newest segments of a document decode, beside cramming.

A passage is a chain of segments. The vectors of the row are the whole chain crammed into K vectors,
the upper bound of what K vectors hold. A recurrent encoder (memvec.encoders.recurrent) carries a
memory of as many vectors over the chain; the newest segments are decoded freely from this memory,
each after the question of its lag. Each of these segments is also crammed alone into K vectors.

`study check` reads the chain again with the encoder's file, one document at a time, and decodes
again from the stored memory.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import Field

from memvec.companions.encoder_files import load_encoder, shape_of
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.encoders.recurrent import RecurrentEncoder, recurrent_of
from memvec.encoders.recurrent_measure import check_chain, crammed_leading, recall
from memvec.errors import MemvecError
from memvec.lab import slow
from memvec.lab.protocols import protocol, recurrent_report
from memvec.lab.protocols.exact import exact_result
from memvec.lab.protocols.protocol import Capacity, Card, Compared, Protocol, missing_file
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Plot
from memvec.lab.report.table import Table
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.spec import RunSpec
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.writing import path_of

# Largest difference of a memory relative to its root mean square; devices and kernels round
# differently at each segment.
NEAR, NEAR_HALF = 1e-3, 0.3


class Recurrent(Protocol):
    """A memory carried over the chain of each passage, beside cramming."""

    preset = "default"
    changes = {"start": "noise"}  # noqa: RUF012
    extras = {  # noqa: RUF012
        "memory": "K x D numbers of the memory after the last segment, number",
        "segment": "tokens of a segment",
        "back": "leading tokens of the segment at each lag, 0 first, that decode freely from the "
        "memory",
        "right": "positions of the segment at each lag whose arg-max is right when the true "
        "earlier tokens are given, tokens",
        "alone": "leading tokens of the segment at each lag that decode freely from K vectors of "
        "its own",
    }
    not_recomputed = ("alone",)

    class Options(protocol.Options):
        """The encoder, and how many segments are decoded."""

        encoder: str = Field(
            description="file of memvec encoder train --recurrent; read from where the study runs"
        )
        lags: int = Field(
            default=0, ge=0, description="newest segments to ask for; 0: all it was trained for"
        )

    def problem(self, run: RunSpec) -> str | None:
        if run.recipe.get("start", "noise") in ("encoder", "auto"):
            return "compares a recurrent encoder with cramming, so start cannot be an encoder's"
        if run.recipe.get("start_rule", "vectors") != "vectors":
            return "decodes from a memory and a question, so start_rule is 'vectors'"
        if len(run.seeds) > 1:
            return "crams each segment again from one start: leave one of seeds"
        return None

    def files(self, options: Mapping[str, Any]) -> dict[str, Path]:
        return {"encoder": path_of(options["encoder"])}

    def missing(self, options: Mapping[str, Any]) -> str | None:
        return missing_file("encoder", options["encoder"], "memvec encoder train --recurrent")

    def crammed_besides(
        self, passages: int, tokens: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        try:
            segment, trained = segment_and_lags(options["encoder"])
        except (MemvecError, ValueError, TypeError):
            # The run says what is wrong with the file; a chain of one segment is the least.
            segment, trained = tokens, 1
        alone = min(options["lags"] or trained, tokens // segment)
        return passages * alone, segment

    def extra_of_cell(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        recipe: Recipe,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        view = carried_by(lm, options["encoder"])
        encoder, ids = recurrent_of(view), torch.tensor([sourced.passage.ids], device=lm.device)
        n, lags = chain_of(view, encoder, ids.shape[1], len(outcome.vectors), options["lags"])
        with torch.no_grad():
            memory = encoder.memories(view, ids, encoder.segment)[-1]
        recalled = [recall(view, memory, ids, lag) for lag in range(min(n, lags))]
        parts = [part[0].tolist() for part in torch.split(ids, encoder.segment, dim=1)]
        newest = parts[::-1][: len(recalled)]
        return {
            "memory": memory[0].tolist(),
            "segment": encoder.segment,
            "back": [at.leading[0] for at in recalled],
            "right": [at.right[0] for at in recalled],
            "alone": crammed_leading(
                lm, newest, encoder.slots, recipe, len(newest), outcome.vectors.dtype
            ),
        }

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        """Recompute the memory from the file, and decode from the stored memory; cram nothing."""
        view = carried_by(passage.lm, passage.options["encoder"])
        encoder, ids = recurrent_of(view), torch.tensor([passage.ids], device=view.device)
        T, memory = encoder.segment, torch.tensor([stored["memory"]], dtype=torch.float32)
        lags = min(len(ids[0]) // T, passage.options["lags"] or encoder.lags)
        with torch.no_grad():
            again = encoder.memories(view, ids, T)[-1].cpu()
        gap = float((again - memory).abs().max() / again.pow(2).mean().sqrt())
        near = NEAR if view.rounding == torch.float32 else NEAR_HALF
        back, right, loose, tied = [], [], [], []
        for lag in range(lags):
            end = len(passage.ids) - lag * T
            truth = passage.ids[end - T : end]
            vectors = encoder.asked(memory.to(view.device), lag)[0].detach()
            decoded = slow.greedy(view, vectors, [], T)
            back.append(float(slow.leading(decoded, truth)))
            _, margin = slow.teacher_forced(view, vectors, truth, "vectors")
            right.append(float((margin > 0).sum()))
            tied.append(float((abs(margin) < slow.TIE).sum()))
            # After a tie on the decoded path, any number of tokens may differ.
            off = slow.teacher_forced(view, vectors, decoded, "vectors")[1]
            loose.append(float(T) if (abs(off) < slow.TIE).any() else 0.0)
        return [
            Compared("memory", [gap], [0.0], [near]),
            Compared("segment", [float(stored["segment"])], [float(T)], [0.0]),
            Compared("back", [float(t) for t in stored["back"]], back, loose),
            Compared("right", [float(t) for t in stored["right"]], right, tied),
        ]

    def capacity(self, rows: pd.DataFrame) -> Capacity | None:
        r = exact_result(rows)
        return Capacity(r.horizon.mean, r.horizon.low, r.horizon.high, str(r.horizon))

    def cards(self, data: Data) -> list[Card]:
        return recurrent_report.cards(data.of(self.name))

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        return recurrent_report.tables(data.of(self.name))

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        return recurrent_report.figures(data.of(self.name))


def chain_of(
    lm: FrozenLM, encoder: RecurrentEncoder, tokens: int, K: int, lags: int
) -> tuple[int, int]:
    """(segments of a passage, lags to decode). Raises MemvecError for an impossible cell."""
    if encoder.slots != K:
        raise MemvecError(
            f"the recurrent encoder has a memory of {encoder.slots} vectors, and the run asks for "
            f"vectors = [{K}]: both must be the same."
        )
    if tokens % encoder.segment:
        raise MemvecError(
            f"a length of {tokens} tokens is no chain of whole segments of {encoder.segment}."
        )
    lags = lags or encoder.lags
    check_chain(lm, encoder, tokens, tokens // encoder.segment, lags, crammed=True)
    return tokens // encoder.segment, lags


def segment_and_lags(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(tokens of a segment, lags it was trained for) of an encoder's file, without the model."""
    shape = shape_of(path)
    return int(shape.get("segment", 0)) or 1, int(shape.get("lags", 0)) or 1


@functools.lru_cache(maxsize=4)
def carried_by(lm: FrozenLM, path: str) -> FrozenLM:
    """The model with the recurrent encoder in a file. Raises MemvecError if it has none."""
    view = copy.copy(lm)
    view.encoder = load_encoder(path, lm)
    recurrent_of(view)
    return view
