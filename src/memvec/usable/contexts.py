"""What may stand for a text as context, and how far predictions after it are from the text's.

Contexts are the text itself, nothing, ends of the text, and vectors. After each, the model
predicts the same words, and is compared with the model that has read the whole text. The
certificate of use (memvec.usable.certificate) has the means.
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
from memvec.usable.queries import text_inputs
from memvec.usable.teacher import log_p_after, states_as_context

FULL, NONE, VECTORS, EXACT_ONLY = "text", "nothing", "vectors", "exact-only vectors"
LAST_PASSAGE = "vectors of the last passage"

# The model's predictions of words after a context: words (M, L) -> log-probabilities (M, n, V) of
# all n = L words, or of all but the first.
Predictions = Callable[[Int[Tensor, "M L"]], Float[Tensor, "M n V"]]
Contexts = dict[str, Predictions]


class Figures(NamedTuple):
    """KL and NLL of one passage after one context, means over its queries, nats per token."""

    kl: float
    nll: float


def contexts_of(
    lm: FrozenLM, vectors: Float[Tensor, "K D"], ids: Sequence[int], exact_only: Tensor | None
) -> Contexts:
    """The text, nothing, ends of the text, exact-only vectors if there are any, and the vectors."""
    K = len(vectors)
    ends = {f"last {n} tokens": ids[-n:] for n in (K, 2 * K, 4 * K, 8 * K) if n < len(ids)}
    contexts: Contexts = {
        name: functools.partial(_after_text, lm, text)
        for name, text in ({FULL: ids, NONE: ()} | ends).items()
    }
    if exact_only is not None:
        plain = as_context_at(lm, 1.0)  # a control is read as it was crammed
        contexts[EXACT_ONLY] = functools.partial(_after_vectors, plain, exact_only)
    contexts[VECTORS] = functools.partial(_after_vectors, lm, vectors)
    return contexts


def contexts_of_row(lm: FrozenLM, vectors: Float[Tensor, "n K D"], ids: Sequence[int]) -> Contexts:
    """The same of a text of n passages whose vectors stand one after the other; where there are
    several, also the vectors of the last one alone."""
    contexts = contexts_of(lm, vectors.flatten(0, 1), ids, None)
    if len(vectors) > 1:
        contexts[LAST_PASSAGE] = functools.partial(_after_vectors, lm, vectors[-1])
    return contexts


def _after_text(
    lm: FrozenLM, ids: Sequence[int], words: Int[Tensor, "M L"]
) -> Float[Tensor, "M n V"]:
    log_p = log_p_after(lm, text_inputs(lm, ids), words)
    return log_p[:, int(not lm.reading.predicts) :]


def _after_vectors(
    lm: FrozenLM, vectors: Float[Tensor, "K W"], words: Int[Tensor, "M L"]
) -> Float[Tensor, "M n V"]:
    rows = vectors.to(lm.device).expand(len(words), -1, -1)
    return lm.head(states_as_context(lm, rows, words)).log_softmax(-1)


@torch.no_grad()
def after_each(lm: FrozenLM, contexts: Contexts, words: Int[Tensor, "M L"]) -> dict[str, Figures]:
    """KL from the first context (the text) and NLL of the words after each context.

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
