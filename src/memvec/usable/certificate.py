"""The certificate of use: how well vectors stand for the text as context, beside other contexts.

For each passage, the model that has read the whole text is the reference. After each context (the
vectors; nothing; the last K, 2 K, 4 K and 8 K tokens of the text; vectors that were crammed to be
exact only) it reads the same words, and two figures say how far it is from the reference:

    KL     mean over tokens of KL(model after the text || model after the context), nats, over all
           V tokens
    kept   (NLL without context - NLL after the context) / (NLL without - NLL with the text): the
           share of what the text tells about the words that follow; 0 no context, 1 the whole text

The words (tokens) are queries that cramming never saw: continuations of the text, sampled with
another seed, and the true continuation of a passage, where the document goes on after it.

Texts of several passages are measured as a whole, too: their vectors one after the other, as
`memvec.use` has them, beside the whole text. Each passage was crammed to stand alone, so a row of
them is a worse context than its parts (docs/usable.md).

Vectors that predict nothing (keys and values, memvec.spaces) have the first word given, which is
then left out for every context.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from memvec import registry, statistics
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, check_type
from memvec.machine import environment, plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage, ids_hash
from memvec.results import Record
from memvec.storage import Storage
from memvec.usable.contexts import (
    FULL,
    NONE,
    VECTORS,
    Figures,
    after_each,
    contexts_of,
    contexts_of_row,
)
from memvec.usable.queries import continuations
from memvec.vectors import MemVectors

PASSAGES = 32  # at most so many passages are measured, evenly spread over the file
QUERIES = 4  # held-out continuations of each passage
TOKENS = 48  # of each, and of the true continuation; fewer where the context holds no more
SEED = 7919  # added to the recipe's: other continuations than cramming saw
ROWS = 8  # at most so many texts of several passages are measured whole


class ContextScore(Record):
    """How well one context stands for the text; 95 % bootstrap intervals (NaN for one passage)."""

    kl: float = Field(description="KL from the model after the text, nats per token")
    kl_interval: tuple[float, float]
    nll: float = Field(description="negative log-likelihood of the words, nats per token")
    kept: float = Field(description="share of the text's gain that the context keeps")
    kept_interval: tuple[float, float]
    over_vectors: float = Field(description="KL of this context / KL of the vectors")
    over_vectors_interval: tuple[float, float]
    passages: int | None = Field(default=None, ge=1, description="of how many passages; None: all")


class ScoreTable(Record):
    """The scores of every context on the same words."""

    passages: int = Field(ge=1, description="passages, or rows of them, that were measured")
    queries: int = Field(ge=1, description="texts for each")
    tokens: int = Field(ge=1, description="tokens of each")
    gain: float = Field(description="NLL without context - NLL with the text, nats per token")
    contexts: dict[str, ContextScore]


class UseCertificate(Record):
    """How well the vectors of a file stand for their texts as context."""

    trigger: str = Field(description="what precedes the passage: 'bos', an id, or 'crammed'")
    vectors: int = Field(ge=1, description="vectors of each passage (K)")
    context_scale: float = Field(default=1.0, description="what they are multiplied by here")
    held_out: ScoreTable
    continuation: ScoreTable | None = Field(
        default=None, description="the same on the true continuations; none: no text goes on"
    )
    in_a_row: ScoreTable | None = Field(
        default=None,
        description="all vectors of a text, on sampled continuations of it; none: no text has "
        "several passages that fit the model's context together",
    )
    environment: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """As a file's header has it: what is not finite is a word."""
        return dict(json.loads(self.model_dump_json()))


