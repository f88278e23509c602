"""A fake vLLM for tests: the parts that memvec's runner calls, computed by transformers."""

import types

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

MEMORY = 200  # tokens of one sequence


class SamplingParams:
    def __init__(self, **asked):
        self.asked = asked
        assert asked["temperature"] == 0


class LLM:
    def __init__(
        self, model, *, dtype, max_model_len, enable_prompt_embeds, enforce_eager, **others
    ):
        assert enable_prompt_embeds
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model.eval().generation_config = GenerationConfig(pad_token_id=0)
        # vLLM refuses a window beyond the model's, and memory that does not hold one sequence.
        assert max_model_len <= min(self.model.config.max_position_embeddings, MEMORY)
        self.room = max_model_len
        config = types.SimpleNamespace(max_model_len=max_model_len)
        self.llm_engine = types.SimpleNamespace(model_config=config)

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        prompts = [prompts] if isinstance(prompts, dict) else prompts
        params = params if isinstance(params, list) else [params]
        outputs = []
        for prompt, one in zip(prompts, params, strict=True):
            if "prompt_embeds" in prompt:
                inputs = prompt["prompt_embeds"]
                assert inputs.dtype == self.model.dtype
            else:
                inputs = self.model.get_input_embeddings()(torch.tensor(prompt["prompt_token_ids"]))
            assert len(inputs) + one.asked["max_tokens"] <= self.room
            ids = self.model.generate(
                inputs_embeds=inputs[None], max_new_tokens=one.asked["max_tokens"], do_sample=False
            )
            written = types.SimpleNamespace(token_ids=ids[0].tolist())
            outputs.append(types.SimpleNamespace(outputs=[written]))
        return outputs
