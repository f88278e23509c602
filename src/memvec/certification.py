"""Measure and certify vectors that were changed after cramming."""

from __future__ import annotations

from collections.abc import Iterable

from memvec.certificate import certificate_of, measure
from memvec.errors import check_type
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
    """Measure and certify vectors again with this model; returns them with a new certificate.

    For vectors from `MemVectors.with_vectors`, such as rounded, averaged or noisy ones, or vectors
    that were trained elsewhere. `texts` are all texts that were crammed, in order; leave them out
    if the vectors still give them back. `force` accepts vectors of another model of the same width,
    such as the model before its fine-tuning. The costs of cramming are kept. A certificate of use
    is removed; `memvec.certify_use` measures a new one. Raises MemvecError as `memvec.measure` does
    and, without `texts`, NotExactError if a text is not exact.
    """
    check_type("mem", mem, MemVectors, "MemVectors.load")
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
