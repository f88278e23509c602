"""Answers of your own after vectors: how probable each is, beside other contexts.

For data that is (context, question, answers), without a harness: cram the contexts, then compare
what the model thinks of the answers after the vectors, the text itself, its end, and nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memvec.companions.around import as_context_at
from memvec.errors import MemvecError, check_type
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.usable.contexts import contexts_of
from memvec.usable.generate import (
    as_files,
    check_room,
    in_a_row,
    passage_numbers,
    tokens_in_a_row,
)
from memvec.vectors import MemVectors


@dataclass(frozen=True)
class AnswerScore:
    """An answer after a context and the prompt."""

    context: str  # 'vectors', 'text', 'nothing' or 'last n tokens' (of the text)
    answer: str
    bits: float  # -log2 of the answer's probability, the sum over its tokens
    tokens: int
    greedy: bool  # the model would write it: each token is the likeliest one


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
    """How probable each answer is after the prompt and each context, answer by answer.

    Contexts are those of the certificate of use: the text, nothing, its last K, 2 K, 4 K and 8 K
    tokens (K vectors stand for it; no more than it has) and the vectors. Files, `passages` and
    `force` are those of `memvec.use`. A prompt and an answer are read as one text; tokens that
    begin in the prompt are its own. Raises MemvecError as `memvec.use`, and for no answer, an
    answer without a token, or no prompt where the vectors predict nothing by themselves;
    NotExactError if the text does not come back from its vectors.
    """
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    if isinstance(answers, str) or not answers:
        raise MemvecError("answers is a list of at least one text, such as [' yes', ' no'].")
    numbers = passage_numbers(passages)
    files = as_files(mem, numbers)
    view, rows = in_a_row(lm, files, numbers, force=force)
    ids = tokens_in_a_row(lm, files, numbers, force=force)
    # The rows are scaled already.
    contexts = contexts_of(as_context_at(view, 1.0), rows[0], ids, None)
    before = lm.tokenize(prompt)
    if not before and not view.reading.predicts:
        raise MemvecError(
            f"vectors in the space '{view.reading.space}' predict nothing by themselves: give a "
            "prompt."
        )
    scores = []
    for answer in answers:
        words = lm.tokenize(prompt + answer)
        n = len(words) - len(before)
        if n < 1:
            raise MemvecError(f"the answer {answer!r:.60} has no token after the prompt.")
        inputs = max(len(ids) + 1, len(view.front) + rows.shape[1])
        check_room(lm, inputs, len(words), "use fewer passages, or a shorter prompt or answer")
        table = torch.tensor([words], device=lm.device)
        for name, context in contexts.items():
            log_p = context(table)[0, -n:]
            right = table[0, -n:]
            bits = -float(log_p.gather(-1, right[:, None]).sum()) / math.log(2)
            greedy = bool((log_p.argmax(-1) == right).all())
            scores.append(AnswerScore(name, answer, bits, n, greedy))
    return scores
