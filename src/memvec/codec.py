"""The codec, end to end: texts in, [mem] vectors out, certified; and back.

texts -> documents -> passages (cut by information) -> engine -> outcomes
      -> passages that did not fit are halved and crammed again
      -> MemVectors -> one whole decode as a user will do it -> certificate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike

from memvec.certificate import measure, verify
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

__all__ = ["CramJob", "CramStatus", "cram", "decode", "measure", "verify"]


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
    """Cram texts into `vectors` [mem] vectors per passage; all passages share the engine's slots.

    A `str`, `bytes` or Document alone is one text. `tokens` fixes the passage length; otherwise
    passages are cut by information, so that they fit. `recipe` is how they are crammed (default:
    `Recipe()`), `batch_size` how many passages at once (default: what the memory allows). `storage`
    is how vectors are stored and certified (a name of memvec.storage.STORAGES). `keep_text` puts
    the text in the file too. `journal` is the path of a file that keeps finished passages: after an
    interruption, the same call goes on from there. Delete it once the vectors are saved. `workers`
    (memvec.workers) cram the passages on other devices; `lm` then cuts the texts and makes the
    certificate. `on_status` is called with the progress.

    `layout` 'prefix' puts the vectors in front of their passage. 'one-step' crams two vectors a
    passage, from which one forward pass gives all tokens (model/reading.py; `vectors` is then not
    used). With 'one-step-shared' all passages share one of the two: then they are crammed together,
    depend on each other, and no journal is kept.

    A passage that does not become exact within the recipe's steps, patience and budget is halved
    and crammed again, down to one token per vector; what still fails is in the result, with `exact`
    false. With `halve` false it stays whole, with its horizon: to measure vectors at one length
    (give `tokens`). Raises MemvecError for no text, an empty one, a setting that is out of range or
    that the model does not support, and a passage that does not fit in memory.
    """
    recipe = Recipe() if recipe is None else recipe
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    check_type("recipe", recipe, Recipe, "Recipe.of('paper')")
    if not (documents := documents_of(lm, texts)):
        raise MemvecError("there is no text to cram.")
    lm = lm.read_as(layout)
    vectors = lm.reading.fixed_vectors or vectors
    stored = storage_of(storage)
    with opened(journal, lm, recipe, vectors=vectors, storage=storage, layout=layout) as kept:
        return CramJob(
            lm,
            documents,
            vectors,
            tokens=tokens,
            recipe=recipe,
            batch_size=batch_size,
            storage=stored,
            halve=halve,
            journal=kept,
            on_status=on_status,
            workers=workers,
        ).run(keep_text)


def decode(lm: FrozenLM, mem: MemVectors, *, force: bool = False) -> list[str]:
    """The texts that were crammed, exactly, as `str` whatever they were given as.

    Raises NotExactError rather than return a wrong one, and MemvecError for vectors of other
    weights (unless `force`) or of another width.
    """
    check_type("mem", mem, MemVectors, "MemVectors.load")
    contents = zip(mem.documents(lm, force=force), mem.header.documents, strict=True)
    return [data.decode(record.encoding) for data, record in contents]
