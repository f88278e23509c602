"""Export for vLLM's prompt embeddings: per passage, a tensor file and a request body.

`passage-0000.json` is the body of a POST to `/v1/completions` of a server started with
`--enable-prompt-embeds`; its `prompt_embeds` is the base64 of the bytes that `torch.save` writes
for a dense tensor (N, D). `passage-0000.pt` holds the same bytes for offline use. vLLM loads them
with `weights_only`, needs two dimensions and D equal to the model's hidden size, and casts to the
model's dtype (vllm/renderers/embed_utils.py, docs/features/prompt_embeds.md).
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.export.limits import refuse
from memvec.export.target import Item, Target, decoder, prompt

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class Vllm(Target):
    """The export target `prompt_embeds` of vLLM."""

    description = "prompt_embeds of vLLM, offline and for its server"
    suffix = ".json"
    programs: ClassVar[dict[str, Path]] = decoder("decode_vllm.py")
    argument = "MODEL_FOLDER"

    def refuse(self, lm: FrozenLM) -> None:
        refuse("vllm", lm)

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        buffer = io.BytesIO()
        # Cloned, since torch.save writes the whole storage of a view.
        torch.save(prompt(item, lm).contiguous().clone(), buffer)
        path.with_suffix(".pt").write_bytes(buffer.getvalue())
        body = {
            "model": lm.name,
            "prompt": None,
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode("ascii"),
            "max_tokens": item.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }
        path.write_text(json.dumps(body), encoding="utf-8")

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        body = json.loads(path.read_text(encoding="utf-8"))
        data = base64.b64decode(body["prompt_embeds"], validate=True)
        tensor: Tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        return tensor.to(lm.dtype)
