"""The model of a folder, loaded by transformers as the export was certified, for `decode.py`."""

from typing import Any

import torch
from passages import MANIFEST, model_folder
from transformers import AutoModelForCausalLM, GenerationConfig


def loaded_model() -> tuple[Any, str]:
    """The model that the command names, and its device, a GPU if the export was certified on one.

    Another device or attention rounds otherwise than the certificate's.
    """
    certified = MANIFEST["certificate"]
    options: dict[str, Any] = {"dtype": getattr(torch, MANIFEST["dtype"])}
    if certified["attention"] in ("eager", "sdpa"):
        options["attn_implementation"] = certified["attention"]
    device: str = certified["device"] if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), **options).to(device)
    # The model's own may sample, penalise or stop early.
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model, device
