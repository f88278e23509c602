"""The certificate of use: how well vectors stand for their text as context, beside other contexts.

The reference is the model that has read the text of a passage. The model reads the same queries
after each context: the vectors; nothing; the last K, 2 K, 4 K and 8 K tokens of the text; and
exact-only vectors. Two figures compare it with the reference:

    KL     KL(model after the text || model after the context) over all V tokens, nats, mean over
           the tokens of the queries
    kept   the share kept: (NLL after nothing - NLL after the context) / (NLL after nothing - NLL
           after the text); 0 is no context, 1 is the whole text

The queries are not those of cramming: they are continuations of the text, sampled with another
seed, and the true continuation of a passage, if the document is long enough.

Texts of several passages are also measured as a whole: the vectors of all passages in a row, as
`memvec.use` reads them, are compared with the whole text. Each passage was crammed alone, so a row
of them is a worse context than each one for its own text (docs/usable.md).

After vectors that predict nothing (keys and values, memvec.spaces), the first token of a query is
given. It is then left out after every context.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from memvec import registry, statistics
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, check_type
from memvec.machine import environment, plain_torch
from memvec.model.batch_size import default_batch_size
from memvec.model.lm import FrozenLM
from memvec.model.memory import fits, forget_freed_memory
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

PASSAGES = 32  # maximum number of measured passages, evenly spaced in the file
QUERIES = 4  # held-out continuations of each passage
TOKENS = 48  # maximum tokens of a query; fewer if the model's context is short
SEED = 7919  # added to the recipe's seed, so that the queries are not those of cramming
ROWS = 8  # maximum number of texts of several passages that are measured as a whole
# Maximum inputs of such a text with a query. Models without attention or with a long context would
# read whole books otherwise.
ROW_INPUTS = 4096


class ContextScore(Record):
    """How well one context stands for the text; 95 % bootstrap intervals (NaN for one passage)."""

    kl: float = Field(description="KL from the model after the text, nats per token")
    kl_interval: tuple[float, float]
    nll: float = Field(description="negative log-likelihood of the queries, nats per token")
    kept: float = Field(description="share kept: of the text's gain, what the context keeps")
    kept_interval: tuple[float, float]
    over_vectors: float = Field(description="KL of this context / KL of the vectors")
    over_vectors_interval: tuple[float, float]
    passages: int | None = Field(
        default=None, ge=1, description="number of passages with this context; None: all"
    )


class ScoreTable(Record):
    """The scores of every context on the same queries."""

    passages: int = Field(ge=1, description="passages, or texts of several, that were measured")
    queries: int = Field(ge=1, description="queries of each passage")
    tokens: int = Field(ge=1, description="tokens of each query")
    gain: float = Field(description="NLL after nothing - NLL after the text, nats per token")
    contexts: dict[str, ContextScore]


class UseCertificate(Record):
    """How well the vectors of a file stand for their texts as context."""

    trigger: str = Field(description="the trigger: 'bos', a token id, or 'crammed'")
    vectors: int = Field(ge=1, description="vectors of each passage (K)")
    context_scale: float = Field(default=1.0, description="factor of the vectors in context mode")
    held_out: ScoreTable
    continuation: ScoreTable | None = Field(
        default=None, description="scores on the true continuations; none: no text is long enough"
    )
    in_a_row: ScoreTable | None = Field(
        default=None,
        description="scores of all vectors of a text on sampled continuations; none: no text has "
        "several passages that fit the model's context together",
    )
    environment: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The certificate as JSON values for a header; numbers that are not finite are strings."""
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

    `token_ids` are those of every passage; without them, the passages are decoded (this raises as
    `MemVectors.tokens` does). `exact_only=False` leaves out exact-only vectors, which must be
    crammed for the comparison. `force` measures vectors of another model of the same width. Raises
    MemvecError for vectors of another model, for token ids that are not those of the passages, for
    vectors without a context mode (one-step, another start rule than 'bos'), and for passages that
    leave no room for a query in the model's context.
    """
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    check_usable(mem)
    mem.check_model(lm, force=force)
    view = mem.view(lm)
    ids = mem.tokens(lm, force=force) if token_ids is None else _checked(token_ids, mem)
    chosen = _evenly_spaced(len(ids), PASSAGES)
    K, tokens = mem.vectors.shape[1], _query_tokens(view, mem, [ids[i] for i in chosen])
    controls: list[Tensor | None] = [None] * len(chosen)
    if exact_only:
        controls = exact_only_vectors(view, mem, [ids[i] for i in chosen])
    contexts = [
        contexts_of(view, mem.vectors[i].float(), ids[i], control)
        for i, control in zip(chosen, controls, strict=True)
    ]
    seed = (SEED + int(mem.header.recipe.get("seed", 0))) % 2**62
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
    """Raise MemvecError for vectors without a context mode; `subject` names them in the error."""
    check_type("mem", mem, MemVectors, "MemVectors.load")
    if mem.header.layout != "prefix" or mem.header.start_rule != "bos":
        raise MemvecError(
            f"{subject} have no trigger, so whatever follows them is taken for their passage: "
            "cram the text with the preset 'usable'."
        )


def _checked(token_ids: Sequence[Sequence[int]], mem: MemVectors) -> Sequence[Sequence[int]]:
    """Return `token_ids`. Raises MemvecError unless they are those of the passages."""
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


def _evenly_spaced(n: int, limit: int) -> list[int]:
    """At most `limit` of the indices below n, evenly spaced."""
    return list(range(n)) if n <= limit else sorted({n * i // limit for i in range(limit)})


def _query_tokens(lm: FrozenLM, mem: MemVectors, passages: Sequence[Sequence[int]]) -> int:
    """Tokens of a query that fit the context after the longest of the passages, at most TOKENS."""
    text = int(lm.bos_id is not None) + max(map(len, passages))
    vectors = len(lm.front) + mem.vectors.shape[1] + int(lm.reading.space != "inputs")
    # The last token of a query is predicted and not read.
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
    """By passage, the next `tokens` tokens of its document; without passages that have fewer."""
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
    """Scores of the vectors of whole texts; of a long text, only the passages that fit.

    None if no text has several passages that fit.
    """
    rows: list[range] = []
    at = 0
    for document in mem.header.documents:
        texts = passages[at : at + document.passages]
        n = _passages_that_fit(lm, texts, mem.vectors.shape[1], recipe.query_tokens)
        rows += [range(at, at + n)] if n > 1 else []
        at += document.passages
    chosen = [rows[i] for i in _evenly_spaced(len(rows), ROWS)]
    parts = [slice(row.start, row.stop) for row in chosen]
    figures = [_figures_of_row(lm, mem.vectors[p].float(), passages[p], recipe) for p in parts]
    measured = [of_row for of_row in figures if of_row is not None]
    return score_table(measured, QUERIES, recipe.query_tokens) if measured else None


def _figures_of_row(
    lm: FrozenLM,
    vectors: Float[Tensor, "n K W"],
    passages: Sequence[Sequence[int]],
    recipe: Recipe,
) -> dict[str, Figures] | None:
    """The figures of n passages in a row; when memory runs out, of the first half of them.

    None if two passages do not fit in memory.
    """
    figures: dict[str, Figures] | None = None

    def measure() -> None:
        nonlocal figures
        text = [token for ids in passages[:n] for token in ids]
        contexts = contexts_of_row(lm, vectors[:n], text)
        figures = after_each(lm, contexts, continuations(lm, text, recipe)[0])

    n = len(passages)
    while n > 1 and not fits(measure):
        n //= 2
        forget_freed_memory()
    return figures


def _passages_that_fit(lm: FrozenLM, passages: Sequence[Sequence[int]], K: int, tokens: int) -> int:
    """How many of the first passages fit the context with `tokens` more, as text and as vectors.

    From the third passage on, they must also fit ROW_INPUTS.
    """
    text, row = 1, len(lm.front)
    for n, ids in enumerate(passages):
        text, row = text + len(ids), row + K
        inputs = max(text, row) + tokens
        if inputs > (lm.context or inputs) or (n >= 2 and inputs > ROW_INPUTS):
            return n
    return len(passages)


def exact_only_vectors(
    lm: FrozenLM, mem: MemVectors, passages: Sequence[Sequence[int]]
) -> list[Tensor | None]:
    """Exact-only vectors (K, W) of each passage, K as in `mem`; None for a passage not exact."""
    space = lm.reading.space  # a space has a preset of its own, if its learning rates differ
    recipe = Recipe.of(space if space in registry.names("preset") else "default")
    of_space = {k: v for k, v in lm.reading.options.items() if k in recipe.record()}
    storage: Storage = mem.storage
    K = mem.vectors.shape[1]
    engine = Engine(
        lm,  # has the trigger of `mem` already, and trigger='bos' keeps it
        replace(recipe, space=space, start_rule=mem.header.start_rule, trigger="bos", **of_space),
        vectors=K,
        storage=storage,
        batch_size=min(len(passages), default_batch_size(lm, max(map(len, passages)), K)),
    )
    jobs = [Passage(tuple(ids), i) for i, ids in enumerate(passages)]
    crammed = {o.passage.document: o.vectors.float() for o in engine.run(jobs) if o.exact}
    return [crammed.get(i) for i in range(len(passages))]


def score_table(measured: Sequence[dict[str, Figures]], queries: int, tokens: int) -> ScoreTable:
    """Means and intervals over the passages; each context is averaged over the passages with it."""
    by_size = sorted(measured, key=len, reverse=True)  # contexts in the order of the longest row
    names = dict.fromkeys(name for row in by_size for name in row if name != FULL)
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
