"""The teacher: the model's predictions at each position of a query, after the text.

They are computed once for a passage. Of each distribution, the `top` likeliest tokens and the total
probability of all others are kept. The KL divergence is computed over these top + 1 outcomes. It is
a lower bound of the divergence over all V tokens, and equal to it for top >= V - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.rows import Rows
from memvec.model import memory
from memvec.model.heads import Head
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule

SMALLEST_MASS = 1e-7  # minimum of the others' total probability, so that its logarithm is finite


class TopTokens(NamedTuple):
    """The n likeliest tokens at some positions, and the total probability of all others."""

    top: Int[Tensor, "*shape n"]  # token ids
    log_p: Float[Tensor, "*shape n"]  # their log-probabilities, nats
    log_others: Float[Tensor, "*shape"]  # log of the others' total probability, nats


@dataclass
class NeighbourPlaces(Rows):
    """The neighbours of each passage in each of M queries (memvec.usable.neighbours), at most n."""

    neighbours: Int[Tensor, "B M n"]  # indices in reading order
    in_front: Int[Tensor, "B M"]  # number of neighbours in front of the passage
    count: Int[Tensor, "B M"]  # total number of neighbours


@dataclass
class Teacher(Rows):
    """The kept distributions of M queries of each of B passages, at L positions, n tokens each."""

    queries: Int[Tensor, "B M L"]
    length: Int[Tensor, "B M"]  # tokens of each query
    top: Int[Tensor, "B M L n"]  # token ids
    log_p: Float[Tensor, "B M L n"]  # their log-probabilities, nats
    log_others: Float[Tensor, "B M L"]  # log of the others' total probability, nats
    beside: NeighbourPlaces
    weight: Float[Tensor, " B"]  # weight of the term, in multiples of the recipe's


@torch.no_grad()
def top_tokens_after(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], queries: Int[Tensor, "M L"], top: int
) -> TopTokens:
    """The model's likeliest tokens at each position of the queries, after `inputs` (the text)."""
    n, L = min(top, lm.vocab_size - 1), queries.shape[1]
    at_once = max(1, memory.LOGITS_AT_ONCE // (lm.vocab_size * L))
    chunks: list[TopTokens] = []
    for at in range(0, len(queries), at_once):
        rows = queries[at : at + at_once].to(lm.device)
        states = states_after(lm, inputs.expand(len(rows), -1, -1), rows)
        chunks.append(likeliest(lm.head(states), n))
    return TopTokens(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def states_after(
    lm: FrozenLM, inputs: Float[Tensor, "B N D"], ids: Int[Tensor, "B L"]
) -> Float[Tensor, "B L H"]:
    """Hidden states that predict each token of `ids` after `inputs`."""
    after = torch.cat([inputs.to(lm.dtype), lm.embed(ids[:, :-1])], 1)
    return lm.states_of(after, keep=ids.shape[1])


def states_as_context(
    lm: FrozenLM, vectors: Float[Tensor, "B K W"], ids: Int[Tensor, "B L"]
) -> Float[Tensor, "B N H"]:
    """Hidden states that predict `ids` directly after the vectors, in context mode.

    `ids` are L tokens other than the passage's. N = L, or L - 1 if the vectors predict no
    token, since the first one is then given. The vectors are multiplied by `context_scale`.
    """
    rule: StartRule = "vectors" if lm.reading.predicts else "first-token"
    return lm.reading.states(lm, lm.context_scale * vectors, ids, rule)


def log_p_after(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], ids: Int[Tensor, "M L"], last: int | None = None
) -> Float[Tensor, "M n V"]:
    """Log-probabilities (nats) at the `last` tokens of `ids` (None: all L).

    All rows are read after the same inputs. Logits are computed at these tokens only.
    """
    states = states_after(lm, inputs.expand(len(ids), -1, -1), ids)
    return lm.head(states[:, -(last or ids.shape[1]) :]).log_softmax(-1)


def divergence(
    logits: Float[Tensor, "*shape V"],
    top: Int[Tensor, "*shape n"],
    log_p: Float[Tensor, "*shape n"],
    log_others: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """KL(kept distribution || softmax of the logits) at each position over n + 1 outcomes, nats."""
    log_q = logits.log_softmax(-1)
    log_top = log_q.gather(-1, top.long())
    others = (1 - log_top.exp().sum(-1)).clamp_min(SMALLEST_MASS)
    p_others = log_others.exp()
    return (log_p.exp() * (log_p - log_top)).sum(-1) + p_others * (log_others - others.log())


def divergence_at(
    head: Head,
    states: Float[Tensor, "B L H"],
    teacher: TopTokens,
    share: Float[Tensor, "B L"],
    *,
    V: int,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B L H"]]:
    """The divergence of each passage (nats), and its gradient at the states.

    The tensors of `teacher` have shape (B, L, n); `share` is the weight of each position. Logits
    are computed for a few rows at a time.
    """
    B, L, H = states.shape
    flat = states.reshape(B * L, H)
    top, log_p, log_others = (part.reshape(B * L, *part.shape[2:]) for part in teacher)
    weight = share.reshape(-1)
    losses, gradient = flat.new_empty(B * L, dtype=torch.float32), torch.empty_like(flat)
    rows = max(1, memory.LOGITS_AT_ONCE // V)

    def chunk(span: slice) -> None:
        with torch.enable_grad():
            part = flat[span].requires_grad_()
            loss = divergence(head(part).float(), top[span], log_p[span], log_others[span])
            loss = loss * weight[span]
            (gradient[span],) = torch.autograd.grad(loss.sum(), part)
        losses[span] = loss.detach()

    for at in range(0, B * L, rows):
        chunk(slice(at, at + rows))
    return losses.reshape(B, L).sum(-1), gradient.reshape(B, L, H)


def answer_positions(length: Int[Tensor, " B"], columns: int) -> Bool[Tensor, "B L"]:
    """True at the positions of each query, False at its padding (L = `columns`)."""
    return torch.arange(columns, device=length.device) < length[:, None]


def no_neighbours(M: int, device: torch.device) -> NeighbourPlaces:
    """The places of a passage without neighbours, in M queries."""
    none = torch.zeros(1, M, dtype=torch.long, device=device)
    return NeighbourPlaces(none[..., None][..., :0], none, none)


def joined(teachers: Sequence[Teacher]) -> Teacher:
    """The rows of several teachers, one after the other."""
    rows = teachers[0]
    for teacher in teachers[1:]:
        rows = rows.joined(teacher)
    return rows


def likeliest(logits: Float[Tensor, "*shape V"], n: int) -> TopTokens:
    """The n likeliest tokens of each distribution, and the total probability of all others."""
    log_p = logits.log_softmax(-1)
    values, ids = log_p.topk(n, dim=-1)
    others = (1 - values.exp().sum(-1)).clamp_min(SMALLEST_MASS)
    return TopTokens(ids.int(), values, others.log())
