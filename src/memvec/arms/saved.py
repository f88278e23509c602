"""The start `saved(file='letter.mem.safetensors')`: continue from vectors that were crammed before.

Use it for more steps, another margin, dtype or objective, or a model that was fine-tuned since. The
hash of token ids identifies the passage of each vector, so the text must be cut as it was then.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.passages.passage import ids_hash
from memvec.vectors import MemVectors
from memvec.vectors_file import existing_path


def saved(
    lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe, *, file: str = ""
) -> Float[Tensor, "K D"]:
    """The vectors of a passage in a file.

    The weights of the model are not compared. Raises MemvecError without a file, and for a file
    that cannot be read, holds vectors of another shape than (K, D), is of another layout or space,
    or has no passage with these token ids.
    """
    if not file:
        raise MemvecError("the start 'saved' needs a file: saved(file='letter.mem.safetensors').")
    path = existing_path(file)
    now = path.stat()  # the times of some file systems are of whole seconds
    mem, places = _of_file(str(path), (now.st_mtime_ns, now.st_ino, now.st_size))
    if mem.header.layout != lm.reading.layout or mem.header.space or lm.reading.space != "inputs":
        raise MemvecError(f"the vectors in {path} are read otherwise: only inputs begin there.")
    if tuple(mem.vectors.shape[1:]) != (K, lm.width):
        has, D = mem.vectors.shape[1:]
        raise MemvecError(
            f"{path} has {has} vectors of {D} numbers for each passage, not {K} of {lm.width}."
        )
    if (place := places.get(ids_hash(ids))) is None:
        raise MemvecError(
            f"{path} has no vectors of a passage of {len(ids)} tokens that is crammed now: give "
            "the same text, and cut it as it was cut then, with as many tokens."
        )
    return mem.vectors[place].float() * recipe.context_scale  # which the caller divides by


@functools.lru_cache(maxsize=4)
def _of_file(path: str, state: tuple[int, ...]) -> tuple[MemVectors, dict[str, int]]:
    """The vectors of a file, and the index of each passage; another `state` is another file."""
    mem = MemVectors.load(path)
    return mem, {record.sha256: i for i, record in enumerate(mem.passages)}