@plain_torch()
def certify_use(
    lm: FrozenLM,
    mem: MemVectors,
    token_ids: Sequence[Sequence[int]] | None = None,
    *,
    exact_only: bool = True,
    force: bool = False,
) -> UseCertificate:
    """Measure how well vectors stand for their texts as context.

    `token_ids` are those of every passage, where the caller has them; without them, the passages
    are decoded (raises as `MemVectors.tokens`). `exact_only=False` leaves out the control that
    has to be crammed; `force` measures the vectors of another model of that width. Raises
    MemvecError for vectors of another model, token ids that are not the passages', vectors that
    nothing can be read after (one-step, start rule 'vectors'), or passages too long for a query
    in the model's context.
    """
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    check_usable(mem)
    mem.check_model(lm, force=force)
    view = mem.view(lm)
    ids = mem.tokens(lm, force=force) if token_ids is None else _checked(token_ids, mem)
    chosen = _spread(len(ids), PASSAGES)
    K, tokens = mem.vectors.shape[1], _room(view, mem, [ids[i] for i in chosen])
    controls: list[Tensor | None] = [None] * len(chosen)
    if exact_only:
        controls = exact_only_vectors(view, mem, [ids[i] for i in chosen])
    contexts = [
        contexts_of(view, mem.vectors[i].float(), ids[i], control)
        for i, control in zip(chosen, controls, strict=True)
    ]
    seed = (SEED + int(mem.header.recipe.get("seed", 0))) % 2**62  # another than cramming had
    recipe = Recipe(query_count=QUERIES, query_tokens=tokens, seed=seed)
    held_out = [
        after_each(view, after, continuations(view, ids[i], recipe)[0])
        for after, i in zip(contexts, chosen, strict=True)
    ]
    following, token = _following(mem, ids, tokens), mem.header.trigger
    true = [
        after_each(view, after, torch.tensor([following[i]]))
        for after, i in zip(contexts, chosen, strict=True)
        if i in following
    ]
    return UseCertificate(
        trigger="crammed" if mem.soft else "bos" if token is None else str(token),
        vectors=K,
        context_scale=mem.header.context_scale,
        held_out=score_table(held_out, QUERIES, tokens),
        continuation=score_table(true, 1, tokens) if true else None,
        in_a_row=_scores_in_a_row(view, mem, ids, recipe),
        environment=environment(lm.device),
    )


def check_usable(mem: MemVectors, subject: str = "these vectors") -> None:
    """Raise MemvecError if nothing but their passage can be read after vectors (`subject`)."""
    check_type("mem", mem, MemVectors, "MemVectors.load")
    if mem.header.layout != "prefix" or mem.header.start_rule == "vectors":
        raise MemvecError(
            f"{subject} have no trigger, so whatever follows them is taken for their passage: "
            "cram the text with the preset 'usable'."
        )


def _checked(token_ids: Sequence[Sequence[int]], mem: MemVectors) -> Sequence[Sequence[int]]:
    """Token ids that a caller has. Raises MemvecError unless they are those of the passages."""
    try:
        same = [ids_hash(ids) for ids in token_ids] == [p.sha256 for p in mem.passages]
    except (TypeError, ValueError, OverflowError):  # not sequences of 32-bit integers
        same = False
    if not same:
        raise MemvecError(
            "token_ids are not those of these passages: leave them out, or pass what "
            "mem.tokens(lm) gives."
        )
    return token_ids


