"""What the model that has read the text says at each position of a query, computed once and kept.

Of each distribution the `top` most likely tokens are kept and the mass of all others together. The
divergence of another distribution from it is taken over these top + 1 outcomes, which is a lower
bound of the divergence over all V tokens, and equal to it for top >= V - 1.
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

SMALLEST_MASS = 1e-7  # of what is outside the kept tokens, so that its logarithm is finite


class Said(NamedTuple):
    """What a model says at some positions: its n likeliest tokens, and the rest."""

    top: Int[Tensor, "*shape n"]  # token ids
    log_p: Float[Tensor, "*shape n"]  # their log-probabilities, nats
    log_rest: Float[Tensor, "*shape"]  # log of the mass of all others, nats


@dataclass
class Beside(Rows):
    """Who stands beside the passages in each of M queries (memvec.usable.neighbours), n at most."""

    which: Int[Tensor, "B M n"]  # neighbours, in their order, those in front first
    in_front: Int[Tensor, "B M"]  # how many stand in front of the passage
    count: Int[Tensor, "B M"]  # how many stand there at all


@dataclass
class Teacher(Rows):
    """The kept distributions of M queries of each of B passages, at L positions, n tokens each."""

    queries: Int[Tensor, "B M L"]
    length: Int[Tensor, "B M"]  # tokens of each query
    top: Int[Tensor, "B M L n"]  # token ids
    log_p: Float[Tensor, "B M L n"]  # their log-probabilities, nats
    log_rest: Float[Tensor, "B M L"]  # log of the mass of all others, nats
    beside: Beside
    weight: Float[Tensor, " B"]  # of the term, in multiples of the recipe's


@torch.no_grad()
def said_behind(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], queries: Int[Tensor, "M L"], top: int
) -> Said:
    """What the model says behind some inputs (the text) at each token of the queries."""
    n, L = min(top, lm.vocab_size - 1), queries.shape[1]
    at_once = max(1, memory.LOGITS_AT_ONCE // (lm.vocab_size * L))
    found: list[Said] = []
    for at in range(0, len(queries), at_once):
        rows = queries[at : at + at_once].to(lm.device)
        states = states_behind(lm, inputs.expand(len(rows), -1, -1), rows)
        found.append(likeliest(lm.head(states), n))
    return Said(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def states_behind(
    lm: FrozenLM, inputs: Float[Tensor, "B N D"], ids: Int[Tensor, "B L"]
) -> Float[Tensor, "B L H"]:
    """States that predict each token of `ids` behind some inputs."""
    behind = torch.cat([inputs.to(lm.dtype), lm.embed(ids[:, :-1])], 1)
    return lm.states_of(behind, keep=ids.shape[1])


def log_p_behind(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], ids: Int[Tensor, "M L"]
) -> Float[Tensor, "M L V"]:
    """Log-probabilities of the whole vocabulary at each token of `ids`, all behind one input."""
    return lm.head(states_behind(lm, inputs.expand(len(ids), -1, -1), ids)).log_softmax(-1)


def divergence(
    logits: Float[Tensor, "*shape V"],
    top: Int[Tensor, "*shape n"],
    log_p: Float[Tensor, "*shape n"],
    log_rest: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """KL(kept distribution || softmax of the logits) at each position, nats."""
    log_q = logits.log_softmax(-1)
    log_top = log_q.gather(-1, top.long())
    rest = (1 - log_top.exp().sum(-1)).clamp_min(SMALLEST_MASS)
    p_rest = log_rest.exp()
    return (log_p.exp() * (log_p - log_top)).sum(-1) + p_rest * (log_rest - rest.log())


def divergence_at(
    head: Head,
    states: Float[Tensor, "B L H"],
    kept: tuple[Int[Tensor, "B L n"], Float[Tensor, "B L n"], Float[Tensor, "B L"]],
    share: Float[Tensor, "B L"],
    *,
    V: int,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B L H"]]:
    """Divergence of each passage, nats, and its gradient at the states.

    `kept` is (top, log_p, log_rest) of a Teacher, `share` the weight of each position. Logits over
    the vocabulary exist for a few rows at a time.
    """
    B, L, H = states.shape
    flat = states.reshape(B * L, H)
    top, log_p, log_rest = (part.reshape(B * L, *part.shape[2:]) for part in kept)
    weight = share.reshape(-1)
    losses, gradient = flat.new_empty(B * L, dtype=torch.float32), torch.empty_like(flat)
    rows = max(1, memory.LOGITS_AT_ONCE // V)

    def chunk(here: slice) -> None:
        with torch.enable_grad():
            part = flat[here].requires_grad_()
            each = divergence(head(part).float(), top[here], log_p[here], log_rest[here])
            each = each * weight[here]
            (gradient[here],) = torch.autograd.grad(each.sum(), part)
        losses[here] = each.detach()

    for at in range(0, B * L, rows):
        chunk(slice(at, at + rows))
    return losses.reshape(B, L).sum(-1), gradient.reshape(B, L, H)


def answer_positions(length: Int[Tensor, " B"], columns: int) -> Bool[Tensor, "B L"]:
    """Positions that a query has."""
    return torch.arange(columns, device=length.device) < length[:, None]


def nobody(M: int, device: torch.device) -> Beside:
    """No neighbours in M queries of one passage."""
    none = torch.zeros(1, M, dtype=torch.long, device=device)
    return Beside(none[..., None][..., :0], none, none)


def joined(teachers: Sequence[Teacher]) -> Teacher:
    """The rows of several teachers, one behind the other."""
    first = teachers[0]
    for other in teachers[1:]:
        first = first.joined(other)
    return first


def likeliest(logits: Float[Tensor, "*shape V"], n: int) -> Said:
    """The n likeliest tokens, and what is left for all others."""
    log_p = logits.log_softmax(-1)
    values, ids = log_p.topk(n, dim=-1)
    rest = (1 - values.exp().sum(-1)).clamp_min(SMALLEST_MASS)
    return Said(ids.int(), values, rest.log())
