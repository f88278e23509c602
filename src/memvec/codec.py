"""Encode texts into certified [mem] vectors (`cram`), and decode them (`decode`).

texts -> documents -> passages (cut by information) -> engine -> outcomes
      -> passages that are not exact are halved and crammed again
      -> MemVectors -> all passages are decoded as a user decodes them -> certificate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike

from memvec.cram_job import CramJob, CramStatus
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, check_type
from memvec.journal import Journal
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.documents import Document, documents_of
from memvec.resume import opened
from memvec.storage import storage_of
from memvec.vectors import MemVectors
from memvec.workers import Workers


@plain_torch()
def cram(
    lm: FrozenLM,
    texts: str | bytes | Document | Iterable[str | bytes | Document],
    *,
    vectors: int = 1,
    tokens: int | None = None,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    storage: str = "float32",
    layout: str = "prefix",
    halve: bool = True,
    keep_text: bool = False,
    journal: Journal | str | PathLike[str] | None = None,
    workers: Workers | None = None,
    on_status: Callable[[CramStatus], None] | None = None,
) -> MemVectors:
    """Cram texts into `vectors` [mem] vectors (K) per passage; returns them with a certificate.

    A single `str`, `bytes` or Document is one text. `tokens` is the length of a passage; without
    it, passages are cut by information, so that K vectors can hold them. `recipe` says how passages
    are crammed (default: `Recipe()`). `batch_size` is the number of passages crammed at once
    (default: as many as memory allows). `storage` is the number format in which vectors are stored
    and certified (memvec.storage.STORAGES). `keep_text` also stores the text. `journal` is the path
    of a file that keeps finished passages: after an interruption, the same call continues from it;
    delete it once the vectors are saved. `workers` (memvec.workers) cut long texts, cram the
    passages, and decode them for the certificate of `lm`. `on_status` is called with the progress.

    `layout` says how the model reads the vectors (memvec.model.reading). 'prefix' puts them in
    front of their passage. 'one-step' uses two vectors per passage, from which one forward pass
    gives all tokens; it ignores `vectors`. With 'one-step-shared', all passages share one of the
    two, so they are crammed together, depend on each other, and have no journal.

    A passage that is not exact within the recipe's steps, patience and budget is halved, and both
    halves are crammed, down to one token per vector. A passage that still fails is in the result
    with `exact` false. With `halve` false, passages are never halved: this measures vectors at one
    length (set `tokens`). Raises MemvecError for no text or an empty one, a setting out of range or
    that the model does not support, and a passage that does not fit in memory.
    """
    recipe = Recipe() if recipe is None else recipe
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    check_type("recipe", recipe, Recipe, "Recipe.of('paper')")
    if not (documents := documents_of(lm, texts)):
        raise MemvecError("there is no text to cram.")
    lm, stored = lm.read_as(layout), storage_of(storage)
    vectors = lm.reading.fixed_vectors or vectors
    with opened(journal, lm, recipe, vectors=vectors, storage=storage, layout=layout) as kept:
        job: CramJob = (lm.reading.job_type or CramJob)(
            lm,
            documents,
            vectors,
            tokens=tokens,
            recipe=recipe,
            batch_size=batch_size,
            storage=stored,
            halve=halve,
            keep_text=keep_text,
            journal=kept,
            on_status=on_status,
            workers=workers,
        )
        return job.run()


def decode(lm: FrozenLM, mem: MemVectors, *, force: bool = False) -> list[str]:
    """Decode vectors into the texts that were crammed, as `str` even if they were given as `bytes`.

    Raises NotExactError if a text is not exact, and MemvecError for vectors that were made for
    other weights (unless `force`) or for another width.
    """
    check_type("mem", mem, MemVectors, "MemVectors.load")
    contents = zip(mem.documents(lm, force=force), mem.header.documents, strict=True)
    return [data.decode(record.encoding) for data, record in contents]
