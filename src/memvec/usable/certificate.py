"""The certificate of use: how well vectors stand for the text as context, beside other contexts.

For each passage, the model that has read the whole text is the reference. Behind each context (the
vectors; nothing; the last K, 2 K, 4 K and 8 K tokens of the text; vectors that were crammed to be
exact only) it reads the same words, and two figures say how far it is from the reference:

    KL     mean over tokens of KL(model behind the text || model behind the context), nats, over all
           V tokens
    kept   (NLL without context - NLL behind the context) / (NLL without - NLL with the text): the
           share of what the text tells about the words that follow; 0 no context, 1 the whole text

The words (tokens) are queries that cramming never saw: continuations of the text, sampled with
another seed, and the true continuation of a passage, where the document goes on behind it.

Texts of several passages are measured as a whole, too: their vectors one behind the other, as
`memvec.use` has them, beside the whole text. Each passage was crammed to stand alone, so a row of
them is a worse context than its parts (docs/usable.md).

Vectors that predict nothing (keys and values, memvec.spaces) have the first word given, which is
then left out for every context.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from memvec import registry, statistics
from memvec.companions.around import as_context_at
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, check_type
from memvec.machine import environment, plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.results import Record
from memvec.storage import Storage
from memvec.usable.queries import continuations, text_inputs
from memvec.usable.teacher import log_p_behind, states_as_context
from memvec.vectors import MemVectors

PASSAGES = 32  # at most so many passages are measured, evenly spread over the file
QUERIES = 4  # held-out continuations of each passage
TOKENS = 48  # of each, and of the true continuation; fewer where the context holds no more
SEED = 7919  # added to the recipe's: other continuations than cramming saw
ROWS = 8  # at most so many texts of several passages are measured whole
FULL, NONE, VECTORS, EXACT_ONLY = "text", "nothing", "vectors", "exact-only vectors"
LAST_PASSAGE = "vectors of the last passage"

# A model's predictions behind a context: words (M, L) -> log-probabilities (M, n, V) of all n = L
# words, or of all but the first.
Context = Callable[[Int[Tensor, "M L"]], Float[Tensor, "M n V"]]
Contexts = dict[str, Context]


class ContextScore(Record):
    """How well one context stands for the text; 95 % bootstrap intervals (NaN for one passage)."""

    kl: float = Field(description="KL from the model behind the text, nats per token")
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

    trigger: str = Field(description="what the passage comes behind: 'bos', an id, or 'crammed'")
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


class Figures(NamedTuple):
    """KL and NLL of one passage behind one context, means over its queries, nats per token."""

    kl: float
    nll: float


@plain_torch()
def certify_use(
    lm: FrozenLM,
    mem: MemVectors,
    passages: Sequence[Sequence[int]] | None = None,
    *,
    exact_only: bool = True,
) -> UseCertificate:
    """Measure how well vectors stand for their texts as context.

    `passages` are the token ids of every passage, decoded and checked if they are not given (raises
    as `MemVectors.tokens`). `exact_only=False` leaves out the control that has to be crammed.
    Raises MemvecError for vectors of another width, vectors that nothing can be read behind
    (one-step, start rule 'vectors'), or passages too long for a query in the model's context.
    """
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    check_usable(mem)
    mem.check_model(lm, force=True)  # `tokens` compares the weights, too
    view = mem.view(lm)
    ids = passages if passages is not None else mem.tokens(lm)
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
        behind_each(view, behind, continuations(view, ids[i], recipe)[0])
        for behind, i in zip(contexts, chosen, strict=True)
    ]
    following, token = _following(mem, ids, tokens), mem.header.trigger
    true = [
        behind_each(view, behind, torch.tensor([following[i]]))
        for behind, i in zip(contexts, chosen, strict=True)
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
    """Raise MemvecError if nothing but their passage can be read behind vectors (`subject`)."""
    check_type("mem", mem, MemVectors, "MemVectors.load")
    if mem.header.layout != "prefix" or mem.header.start_rule == "vectors":
        raise MemvecError(
            f"{subject} have no trigger, so whatever follows them is taken for their passage: "
            "cram the text with --usable."
        )


def _spread(n: int, limit: int) -> list[int]:
    return list(range(n)) if n <= limit else sorted({n * i // limit for i in range(limit)})


def _room(lm: FrozenLM, mem: MemVectors, passages: Sequence[Sequence[int]]) -> int:
    """Tokens of a query behind the longest of the passages, TOKENS at most."""
    text = int(lm.bos_id is not None) + max(map(len, passages))
    vectors = len(lm.front) + mem.vectors.shape[1] + int(lm.reading.space != "inputs")
    # The last token of a query is not read.
    room = TOKENS if lm.context is None else lm.context - max(text, vectors) + 1
    if room < 2:
        raise MemvecError(
            f"a passage of {max(map(len, passages))} tokens leaves no room for a query in the "
            f"context of {lm.name} ({lm.context}): cram it with fewer --tokens."
        )
    return min(TOKENS, room)


def _following(
    mem: MemVectors, passages: Sequence[Sequence[int]], tokens: int
) -> dict[int, Sequence[int]]:
    """So many tokens behind each passage, where its document has them."""
    following: dict[int, Sequence[int]] = {}
    at = 0
    for document in mem.header.documents:
        end = at + document.passages
        for i in range(at, end):
            later = (t for j in range(i + 1, end) for t in passages[j])
            behind = list(itertools.islice(later, tokens))
            if len(behind) == tokens:
                following[i] = behind
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
        measured.append(behind_each(lm, contexts, continuations(lm, text, recipe)[0]))
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
    storage: Storage = mem.storage
    engine = Engine(
        lm,  # which has the trigger already: 'bos' leaves it as it is
        replace(recipe, space=space, start_rule=mem.header.start_rule, trigger="bos"),
        vectors=mem.vectors.shape[1],
        storage=storage,
        batch_size=min(32, len(passages)),
    )
    jobs = [Passage(tuple(ids), i) for i, ids in enumerate(passages)]
    crammed = {o.passage.document: o.vectors.float() for o in engine.run(jobs) if o.exact}
    return [crammed.get(i) for i in range(len(passages))]


def contexts_of(
    lm: FrozenLM, vectors: Float[Tensor, "K D"], ids: Sequence[int], exact_only: Tensor | None
) -> Contexts:
    """The text, nothing, ends of the text, exact-only vectors if there are any, and the vectors."""
    K = len(vectors)
    ends = {f"last {n} tokens": ids[-n:] for n in (K, 2 * K, 4 * K, 8 * K) if n < len(ids)}
    contexts: Contexts = {
        name: functools.partial(_behind_text, lm, text)
        for name, text in ({FULL: ids, NONE: ()} | ends).items()
    }
    if exact_only is not None:
        plain = as_context_at(lm, 1.0)  # a control is read as it was crammed
        contexts[EXACT_ONLY] = functools.partial(_behind_vectors, plain, exact_only)
    contexts[VECTORS] = functools.partial(_behind_vectors, lm, vectors)
    return contexts


def contexts_of_row(lm: FrozenLM, vectors: Float[Tensor, "n K D"], ids: Sequence[int]) -> Contexts:
    """The same of a text of n passages whose vectors stand one behind the other; where there are
    several, also the vectors of the last one alone."""
    contexts = contexts_of(lm, vectors.flatten(0, 1), ids, None)
    if len(vectors) > 1:
        contexts[LAST_PASSAGE] = functools.partial(_behind_vectors, lm, vectors[-1])
    return contexts


def _behind_text(
    lm: FrozenLM, ids: Sequence[int], words: Int[Tensor, "M L"]
) -> Float[Tensor, "M n V"]:
    log_p = log_p_behind(lm, text_inputs(lm, ids), words)
    return log_p[:, int(not lm.reading.predicts) :]


def _behind_vectors(
    lm: FrozenLM, vectors: Float[Tensor, "K W"], words: Int[Tensor, "M L"]
) -> Float[Tensor, "M n V"]:
    rows = vectors.to(lm.device).expand(len(words), -1, -1)
    return lm.head(states_as_context(lm, rows, words)).log_softmax(-1)


@torch.no_grad()
def behind_each(lm: FrozenLM, contexts: Contexts, words: Int[Tensor, "M L"]) -> dict[str, Figures]:
    """KL from the first context (the text) and NLL of the words behind each context.

    `lm` reads vectors in the space that they are in (`MemVectors.view`), here and in `contexts_of`.
    """
    words = words.to(lm.device)
    reference: Tensor | None = None
    figures = {}
    for name, context in contexts.items():
        log_q = context(words)
        nll = -log_q.gather(-1, words[:, -log_q.shape[1] :, None]).mean()
        reference = log_q if reference is None else reference
        kl = (reference.exp() * (reference - log_q)).sum(-1).mean()
        figures[name] = Figures(float(kl), float(nll))
    return figures


def score_table(measured: Sequence[dict[str, Figures]], queries: int, tokens: int) -> ScoreTable:
    """Means and intervals over the passages; a context that a passage lacks is left out there."""
    fullest = sorted(measured, key=len, reverse=True)  # the order in which contexts are shown
    names = dict.fromkeys(name for row in fullest for name in row if name != FULL)
    gain = [row[NONE].nll - row[FULL].nll for row in measured]
    scores = {}
    for name in names:
        rows = [(row[name], row, g) for row, g in zip(measured, gain, strict=True) if name in row]
        kls = [behind.kl for behind, *_ in rows]
        kl = statistics.bootstrap_mean(kls)
        gained = [row[NONE].nll - behind.nll for behind, row, _ in rows]
        kept = statistics.ratio_of_means(gained, [g for *_, g in rows])
        over = statistics.ratio_of_means(kls, [row[VECTORS].kl for _, row, _ in rows])
        scores[name] = ContextScore(
            kl=kl.value,
            kl_interval=(kl.low, kl.high),
            nll=sum(behind.nll for behind, *_ in rows) / len(rows),
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
