"""Sampled: text the model itself generated, from its start token at temperature 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from memvec.errors import MemvecError
from memvec.passages.found import Found, rng
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


@torch.no_grad()
def sampled_passages(
    lm: FrozenLM, count: int, length: int, *, seed: int, temperature: float = 1.0
) -> Iterator[Found]:
    """`count` passages of `length` tokens, each drawn with its own seed, one whole forward a token.

    Special tokens are never drawn, so that a passage is text. Raises MemvecError for a model with
    nothing to start from.
    """
    if lm.bos_id is None:
        raise MemvecError(f"{lm.name} has no token that starts a text, so it cannot be sampled.")
    special = [lm.bos_id] if lm.tokenizer is None else sorted(lm.tokenizer.all_special_ids)
    banned = [i for i in special if i < lm.vocab_size]
    for number in range(count):
        seeded = rng("sampled", seed, number).getrandbits(62)
        generator = torch.Generator().manual_seed(seeded)
        ids: list[int] = []
        for _ in range(length):
            # Logits for one token past the known ones: the last id is a stand-in.
            table = torch.tensor([[*ids, 0]], device=lm.device)
            logits = lm.logits(None, table)[0, -1].cpu() / temperature
            logits[banned] = -torch.inf
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        yield Found(number, Passage(tuple(ids), number), f"sampled #{number}")
