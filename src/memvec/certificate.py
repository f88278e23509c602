"""Certificates, from decoding a whole file freely, and stored vectors that are measured again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from memvec.cramming.outcomes import Finished, outcomes_of
from memvec.decoding import BATCH
from memvec.errors import MemvecError, check_type
from memvec.machine import environment, plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.documents import Document, documents_of
from memvec.passages.passage import Passage, ids_hash
from memvec.results import PassageResult
from memvec.vectors import MemVectors

COSTS = {"steps", "spent", "seconds"}  # fields of a record that are not measured again


def verify(
    lm: FrozenLM, mem: MemVectors, *, force: bool = False
) -> tuple[dict[str, Any], list[bool]]:
    """Decode all passages freely; returns a certificate, and for each passage whether it is exact.

    This compares the hashes of token ids; `memvec.decode` compares those of the texts' bytes, too.
    Raises MemvecError for vectors of other weights (unless `force`) or of another width.
    """
    check_type("mem", mem, MemVectors, "MemVectors.load")
    return certificate_of(lm, mem, mem.decode_passages(lm, force=force))


def certificate_of(
    lm: FrozenLM, mem: MemVectors, decoded: list[list[int]]
) -> tuple[dict[str, Any], list[bool]]:
    """The certificate of `decoded` token ids, and for each passage whether it is exact."""
    exact = [ids_hash(ids) == p.sha256 for ids, p in zip(decoded, mem.passages, strict=True)]
    model = lm.description()
    cache = lm.caching.argument or f"none: {lm.caching.reason}"
    cache = cache if mem.header.layout == "prefix" else "none: one forward pass gives all tokens"
    certificate = {
        "exact": all(exact),
        "passages": len(exact),
        "exact_passages": sum(exact),
        "decoded_in": model["dtype"],
        **{k: model[k] for k in ("device", "attention")},
        "batch": BATCH,
        "cache": cache,
        **{k: environment()[k] for k in ("torch", "transformers", "date")},
        "vectors_sha256": mem.digest,
    }
    return certificate, exact


@plain_torch()
@torch.no_grad()
def measure(
    lm: FrozenLM,
    mem: MemVectors,
    texts: str | bytes | Document | Iterable[str | bytes | Document],
    *,
    force: bool = False,
) -> list[PassageResult]:
    """Measure the stored vectors again on the texts that were crammed; one result per passage.

    Bits and margins come from one teacher-forced pass, `horizon` and `exact` from free decoding,
    as in certification. `steps`, `spent` and `seconds` are those of the file. `force` measures
    vectors that were made for another model of the same width. Raises MemvecError if the vectors
    are of another model, or if the texts are not those that were crammed.
    """
    check_type("mem", mem, MemVectors, "MemVectors.load")
    mem.check_model(lm, force=force)
    tokens = iter([token for document in documents_of(lm, texts) for token in document.ids])
    results: list[PassageResult] = []
    view = mem.view(lm)
    for at in range(0, len(mem.passages), BATCH):
        records = mem.passages[at : at + BATCH]
        passages = []
        for i, record in enumerate(records, at):
            ids = tuple(itertools.islice(tokens, record.tokens))
            if not ids or ids_hash(ids) != record.sha256:
                raise MemvecError(
                    f"passage {i} of these vectors is not in the texts: give the texts that were "
                    "crammed, whole and in their order."
                )
            passages.append(Passage(ids, i))
        finished = [
            Finished(p, v.float(), r.status, r.margin_asked, **r.model_dump(include=COSTS))
            for p, v, r in zip(passages, mem.vectors[at : at + BATCH], records, strict=True)
        ]
        listed = [tuple((i, token) for i, token in r.corrections) for r in records]
        for outcome in outcomes_of(view, finished, mem.header.start_rule, mem.storage, listed):
            results.append(outcome.result)
    if next(tokens, None) is not None:
        raise MemvecError("the texts go on after the last passage of these vectors.")
    return results


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
