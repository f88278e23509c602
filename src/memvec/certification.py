"""Vectors that were changed by hand, measured and certified again."""

from __future__ import annotations

from collections.abc import Iterable

from memvec.certificate import certificate_of, measure
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.documents import Document
from memvec.vectors import MemVectors


@plain_torch()
def certify(
    lm: FrozenLM,
    mem: MemVectors,
    texts: str | bytes | Document | Iterable[str | bytes | Document] | None = None,
    *,
    force: bool = False,
) -> MemVectors:
    """The vectors with everything that the file says of them measured again, by this model.

    For vectors that were made by `MemVectors.with_vectors`: rounded, averaged, noisy, or trained
    elsewhere. `texts` are those that were crammed, whole and in order; they can be left out where
    the vectors still give them back. `force` takes the vectors of another model of that width (one
    that was tuned, say): the result is of `lm`. The costs of cramming stay; a certificate of use
    is left out (`memvec.certify_use` measures it). Raises MemvecError as `memvec.measure`, and
    NotExactError without texts if one does not come back.
    """
    if texts is None:
        decoded = mem.tokens(lm, force=force)
        texts = mem.restored(lm, decoded)
    else:
        decoded = mem.decode_passages(lm, force=force)
    results = measure(lm, mem, texts, force=force)
    passages = [
        record.model_copy(update=result.model_dump())
        for record, result in zip(mem.passages, results, strict=True)
    ]
    update = {"passages": passages, "model": lm.description(), "use": None}
    measured = MemVectors(mem.vectors, mem.header.model_copy(update=update), mem.soft)
    return measured.with_certificate(*certificate_of(lm, measured, decoded))
