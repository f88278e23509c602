"""Contexts in the place of a text, and the KL and NLL of queries after each of them.

Contexts are the text itself, nothing, the last tokens of the text, and vectors. The model predicts
the same queries after each context, and is compared with the model after the text. The certificate
of use (memvec.usable.certificate) computes the means.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.companions.around import as_context_at
from memvec.model.lm import FrozenLM
from memvec.model.memory import in_batches
from memvec.usable.queries import text_inputs
from memvec.usable.teacher import log_p_after, states_as_context

FULL, NONE, VECTORS, EXACT_ONLY = "text", "nothing", "vectors", "exact-only vectors"
LAST_PASSAGE = "vectors of the last passage"

# The model's predictions after a context: queries (M, L), last -> log-probabilities (M, n, V) at
# their `last` tokens. `last` is at most L, or L - 1 if the first token is given.
Predictions = Callable[[Int[Tensor, "M L"], int], Float[Tensor, "M n V"]]
Contexts = dict[str, Predictions]


class Figures(NamedTuple):
    """KL and NLL of one passage's queries after one context: means over tokens, nats."""

    kl: float
    nll: float


def contexts_of(
    lm: FrozenLM, vectors: Float[Tensor, "K D"], ids: Sequence[int], exact_only: Tensor | None
) -> Contexts:
    """The contexts of a passage by name; its text (token ids) is the first.

    The others are nothing, the last tokens of the text, `exact_only` vectors if given, and
    `vectors`.
    """
    K = len(vectors)
    ends = {f"last {n} tokens": ids[-n:] for n in (K, 2 * K, 4 * K, 8 * K) if n < len(ids)}
    contexts: Contexts = {
        name: functools.partial(_after_text, lm, text)
        for name, text in ({FULL: ids, NONE: ()} | ends).items()
    }
    if exact_only is not None:
        unscaled = as_context_at(lm, 1.0)  # exact-only vectors were crammed without a scale
        contexts[EXACT_ONLY] = functools.partial(_after_vectors, unscaled, exact_only)
    contexts[VECTORS] = functools.partial(_after_vectors, lm, vectors)
    return contexts


def contexts_of_row(lm: FrozenLM, vectors: Float[Tensor, "n K D"], ids: Sequence[int]) -> Contexts:
    """The contexts of a text of n passages, whose vectors are read in a row.

    If n is above 1, the vectors of the last passage alone are a further context.
    """
    contexts = contexts_of(lm, vectors.flatten(0, 1), ids, None)
    if len(vectors) > 1:
        contexts[LAST_PASSAGE] = functools.partial(_after_vectors, lm, vectors[-1])
    return contexts


def _after_text(
    lm: FrozenLM, ids: Sequence[int], queries: Int[Tensor, "M L"], last: int
) -> Float[Tensor, "M n V"]:
    return log_p_after(lm, text_inputs(lm, ids), queries, last)


def _after_vectors(
    lm: FrozenLM, vectors: Float[Tensor, "K W"], queries: Int[Tensor, "M L"], last: int
) -> Float[Tensor, "M n V"]:
    rows = vectors.to(lm.device).expand(len(queries), -1, -1)
    return lm.head(states_as_context(lm, rows, queries)[:, -last:]).log_softmax(-1)


@torch.no_grad()
def after_each(lm: FrozenLM, contexts: Contexts, queries: Int[Tensor, "M L"]) -> dict[str, Figures]:
    """KL from the first context (the text), and NLL of the queries, after each context by name.

    `lm` is the view that reads the vectors (`MemVectors.view`), as in `contexts_of`.
    """
    queries = queries.to(lm.device)
    M, last = len(queries), queries.shape[1] - int(not lm.reading.predicts)
    reference: Tensor | None = None
    figures = {}
    for name, context in contexts.items():
        log_q = torch.stack(in_batches(functools.partial(_rows_of, context, queries, last), M, M))
        nll = -log_q.gather(-1, queries[:, -last:, None]).mean()
        reference = log_q if reference is None else reference
        kl = (reference.exp() * (reference - log_q)).sum(-1).mean()
        figures[name] = Figures(float(kl), float(nll))
    return figures


def _rows_of(
    context: Predictions, queries: Int[Tensor, "M L"], last: int, rows: slice
) -> list[Tensor]:
    """The predictions of a context (n, V) for each of some rows of the queries."""
    return list(context(queries[rows], last))