def _spread(n: int, limit: int) -> list[int]:
    return list(range(n)) if n <= limit else sorted({n * i // limit for i in range(limit)})


def _room(lm: FrozenLM, mem: MemVectors, passages: Sequence[Sequence[int]]) -> int:
    """Tokens of a query after the longest of the passages, TOKENS at most."""
    text = int(lm.bos_id is not None) + max(map(len, passages))
    vectors = len(lm.front) + mem.vectors.shape[1] + int(lm.reading.space != "inputs")
    # The last token of a query is not read.
    room = TOKENS if lm.context is None else lm.context - max(text, vectors) + 1
    if room < 2:
        raise MemvecError(
            f"a passage of {max(map(len, passages))} tokens leaves no room for a query in the "
            f"context of {lm.name} ({lm.context}): cram shorter passages."
        )
    return min(TOKENS, room)


def _following(
    mem: MemVectors, passages: Sequence[Sequence[int]], tokens: int
) -> dict[int, Sequence[int]]:
    """So many tokens after each passage, where its document has them."""
    following: dict[int, Sequence[int]] = {}
    at = 0
    for document in mem.header.documents:
        end = at + document.passages
        for i in range(at, end):
            later = (t for j in range(i + 1, end) for t in passages[j])
            after = list(itertools.islice(later, tokens))
            if len(after) == tokens:
                following[i] = after
        at = end
    return following


def _scores_in_a_row(
    lm: FrozenLM, mem: MemVectors, passages: Sequence[Sequence[int]], recipe: Recipe
) -> ScoreTable | None:
    """Scores of the vectors of whole texts; of a long text, as many passages as fit the context."""
    rows: list[range] = []
    at = 0
    for document in mem.header.documents:
        texts = passages[at : at + document.passages]
        n = _fitting(lm, texts, mem.vectors.shape[1], recipe.query_tokens)
        rows += [range(at, at + n)] if n > 1 else []
        at += document.passages
    measured = []
    for i in _spread(len(rows), ROWS):
        row = slice(rows[i].start, rows[i].stop)
        text = [token for ids in passages[row] for token in ids]
        contexts = contexts_of_row(lm, mem.vectors[row].float(), text)
        measured.append(after_each(lm, contexts, continuations(lm, text, recipe)[0]))
    return score_table(measured, QUERIES, recipe.query_tokens) if measured else None


def _fitting(lm: FrozenLM, passages: Sequence[Sequence[int]], K: int, tokens: int) -> int:
    """How many of the first passages fit the context as text and as vectors, with `tokens` more."""
    text, row = 1, len(lm.front)
    for n, ids in enumerate(passages):
        text, row = text + len(ids), row + K
        if lm.context is not None and max(text, row) + tokens > lm.context:
            return n
    return len(passages)


def exact_only_vectors(
    lm: FrozenLM, mem: MemVectors, passages: Sequence[Sequence[int]]
) -> list[Tensor | None]:
    """As many vectors (K, W) of each passage, crammed by the default recipe; None if not exact."""
    space = lm.reading.space  # its own preset has the rates of its numbers
    recipe = Recipe.of(space if space in registry.names("preset") else "default")
    of_space = {k: v for k, v in lm.reading.options.items() if k in recipe.record()}
    storage: Storage = mem.storage
    engine = Engine(
        lm,  # which has the trigger already: 'bos' leaves it as it is
        replace(recipe, space=space, start_rule=mem.header.start_rule, trigger="bos", **of_space),
        vectors=mem.vectors.shape[1],
        storage=storage,
        batch_size=min(32, len(passages)),
    )
    jobs = [Passage(tuple(ids), i) for i, ids in enumerate(passages)]
    crammed = {o.passage.document: o.vectors.float() for o in engine.run(jobs) if o.exact}
    return [crammed.get(i) for i in range(len(passages))]


def score_table(measured: Sequence[dict[str, Figures]], queries: int, tokens: int) -> ScoreTable:
    """Means and intervals over the passages; a context that a passage lacks is left out there."""
    fullest = sorted(measured, key=len, reverse=True)  # the order in which contexts are shown
    names = dict.fromkeys(name for row in fullest for name in row if name != FULL)
    gain = [row[NONE].nll - row[FULL].nll for row in measured]
    scores = {}
    for name in names:
        rows = [(row[name], row, g) for row, g in zip(measured, gain, strict=True) if name in row]
        kls = [after.kl for after, *_ in rows]
        kl = statistics.bootstrap_mean(kls)
        gained = [row[NONE].nll - after.nll for after, row, _ in rows]
        kept = statistics.ratio_of_means(gained, [g for *_, g in rows])
        over = statistics.ratio_of_means(kls, [row[VECTORS].kl for _, row, _ in rows])
        scores[name] = ContextScore(
            kl=kl.value,
            kl_interval=(kl.low, kl.high),
            nll=sum(after.nll for after, *_ in rows) / len(rows),
            kept=kept.value,
            kept_interval=(kept.low, kept.high),
            over_vectors=over.value,
            over_vectors_interval=(over.low, over.high),
            passages=len(rows) if len(rows) < len(measured) else None,
        )
    return ScoreTable(
        passages=len(measured),
        queries=queries,
        tokens=tokens,
        gain=sum(gain) / len(gain),
        contexts=scores,
    )
