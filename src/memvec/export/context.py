"""An export for context mode: all vectors of a file as one item, to put in front of any prompt.

    manifest.json     description of the item, the model, and the certificate of use in this dtype
    context...        the inputs in the target's own format: the front (BOS, soft tokens), then the
                      vectors of all passages, multiplied by `context_scale`; no trigger

The prompt follows without a BOS of its own. Two checks come before the folder gets its name: the
item, read back as the target's loader reads it, must equal the inputs that `memvec use` puts in
front of a prompt; and the vectors are measured in context mode in this dtype, with transformers'
own attention.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memvec.errors import MemvecError, check_type
from memvec.export.folder import check, common_facts, write_folder
from memvec.export.target import Item, Target, inputs_read, stock_attention, target_of, written
from memvec.usable.certificate import certify_use
from memvec.usable.generate import context_inputs
from memvec.vectors import MemVectors
from memvec.writing import path_of, pretty_json

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

NEW_TOKENS = 128  # tokens to generate, for targets that write requests
ROOM = 1  # inputs of the model's context to leave for a prompt


def export_context(
    lm: FrozenLM,
    mem: MemVectors,
    target: Target | str,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Write the vectors of `mem` for context mode in a target's format; returns the manifest.

    `target` is the name of a target (`memvec.export.names()`), or a Target. `lm` must be in the
    dtype in which the target runs it (`target.dtype` if it has one). Raises MemvecError for another
    model, vectors without a trigger, an existing folder (`force` replaces an earlier export only),
    more vectors than the model's context holds, or a model that the target does not support;
    NotExactError if the passages do not decode exactly in this dtype. No files remain after an
    error.
    """
    target = target_of(target)
    check_type("mem", mem, MemVectors, "MemVectors.load")
    output = path_of(folder)
    check(mem, lm, target, output, force)
    inputs = context_inputs(lm, mem)
    if lm.context is not None and len(inputs) + ROOM > lm.context:
        raise MemvecError(
            f"the vectors need {len(inputs)} inputs and {lm.name} reads {lm.context}, a prompt "
            "included: cram the text into fewer vectors."
        )
    item, name = Item(inputs, (), NEW_TOKENS), f"context{target.suffix}"

    def fill(aside: Path) -> dict[str, Any]:
        written(target, aside / name, item, lm)
        read = inputs_read(target, aside / name, item, lm).to(lm.dtype).cpu()
        if not torch.equal(read, inputs):
            raise MemvecError(
                f"{target.name} reads other numbers than were written in {lm.dtype}: use another "
                "dtype."
            )
        with stock_attention(lm):
            use = certify_use(lm, mem, exact_only=False)
        return {
            **common_facts(mem, lm, target),
            "mode": "context",
            "file": name,
            "inputs": len(inputs),
            "use": json.loads(pretty_json(use.model_dump())),
        }

    return write_folder(output, fill, {})
