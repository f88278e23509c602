"""Sentence by sentence: the bits of a sentence after its predicted latent.

Each passage is a whole sentence (source `sentences`) and is crammed into K vectors, which are its
latent; the bits after this latent are the lower bound of the comparison. A latent model
(`memvec lab sentences train`) predicts that latent from those of the `context` sentences before.
The row has the bits of the sentence's tokens after the prediction, after the prediction written
and encoded again, after the text before, and after nothing (memvec.lab.sentences.evaluate lists
all ways). `horizon` is the number of sentences that the latent model predicts ahead from its own
predictions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab import slow
from memvec.lab.protocols import protocol, sentences_report
from memvec.lab.protocols.protocol import Card, Compared, Protocol, missing_file
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Plot
from memvec.lab.report.table import Table
from memvec.lab.sentences import evaluate, latents
from memvec.lab.sentences.cutting import last_sentences
from memvec.lab.sentences.files import load_latent_model
from memvec.lab.sentences.flops import costs
from memvec.lab.sentences.model import LatentModel
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.lab.sources.sentences import SentencePassage
from memvec.lab.study.spec import RunSpec
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.writing import path_of

# Ways whose bits the slow path computes again.
RECOMPUTED = ("nothing", "latents", "predicted", "text", "full", "encoded")


class Sentences(Protocol):
    """Bits of a sentence after its predicted latent, beside text and nothing."""

    preset = "default"
    changes = {"start": "encoder"}  # noqa: RUF012
    extras = {  # noqa: RUF012
        "latent_model": "hash of the latent model's file, text",
        "sizes": "tokens of each of the sentences before, which are the last ones of the text "
        "before",
        "bits": "bits of the sentence's tokens, each way (memvec.lab.sentences.evaluate.WAYS)",
        "predicted": "the predicted latent, K x D numbers",
        "written": "token ids of the sentence that the predicted latent decodes to",
        "continuous": "bits of the sentence's tokens after its latent predicted 2, 3, ... "
        "sentences ahead, where the model reads its own predictions of those between",
        "discretised": "the same, with each prediction written and encoded again, bits",
        "before_exact": "for each of the sentences before: [1 if its encoded latent decodes "
        "exactly, 1 if its crammed one does], number",
        "encoded_exact": "1 if the sentence's own encoded latent decodes exactly, else 0, number",
        "flops": "operations of the sentence each way (memvec.lab.sentences.flops.COSTS), number",
    }
    not_recomputed = (
        *("continuous", "discretised", "before_exact", "encoded_exact", "sizes"),
        "bits (crammed and discretised)",
    )

    class Options(protocol.Options):
        """The latent model, and what it reads."""

        latents: str = Field(description="file of the latent model (memvec lab sentences train)")
        context: int = Field(default=8, ge=1, description="sentences before that are read")
        horizon: int = Field(default=3, ge=1, description="sentences ahead that are predicted")

    def problem(self, run: RunSpec) -> str | None:
        if run.recipe.get("start_rule", "vectors") != "vectors":
            return "reads latents with nothing after them, so start_rule is 'vectors'"
        return None

    def crammed_besides(
        self, passages: int, tokens: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        return passages * int(options["context"]), tokens

    def extra_of_cell(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        recipe: Recipe,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        if not isinstance(sourced, SentencePassage):
            raise MemvecError("protocol 'sentences' takes a source of the kind 'sentences'.")
        model, ids = _latent_model(lm, options["latents"]), sourced.passage.ids
        if len(outcome.vectors) != model.vectors:
            raise MemvecError(
                f"the latent model in {options['latents']} has {model.vectors} vectors per "
                f"sentence, and the study asks for {len(outcome.vectors)}: set vectors to it."
            )
        sizes = sourced.sizes[-options["context"] :]
        if len(sizes) < options["context"]:
            raise MemvecError(
                f"{sourced.name} has {len(sizes)} sentences before it, fewer than the context of "
                f"{options['context']}: raise 'before' of the source."
            )
        before = last_sentences(sourced.before, sizes)
        measured = evaluate.measure(
            lm,
            model,
            before,
            sourced.before,
            ids,
            recipe,
            options["horizon"],
            outcome.vectors.dtype,
        )
        whole = len(evaluate.fitting(lm, sourced.before, len(ids)))
        return {
            **asdict(measured),
            "predicted": measured.predicted.tolist(),
            "written": list(measured.written),
            "encoded_exact": int(measured.encoded_exact),
            "latent_model": model.identity,
            "sizes": list(sizes),
            "flops": costs(lm, model, len(ids), sum(sizes), whole, len(sizes)),
        }

    def files(self, options: Mapping[str, Any]) -> dict[str, Path]:
        return {"latents": path_of(options["latents"])}

    def missing(self, options: Mapping[str, Any]) -> str | None:
        return missing_file("latent model", options["latents"], "memvec lab sentences train")

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        """Predict again with the latent model's file, and recompute the bits of RECOMPUTED slowly.

        Cramming, and predictions that were written and encoded again, are not repeated.
        """
        lm, ids = passage.lm, passage.ids
        model = _latent_model(lm, passage.options["latents"])
        before = last_sentences(passage.before, [int(size) for size in stored["sizes"]])
        known = latents.encode(lm, before, model.vectors)
        predicted = torch.tensor(stored["predicted"], dtype=torch.float32)
        scale = float(predicted.abs().max())
        gap = float((model.predict(known[None])[0] - predicted).abs().max()) / scale
        front = {
            "nothing": model.predict(known[None, :0])[0],
            "latents": known.flatten(0, 1),
            "predicted": predicted,
            "encoded": latents.encode(lm, [ids], model.vectors)[0],
        }
        again = {
            name: float(slow.teacher_forced(lm, vectors, ids, "vectors")[0].sum())
            for name, vectors in front.items()
        }
        bos = [] if lm.bos_id is None else [lm.bos_id]
        whole = evaluate.fitting(lm, passage.before, len(ids))
        again["text"] = passage.bits_after([*bos, *[t for s in before for t in s]])[0]
        again["full"] = passage.bits_after([*bos, *whole])[0]
        limit = 5 * passage.bits_tolerance
        flops = costs(lm, model, len(ids), sum(map(len, before)), len(whole), len(before))
        return [
            Compared(
                "latent_model", [float(stored["latent_model"] == model.identity)], [1.0], [0.0]
            ),
            Compared("predicted", [gap], [0.0], [1e-3]),
            *(
                Compared(f"bits {name}", [float(stored["bits"][name])], [again[name]], [limit])
                for name in RECOMPUTED
            ),
            _written(passage, predicted, stored["written"]),
            Compared(
                "flops",
                [float(stored["flops"][name]) for name in flops],
                list(flops.values()),
                [1e-6 * value for value in flops.values()],
            ),
        ]

    def cards(self, data: Data) -> list[Card]:
        return sentences_report.cards(data, self.name)

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        return sentences_report.tables(data, self.name)

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        return sentences_report.figures(data, self.name)


def _written(passage: SlowPassage, predicted: torch.Tensor, stored: Any) -> Compared:
    """How many written tokens decode again; after a tie any number of them may differ."""
    token_ids = [int(token) for token in stored]
    decoded = slow.greedy(passage.lm, predicted, [], len(token_ids))
    same = slow.leading(decoded, token_ids)
    _, margin = slow.teacher_forced(passage.lm, predicted, token_ids, "vectors")
    tied = bool((abs(margin) < slow.TIE).any())
    return Compared("written", [float(len(token_ids))], [float(same)], [math.inf if tied else 0.0])


@functools.lru_cache(maxsize=4)
def _latent_model(lm: FrozenLM, path: str) -> LatentModel:
    """The latent model of a cell, read once in each process that works on it."""
    return load_latent_model(path, lm)
