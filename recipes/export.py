"""Write a training run as the folder that the package contains: a model, tokenizer and encoder.

Notable:
- all weights are bfloat16; float32 can represent them without loss;
- the metadata of `encoder.safetensors` have the number of vectors that it makes at once (one: for K
  vectors, the passage is split into K equal parts) and the number of tokens per vector that it
  gives back.

`pocket.py` and `candidates.py` import this module; it is not run.
"""

from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast


def export(run, tokenizer, folder: Path) -> None:
    """Write a folder that transformers loads, with the encoder beside the model."""
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
    # for K vectors, the passage is split into K equal parts, each of which is encoded alone
    save_file(
        {k: v.cpu().bfloat16().contiguous() for k, v in run.encoder.state_dict().items()},
        folder / "encoder.safetensors",
        metadata={
            "format": "memvec-encoder",
            "version": "1",
            "max_vectors": "1",
            # leading tokens per vector to encode as a start for cramming: as many as it gives back
            "tokens": str(round(run.lengths.targets[1])),
        },
    )
    for file in folder.glob("*.*"):
        file.chmod(0o644)  # only the owner can read what safetensors writes
