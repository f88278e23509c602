"""Build MemVectors from crammed vectors and their records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.companions.around import recorded
from memvec.header import Header, PassageRecord, SpaceRecord
from memvec.machine import environment
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import Passage, ids_hash
from memvec.results import PassageResult
from memvec.storage import Storage
from memvec.vectors import MemVectors


def passage_record(
    passage: Passage,
    result: PassageResult,
    start_rule: StartRule,
    corrections: Sequence[tuple[int, int]] = (),
) -> PassageRecord:
    """The record of a passage in a file, from its result."""
    return PassageRecord(
        **result.model_dump(include=set(PassageResult.model_fields)),
        sha256=ids_hash(passage.ids),
        first=passage.ids[0] if start_rule == "first-token" else None,
        corrections=list(corrections),
    )


def assembled(
    view: FrozenLM, vectors: Sequence[Float[Tensor, "K D"]], storage: Storage, **known: Any
) -> MemVectors:
    """MemVectors of the passages' `vectors`, not yet certified.

    `view` is the model view that reads the vectors; the header records its layout, space, front and
    trigger. `known` holds the other fields of the header: `documents`, `passages`, `recipe` and
    `start_rule`.
    """
    around, soft = recorded(view)
    reading = view.reading
    space = SpaceRecord(name=reading.space, numbers=view.numbers, options=dict(reading.options))
    header = Header(
        model=view.description(),
        **around,
        layout=view.reading.layout,
        space=None if reading.space == "inputs" else space,
        packing=storage.packing,
        environment=environment(view.device),
        **known,
    )
    return MemVectors(torch.stack(list(vectors)), header, soft)
