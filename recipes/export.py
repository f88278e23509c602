"""From a training run to the folder that ships: a transformers model with its encoder beside it.

Notable:
- everything in bfloat16; a reader that wants float32 widens it without loss;
- `encoder.safetensors` says in its metadata how many vectors it makes at once (one; more vectors
  take the passage in equal parts) and how many tokens per vector it is good for.

Used by `pocket.py`; nothing to run here.
"""

from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast


def export(run, tokenizer, folder: Path) -> None:
    """A folder that transformers loads, with the encoder beside the model."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.cpu().bfloat16() for k, v in run.model.state_dict().items()}
    model = AutoModelForCausalLM.from_config(run.shape.config()).bfloat16()
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # more vectors: the passage in as many equal parts, each encoded alone
    save_file(
        {k: v.cpu().bfloat16().contiguous() for k, v in run.encoder.state_dict().items()},
        folder / "encoder.safetensors",
        metadata={
            "format": "memvec-encoder",
            "version": "1",
            "max_vectors": "1",
            # leading tokens per vector to encode as a start for cramming: as many as it gives back
            "tokens": str(round(run.targets[1])),
        },
    )
    for file in folder.glob("*.*"):
        file.chmod(0o644)  # safetensors writes for the owner alone; a wheel is for all
