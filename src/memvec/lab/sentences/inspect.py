"""The sentences of a text: what each latent decodes to, and what its prediction decodes to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.errors import MemvecError, check_minimum
from memvec.lab.sentences import latents
from memvec.lab.sentences.cutting import Sentence, cut_sentences, need_two
from memvec.lab.sentences.evaluate import bits_after, bits_after_text, fitting
from memvec.lab.sentences.latents import Latents
from memvec.lab.sentences.model import LatentModel
from memvec.model.lm import FrozenLM


@dataclass(frozen=True)
class Shown:
    """One sentence of the text.

    Bits per token of the true sentence: `alone` after a start token, `text` after the text of the
    sentences that the latent model read, `predicted` after its prediction, and `discretised`
    after the prediction, written and encoded again.
    """

    number: int
    sentence: str
    tokens: int
    whole: bool  # False for a part of a longer sentence
    exact: bool  # its latent decodes to the same tokens
    decoded: str  # text that its latent decodes to, with as many tokens
    predicted: str  # text that the predicted latent decodes to
    alone: float
    text: float
    predicted_bits: float
    discretised_bits: float

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def look(
    lm: FrozenLM,
    model: LatentModel,
    text: str,
    *,
    name: str = "the text",
    count: int = 20,
    recipe: Recipe | None = None,
) -> Iterator[Shown]:
    """The first `count` sentences of a text; their latents are crammed by `recipe` if given.

    Raises MemvecError for a text of fewer than two sentences, and for a model without a BOS token.
    """
    check_minimum(2, count=count)
    sentences = cut_sentences(lm, text, model.max_tokens, count)
    need_two(sentences, name)
    if lm.bos_id is None:
        raise MemvecError(f"{lm.name} has no BOS token, so nothing stands before a first sentence.")
    ids = [s.ids for s in sentences]
    if recipe is None:
        known = latents.encoded(lm, ids, model.vectors)
    else:
        known = latents.crammed(lm, ids, model.vectors, recipe)
    for i, sentence in enumerate(sentences):
        yield _inspected(lm, model, i, sentences, known, sentence)


def _inspected(
    lm: FrozenLM,
    model: LatentModel,
    i: int,
    sentences: Sequence[Sentence],
    known: Latents,
    sentence: Sentence,
) -> Shown:
    ids, n = sentence.ids, len(sentence.ids)
    before = [s.ids for s in sentences[max(0, i - model.window + 1) : i]]
    ((step,),) = model.discretised(lm, [known.vectors[:i]], [1])
    (decoded,) = decode_ids(lm, known.vectors[i : i + 1], [n])
    text = fitting(lm, tuple(itertools.chain(*before)), n)
    return Shown(
        number=i + 1,
        sentence=lm.text(ids).strip(),
        tokens=n,
        whole=sentence.whole,
        exact=known.exact[i],
        decoded=lm.text(decoded).strip(),
        predicted=lm.text(step.ids).strip(),
        alone=bits_after_text(lm, (), ids) / n,
        text=bits_after_text(lm, text, ids) / n,
        predicted_bits=bits_after(lm, step.predicted, ids) / n,
        discretised_bits=bits_after(lm, step.again, ids) / n,
    )
