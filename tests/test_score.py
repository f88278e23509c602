"""`memvec.score`: bits of answers after vectors and other contexts, by the model's own forward."""

from __future__ import annotations

import math
from copy import copy

import pytest
import torch

import memvec
from conftest import reader
from memvec import Recipe
from memvec.errors import MemvecError

pytestmark = pytest.mark.usefixtures("few_words")
TEXTS = ["the cat sat on the mat", "a dog ran over the fox"]


@pytest.fixture(scope="module", params=["none", "bos"])
def usable(request):
    lm = reader("words")
    recipe = Recipe.of("usable", front=request.param, settle=10, decay=10, steps=500, query_count=4)
    mem = memvec.cram(lm, TEXTS, vectors=2, tokens=6, recipe=recipe)
    assert mem.exact
    assert mem.header.front == request.param
    return lm, mem


def slow(lm, inputs: list[torch.Tensor], words: list[int], n: int) -> tuple[float, bool]:
    """Bits of the last n tokens after inputs, and whether each is the arg-max, one at a time."""
    bits, greedy = 0.0, True
    for i in range(len(words) - n, len(words)):
        before = lm.embed(torch.tensor([words[:i]], dtype=torch.long))
        logits = lm.model(inputs_embeds=torch.cat([*inputs, before], 1)).logits[0, -1].double()
        bits -= float(logits.log_softmax(-1)[words[i]]) / math.log(2)
        greedy = greedy and int(logits.argmax()) == words[i]
    return bits, greedy


@pytest.mark.slow
@pytest.mark.parametrize("passages", [None, [1], [1, 0]])
@pytest.mark.parametrize("prompt", ["the dog", ""])
@torch.no_grad()
def test_answers_have_the_bits_of_the_models_own_forward(usable, passages, prompt):
    lm, mem = usable
    answers = [" ran", " sat on the", " cat"]
    numbers = [0, 1] if passages is None else passages
    ids = [token for i in numbers for token in mem.tokens(lm)[i]]
    bos = [] if lm.bos_id is None else [lm.embed(torch.tensor([[lm.bos_id]]))]
    front = bos if mem.header.front == "bos" else []
    after = {
        "vectors": [*front, *(mem.header.context_scale * mem.vectors[i][None] for i in numbers)],
        "text": [*bos, lm.embed(torch.tensor([ids]))],
        "nothing": bos,
        "last 4 tokens": [*bos, lm.embed(torch.tensor([ids[-4:]]))],
    }
    found = memvec.score(lm, mem, prompt, answers, passages=passages)
    assert {one.context for one in found} >= set(after)
    for one in found:
        words = lm.tokenize(prompt + one.answer)
        assert one.tokens == len(words) - len(lm.tokenize(prompt)) > 0
        if one.context in after:
            bits, greedy = slow(lm, after[one.context], words, one.tokens)
            assert one.bits == pytest.approx(bits, rel=1e-4)
            assert one.greedy == greedy
    written = memvec.use(lm, mem, "the dog", passages=passages, max_new_tokens=2)
    if lm.tokenize("the dog" + written)[:2] == lm.tokenize("the dog") and written.strip():
        (own, *_) = [
            one
            for one in memvec.score(lm, mem, "the dog", [written], passages=passages)
            if one.context == "vectors"
        ]
        assert own.greedy


@pytest.mark.slow
def test_the_text_must_fit_the_context_with_prompt_and_answer(usable):
    """The text is longer than its vectors, and BOS is in front of it."""
    lm, mem = usable
    small, words = copy(lm), len(lm.tokenize("the dog ran"))
    small.context = 1 + sum(record.tokens for record in mem.passages) + words
    assert memvec.score(small, mem, "the dog", [" ran"])
    small.context -= 1
    with pytest.raises(MemvecError, match=f"an answer of {words} tokens do not fit the con"):
        memvec.score(small, mem, "the dog", [" ran"])


@pytest.mark.slow
def test_answers_that_cannot_be_scored_are_refused(usable):
    lm, mem = usable
    for answers in ([], "yes"):
        with pytest.raises(MemvecError, match="answers is a list of at least one text"):
            memvec.score(lm, mem, "the", answers)
    with pytest.raises(MemvecError, match="has no token after the prompt"):
        memvec.score(lm, mem, "the", [" cat", ""])
    with pytest.raises(MemvecError, match="do not fit the context"):
        memvec.score(lm, mem, "the" + " cat" * 200, [" dog"])
    plain = memvec.cram(lm, TEXTS, vectors=2, tokens=6)
    with pytest.raises(MemvecError, match="have no trigger"):
        memvec.score(lm, plain, "the", [" cat"])
