"""An export for context mode: all vectors of a file as one item, to stand in front of any prompt.

    manifest.json     what the item is, the model, and the certificate of use in this dtype
    context...        the inputs in the target's own format: what stands in front of the vectors
                      (BOS, soft tokens), then the vectors of all passages, multiplied by
                      `context_scale`; no trigger

A prompt follows without a BOS of its own. Before the folder gets its name, the item is read back as
the target's loader reads it and has to be the very inputs that `memvec use` puts in front of a
prompt, and the vectors are measured as context in this dtype, with transformers' own attention.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memvec.errors import MemvecError
from memvec.export.folder import check, common_facts, write_folder
from memvec.export.target import Item, Target, stock_attention
from memvec.usable.certificate import certify_use
from memvec.usable.generate import context_inputs
from memvec.vectors import MemVectors
from memvec.writing import pretty_json

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

NEW_TOKENS = 128  # that a request of the export generates, where the target writes requests
ROOM = 1  # inputs that have to be left for a prompt


def export_context(
    mem: MemVectors,
    lm: FrozenLM,
    target: Target,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Write the vectors of `mem` as context for a target; returns the manifest.

    `lm` must be in the dtype that the target will run it in (`target.dtype` if it has one). Raises
    MemvecError for another model, vectors without a trigger, a folder in the way (`force` replaces
    an earlier export only), more vectors than the model's context holds, or a target that cannot
    take this model; NotExactError if the passages do not decode exactly in this dtype. Nothing is
    left behind then.
    """
    output = Path(folder)
    check(mem, lm, target, output, force)
    inputs = context_inputs(lm, mem)
    if lm.context is not None and len(inputs) + ROOM > lm.context:
        raise MemvecError(
            f"the vectors need {len(inputs)} inputs and {lm.name} reads {lm.context}, a prompt "
            "included: cram the text into fewer vectors."
        )
    item, name = Item(inputs, (), NEW_TOKENS), f"context{target.suffix}"

    def fill(aside: Path) -> dict[str, Any]:
        target.write(aside / name, item, lm)
        read = target.read(aside / name, item, lm).to(lm.dtype).cpu()
        if not torch.equal(read, inputs):
            raise MemvecError(
                f"{target.name} reads other numbers than were written in {lm.dtype}: use another "
                "--dtype."
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
