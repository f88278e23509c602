"""The probability of given answers after vectors, compared with other contexts.

This is for data of the form (context, question, answers), without the evaluation harness: cram the
contexts, then compare the probabilities of answers after the vectors, the text, its last tokens,
and nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from memvec.companions.around import as_context_at
from memvec.errors import MemvecError, check_type
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.usable.contexts import contexts_of
from memvec.usable.generate import (
    SHORTER,
    as_files,
    check_prompt,
    check_room,
    in_a_row,
    passage_numbers,
    tokens_in_a_row,
)
from memvec.vectors import MemVectors


@dataclass(frozen=True)
class AnswerScore:
    """The score of an answer after a context and the prompt."""

    context: str  # 'vectors', 'text', 'nothing' or 'last n tokens' (of the text)
    answer: str
    bits: float  # -log2 of the answer's probability, the sum over its tokens
    tokens: int
    greedy: bool  # greedy decoding generates it: each token is the likeliest one


@plain_torch()
@torch.no_grad()
def score(
    lm: FrozenLM,
    mem: MemVectors | Sequence[MemVectors],
    prompt: str,
    answers: Sequence[str],
    *,
    passages: Sequence[int] | None = None,
    force: bool = False,
) -> list[AnswerScore]:
    """The scores of each answer after each context and the prompt, answer by answer.

    Contexts are those of the certificate of use: the text, nothing, its last K, 2 K, 4 K and 8 K
    tokens (for K vectors; only those shorter than the text) and the vectors. `mem`, `passages` and
    `force` are as in `memvec.use`. Prompt and answer are tokenized as one text; a token that begins
    in the prompt belongs to the prompt. Raises MemvecError as `memvec.use` does, for no answer, for
    an answer without a token, and for an empty prompt after vectors that predict nothing. Raises
    NotExactError if the text is not exact.
    """
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    check_prompt(prompt)
    answers = [] if isinstance(answers, str) or not isinstance(answers, Iterable) else list(answers)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise MemvecError("answers is a list of at least one text, such as [' yes', ' no'].")
    numbers = passage_numbers(passages)
    files = as_files(mem, numbers)
    view, rows = in_a_row(lm, files, numbers, force=force)
    ids = tokens_in_a_row(lm, files, numbers, force=force)
    # `in_a_row` has already multiplied the rows by their context scale.
    contexts = contexts_of(as_context_at(view, 1.0), rows[0], ids, None)
    before = lm.tokenize(prompt)
    if not before and not view.reading.predicts:
        raise MemvecError(
            f"vectors in the space '{view.reading.space}' predict nothing by themselves: give a "
            "prompt."
        )
    scores = []
    for answer in answers:
        ids_of_both = lm.tokenize(prompt + answer)
        n = len(ids_of_both) - len(before)
        if n < 1:
            raise MemvecError(f"the answer {answer!r:.60} has no token after the prompt.")
        inputs = max(len(ids) + 1, len(view.front) + rows.shape[1])
        check_room(lm, inputs, len(ids_of_both), SHORTER)
        table = torch.tensor([ids_of_both], device=lm.device)
        for name, context in contexts.items():
            log_p = context(table, n)[0]
            right = table[0, -n:]
            bits = -float(log_p.gather(-1, right[:, None]).sum()) / math.log(2)
            greedy = bool((log_p.argmax(-1) == right).all())
            scores.append(AnswerScore(name, answer, bits, n, greedy))
    return scores
