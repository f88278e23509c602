"""Export for PEFT: one prompt-tuning adapter (a folder) per passage.

`adapter_config.json` declares PROMPT_TUNING with K virtual tokens, `adapter_model.safetensors` has
one tensor `prompt_embeddings` (K, D). PEFT puts it in front of the embeddings of `input_ids`, in
their dtype; the manifest lists those ids (`given`: the tokens of the start rule, possibly none).

If PEFT is installed, it generates the passages for the certificate itself. It needs
`use_cache=False`: PEFT (0.21) looks for the cache under the name that transformers used before
5.24, does not see it, and puts the vectors in front of every token again.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memvec.errors import MemvecError, first_line
from memvec.export.target import Item, Target, decoder, embedded
from memvec.export.transformers import plainly_generating

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


# Warnings of PEFT 0.21 with transformers 5.23 and newer that no argument avoids: it reads a renamed
# attribute, and leaves out position ids of generate (November 2026).
KNOWN_WARNINGS = ("`is_gradient_checkpointing` is deprecated", "Position ids are not supported")


class Peft(Target):
    """The export target of prompt-tuning adapters."""

    description = "prompt-tuning adapters of PEFT, one per passage"
    suffix = ""
    programs: ClassVar[dict[str, Path]] = decoder("decode_peft.py", "transformers_model.py")
    argument = "MODEL_FOLDER"

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        path.mkdir()
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": lm.name,
            "revision": lm.revision,
            "inference_mode": True,
            "num_virtual_tokens": len(item.vectors),
            "token_dim": lm.width,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        vectors = item.vectors.to(lm.dtype).contiguous()
        save_file({"prompt_embeddings": vectors}, path / "adapter_model.safetensors")

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        vectors = load_file(path / "adapter_model.safetensors")["prompt_embeddings"]
        # PEFT holds them in float32 and casts them to the dtype of the token embeddings.
        return torch.cat([vectors.float().to(lm.dtype), embedded(item.given, lm)])

    @torch.no_grad()
    def decode(self, path: Path, item: Item, lm: FrozenLM) -> list[int]:
        if find_spec("peft") is None:
            return super().decode(path, item, lm)
        from peft import PeftModel

        given = torch.tensor([list(item.given)], dtype=torch.long, device=lm.device)
        model = plainly_generating(lm)
        with _restored(model), warnings.catch_warnings():
            for message in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message)
            try:
                adapted: Any = PeftModel.from_pretrained(model, path)
                ids = adapted.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=item.new_tokens,
                    do_sample=False,
                    use_cache=False,
                )
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
                reason = first_line(error)
                raise MemvecError(
                    f"PEFT cannot generate with {lm.name} ({reason}): use the target "
                    "'transformers'."
                ) from error
        new_ids: list[int] = ids[0, given.shape[1] :].tolist()
        return new_ids

    def certified_by(self) -> str:
        return super().certified_by() if find_spec("peft") is None else f"peft {version('peft')}"


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore what PEFT changes in a model's modules: attributes, methods, trainable flags."""
    attributes_of: list[tuple[Any, dict[str, Any]]] = [(m, dict(vars(m))) for m in model.modules()]
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, attributes in attributes_of:
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
