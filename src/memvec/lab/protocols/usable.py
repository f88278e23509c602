"""Exactness against use: exact tokens per vector, and the KL divergence of the vectors as context.

A passage is crammed with both losses (recipe 'usable'). In decoding mode the passage is decoded
after the trigger. In context mode the vectors replace the passage: on texts that the model writes
after the passage, and that cramming did not use, they are compared with the text, with nothing,
and with the last K, 2 K, 4 K and 8 K tokens of the text. With the option `layers`, attention to the
vectors is knocked out in both modes, in one layer at a time and in a layer with all above it
(memvec.usable.knockout). With `directions`, the subspaces of both modes are compared
(memvec.usable.directions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab import slow_use
from memvec.lab.protocols import protocol, usable_figures, usable_report
from memvec.lab.protocols.protocol import Card, Compared, Protocol
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Plot
from memvec.lab.report.table import Table
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.spec import RunSpec
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.usable import directions
from memvec.usable.certificate import SEED
from memvec.usable.contexts import after_each, contexts_of
from memvec.usable.knockout import knocked_out, layer_count
from memvec.usable.modes import BothModes
from memvec.usable.queries import queries_of


class Usable(Protocol):
    """Exact tokens per vector against divergence from the model that has read the text."""

    preset = "usable"
    changes = {"start_rule": "bos"}  # noqa: RUF012
    extras = {  # noqa: RUF012
        "words": "token ids of the held-out texts that were read after each context",
        "contexts": "for each context: [KL from the model after the text; NLL of the words], "
        "means in nats per token",
        "rms": "root mean square of the vectors' numbers",
        "layers": "for attention to the vectors knocked out in a layer ('2'), in it and all above "
        "('2+') and in none: [leading right tokens after the trigger; mean margin of all, logits; "
        "KL as context, nats per token]; empty without the option `layers`",
        "directions": "share of the gradients of the passage's margins inside the span of those of "
        "held-out words ('text in use'), the reverse, and for the vectors whole, without either "
        "span and without a random span as large: [leading right tokens after the trigger; mean "
        "margin, logits; KL as context, nats per token]; empty without the option `directions`",
    }

    not_recomputed = ("words",)

    class Options(protocol.Options):
        """The held-out texts of context mode, and the optional measurements."""

        texts: int = Field(default=4, ge=1, description="held-out continuations of each passage")
        words: int = Field(default=48, ge=1, description="tokens of each continuation")
        layers: bool = Field(default=False, description="knock out attention layer by layer")
        directions: bool = Field(default=False, description="compare the subspaces of both modes")

    def problem(self, run: RunSpec) -> str | None:
        if run.recipe.get("start_rule", "bos") != "bos":
            return (
                "reads the vectors with and without a trigger, so start_rule must be 'bos' "
                "(`trigger` says which token)"
            )
        if len(run.seeds) > 1:
            return "says how good the vectors of one start are: leave one of seeds"
        other = run.recipe.get("space", "inputs") != "inputs"
        if other and (run.options.get("layers") or run.options.get("directions")):
            return "looks into inputs only, so `layers` and `directions` have no other space"
        return None

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        if lm.bos_id is None:
            raise MemvecError(
                f"{lm.name} has no BOS token, so it can read nothing at all, which protocol "
                "'usable' compares vectors with."
            )
        ids, vectors = sourced.passage.ids, outcome.vectors.float()
        words = held_out_words(lm, ids, options)
        measured = after_each(lm, contexts_of(lm, vectors, ids, None), words)
        return {
            "words": words.tolist(),
            "contexts": {name: list(figures) for name, figures in measured.items()},
            "rms": float(vectors.square().mean().sqrt()),
            "layers": by_layer(lm, vectors, ids, words) if options["layers"] else {},
            "directions": in_spans(lm, vectors, ids, words) if options["directions"] else {},
        }

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        lm, ids, vectors, options = passage.lm, passage.ids, passage.vectors, passage.options
        words = [[int(token) for token in row] for row in stored["words"]]
        shape = [float(len(words)), *(float(len(row)) for row in words)]
        planned_shape = [float(options["texts"])] + [float(options["words"])] * options["texts"]
        compared = [
            Compared("words, texts and tokens", shape, planned_shape, [0.0] * len(planned_shape))
        ]
        if shape != planned_shape:
            return compared
        near = 2 * passage.bits_tolerance / len(passage.lm_bits)  # nats a word
        before = slow_use.context_ids(lm, ids, len(vectors))
        text = before["text"]
        given = int(lm.reading.space.startswith("prefix"))  # keys and values predict nothing
        again = {
            name: slow_use.divergence_and_nll(lm, None, context, text, words, given)
            for name, context in before.items()
        }
        as_context = lm.context_scale * vectors
        again["vectors"] = slow_use.divergence_and_nll(lm, as_context, [], text, words, given)
        compared += _entries("contexts", stored["contexts"], again, [near, near])
        rms = float(vectors.double().square().mean().sqrt())
        compared.append(Compared("rms", [float(stored["rms"])], [rms], [1e-4 * rms]))
        compared += self._layers_again(passage, words, stored["layers"], near)
        return compared + self._directions_again(passage, words, stored["directions"], near)

    def _layers_again(
        self, passage: SlowPassage, words: Any, stored: Mapping[str, Any], near: float
    ) -> list[Compared]:
        if not passage.options["layers"]:
            return _entries("layers", stored, {}, [])
        lm, vectors = passage.lm, passage.vectors
        again, loose = {}, len(passage.ids) + 0.0
        ties = set()
        for name, layers in cases(int(lm.config.get_text_config().num_hidden_layers)).items():
            again[name], tie = slow_use.both_modes(lm, vectors, passage.ids, words, layers)
            ties |= {name} if tie else set()
        limits = {name: [loose if name in ties else 0.0, 5 * near, near] for name in again}
        return _entries("layers", stored, again, limits)

    def _directions_again(
        self, passage: SlowPassage, words: Any, stored: Mapping[str, Any], near: float
    ) -> list[Compared]:
        if not passage.options["directions"]:
            return _entries("directions", stored, {}, [])
        lm, vectors, ids = passage.lm, passage.vectors, passage.ids
        text = slow_use.margin_gradients(lm, vectors, ids)
        use = slow_use.word_gradients(lm, vectors, words, len(ids))
        again: dict[str, Sequence[float]] = {
            "text in use": [slow_use.share_inside(text, use)],
            "use in text": [slow_use.share_inside(use, text)],
        }
        limits = {name: [0.02] for name in again}
        flat = vectors.double().cpu().numpy().reshape(1, -1)
        left = {"whole": flat, "without text": slow_use.residual(flat, text)}
        left["without use"] = slow_use.residual(flat, use)
        random = directions.random_directions(len(ids), flat.size, SEED).double().numpy()
        left["without random"] = slow_use.residual(flat, random)
        for name, numbers in left.items():
            changed = torch.from_numpy(numbers).float().reshape(vectors.shape)
            again[name], tie = slow_use.both_modes(lm, changed, ids, words)
            # Spans of float32 gradients differ more between the two paths than sums do.
            limits[name] = [float(len(ids)) if tie else 0.0, 25 * near, 25 * near]
        return _entries("directions", stored, again, limits)

    def cards(self, data: Data) -> list[Card]:
        return usable_report.cards(data.of(self.name))

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        return usable_report.tables(data, data.of(self.name))

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        return usable_figures.figures(data.of(self.name))


def held_out_words(lm: FrozenLM, ids: Sequence[int], options: Mapping[str, Any]) -> Tensor:
    """Token ids (texts, words) of the texts that the model writes after a passage."""
    recipe = Recipe(query_count=options["texts"], query_tokens=options["words"], seed=SEED)
    return queries_of(lm, ids, recipe)[0]


def cases(layers: int) -> dict[str, list[int]]:
    """The layers that are knocked out together, by the name of the case in a row."""
    alone = {str(i): [i] for i in range(layers)}
    above = {f"{i}+": list(range(i, layers)) for i in range(layers)}
    return {"none": [], **alone, **above}


def by_layer(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int], words: Tensor
) -> dict[str, list[float]]:
    """Measures of both modes for each of `cases`, with attention to the vectors (K, D) knocked out.

    Each is [leading right tokens, mean margin (logits), KL as context (nats per word)].
    """
    measured, both_modes = {}, BothModes(lm, ids, words)
    for name, layers in cases(layer_count(lm)).items():
        with knocked_out(lm, layers, len(vectors)):
            measured[name] = both_modes(vectors)
    return measured


def in_spans(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int], words: Tensor
) -> dict[str, list[float]]:
    """Overlap of the directions of both modes, and both modes without either span, or a random one.

    `vectors` (K, D), the `ids` of the passage, `words` (texts, tokens) of held-out texts. Overlaps
    are shares; measures of both modes are as in `by_layer`.
    """
    places = directions.places_of(len(words), words.shape[1], len(ids))
    text = directions.directions_of_text(lm, vectors, ids)
    use = directions.directions_of_use(lm, vectors, words, places)
    random = directions.random_directions(len(ids), vectors.numel(), SEED)
    both_modes = BothModes(lm, ids, words)
    left = {
        "whole": vectors,
        "without text": directions.without(vectors, text),
        "without use": directions.without(vectors, use),
        "without random": directions.without(vectors, random),
    }
    return {
        "text in use": [directions.overlap(text, use)],
        "use in text": [directions.overlap(use, text)],
        **{name: both_modes(remaining) for name, remaining in left.items()},
    }


def _entries(
    name: str,
    stored: Mapping[str, Any],
    again: Mapping[str, Sequence[float]],
    allowed: Mapping[str, Sequence[float]] | Sequence[float],
) -> list[Compared]:
    """Stored and recomputed lists of a mapping, key by key; different keys make one mismatch."""
    if list(stored) != list(again):
        keys = [[float(len(part))] for part in (stored, again)]
        return [Compared(f"{name}, entries", keys[0], [*keys[1], 0.0], [])]
    return [
        Compared(
            f"{name} {key}",
            [float(value) for value in stored[key]],
            list(values),
            allowed[key] if isinstance(allowed, Mapping) else allowed,
        )
        for key, values in again.items()
    ]
