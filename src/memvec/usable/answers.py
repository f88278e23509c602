"""Answers after contexts: their log-likelihoods, and generation up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.model.lm import FrozenLM
from memvec.usable.columns import Ids
from memvec.usable.generate import check_room, write_after

SHORTER = "use fewer examples, or another column"


class Likelihood(NamedTuple):
    """The log-likelihood of an answer (nats), and whether greedy decoding generates it."""

    value: float
    greedy: bool


class EmbeddedRequest(NamedTuple):
    """A request whose context is given as inputs; question and answer are token ids."""

    inputs: Float[Tensor, "1 N D"]
    question: Ids
    answer: Ids


@torch.no_grad()
def likelihoods(
    lm: FrozenLM, requests: Sequence[EmbeddedRequest], batch_size: int = 1
) -> list[Likelihood]:
    """The likelihood of each answer after its context and question.

    `batch_size` is the number of forward passes in a batch. Answers that differ only in their last
    token, such as the letters of a multiple choice, share a pass. Raises MemvecError if a request
    does not fit the model's context.
    """
    shared: dict[tuple[int, Ids, int, Ids], list[int]] = {}
    for i, request in enumerate(requests):
        check_room(
            lm, request.inputs.shape[1] + len(request.question), len(request.answer), SHORTER
        )
        key = (id(request.inputs), request.question, len(request.answer), request.answer[:-1])
        shared.setdefault(key, []).append(i)
    groups = sorted(shared.values(), key=lambda group: -_length(requests[group[0]]))
    out: dict[int, Likelihood] = {}
    for at in range(0, len(groups), batch_size):
        out |= _batch(lm, requests, groups[at : at + batch_size])
    return [out[i] for i in range(len(requests))]


def _length(request: EmbeddedRequest) -> int:
    """The number of inputs of the forward pass: all but the answer's last token."""
    return request.inputs.shape[1] + len(request.question) + max(0, len(request.answer) - 1)


def _batch(
    lm: FrozenLM, requests: Sequence[EmbeddedRequest], groups: list[list[int]]
) -> dict[int, Likelihood]:
    """The likelihoods by request index; the requests of a group have the same inputs."""
    first = [requests[group[0]] for group in groups]
    lengths = [_length(request) for request in first]
    width = max(lengths)
    inputs = torch.zeros(len(first), width, lm.width, dtype=lm.dtype, device=lm.device)
    for row, request, length in zip(inputs, first, lengths, strict=True):
        after = torch.tensor([[*request.question, *request.answer[:-1]]], device=lm.device).long()
        row[:length] = torch.cat([request.inputs.to(lm.dtype), lm.embed(after)], 1)[0]
    # Right padding needs no mask in a causal model.
    answers = [len(request.answer) for request in first]
    start = min(length - n for length, n in zip(lengths, answers, strict=True))
    states = lm.states_of(inputs, keep=width - start)
    out: dict[int, Likelihood] = {}
    for row, group, length, n in zip(states, groups, lengths, answers, strict=True):
        log_p = lm.head(row[length - n - start : length - start]).log_softmax(-1)  # (n, V)
        greedy = log_p.argmax(-1).tolist()
        for i in group:
            ids = torch.tensor(requests[i].answer, device=log_p.device).long()
            value = float(log_p.gather(-1, ids[:, None]).sum())
            out[i] = Likelihood(value, greedy == list(requests[i].answer))
    return out


def written(lm: FrozenLM, request: EmbeddedRequest, until: Sequence[str], **settings: Any) -> str:
    """The text that the model generates after a context and a question, up to the first of `until`.

    `settings` are passed to the model's `generate`; `max_new_tokens` is required. Raises
    MemvecError if inputs and new tokens do not fit the model's context, or if the model has no
    `generate`.
    """
    ids = torch.tensor([request.question], device=lm.device).long()
    inputs = torch.cat([request.inputs.to(lm.dtype), lm.embed(ids)], 1)
    check_room(lm, inputs.shape[1], int(settings["max_new_tokens"]), SHORTER)
    stops = [stop for stop in until if stop]

    def stopped(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        texts = [lm.text(row) for row in ids.tolist()]
        has_stop = [any(stop in text for stop in stops) for text in texts]
        return torch.tensor(has_stop, device=ids.device)

    text = write_after(lm, inputs, {**settings, "stopping_criteria": [stopped]})
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]
