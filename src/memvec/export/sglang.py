"""Export for SGLang's `input_embeds`: per passage, the body of a POST to `/generate`.

`input_embeds` is a list of N lists of D numbers. SGLang casts them to bfloat16 whatever the model's
dtype is (sglang/srt/model_executor/model_runner.py), so the export is in bfloat16, for a model
served in bfloat16. SGLang accepts them only if started with `--disable-radix-cache`, because its
cache identifies prompts by token ids (sglang/srt/managers/tokenizer_manager.py).
"""

from __future__ import annotations

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


class Sglang(Target):
    """The export target `input_embeds` of SGLang."""

    description = "input_embeds of SGLang's /generate"
    dtype = "bfloat16"
    suffix = ".json"
    programs: ClassVar[dict[str, Path]] = decoder("decode_sglang.py")
    argument = "http://localhost:30000"

    def refuse(self, lm: FrozenLM) -> None:
        refuse("sglang", lm)

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        body = {
            "input_embeds": prompt(item, lm).float().tolist(),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": item.new_tokens,
                "ignore_eos": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
            },
        }
        path.write_text(json.dumps(body), encoding="utf-8")

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        body = json.loads(path.read_text(encoding="utf-8"))
        return torch.tensor(body["input_embeds"], dtype=torch.float32).to(torch.bfloat16)
