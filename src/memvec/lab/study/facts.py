"""Sizes of models by name, so that a spec can be checked and priced without weights.

`facts.json` has the sizes of the papers' models from their published config.json files. For a
folder, and for the built-in model, its config is read. `model.estimate` computes with both.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from memvec.errors import MemvecError
from memvec.loading import POCKET
from memvec.model.estimate import Facts, facts_of_config
from memvec.writing import path_of, read_json

NUMBER = 2  # bytes of a weight in bfloat16, for which prices are computed
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of their number


def facts_of_name(name: str) -> Facts | None:
    """Facts of a model by Hub id, folder or 'pocket'; None if none are known.

    Raises MemvecError for a folder whose config cannot be read.
    """
    if (known := _known(name)) is not None:
        return known
    folder = POCKET if name == "pocket" else path_of(name)
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = _config(read_json(file.read_text("utf-8")))
        facts = _with_experts(config, facts_of_config(config, NUMBER))
    except (ValueError, TypeError, AttributeError) as error:  # not JSON, or not such a config
        raise MemvecError(f"{file} is not a model's config: {error}.") from None
    if not facts.hidden or not facts.layers:
        raise MemvecError(f"{file} is not a model's config: it has no hidden size or no layers.")
    return facts


@functools.cache
def _known(name: str) -> Facts | None:
    """Facts of a model that the package's own table has, None for another."""
    text = files("memvec.lab.study").joinpath("facts.json").read_text("utf-8")
    known = json.loads(text)["models"].get(name)
    if known is None:
        return None
    return facts_of_config(_config(known["config"]), NUMBER, known["parameters"])


def _with_experts(config: PretrainedConfig, facts: Facts) -> Facts:
    """Facts of a mixture of experts: bytes of all of its weights, parameters that a token reads.

    They are counted in the model that transformers builds from the configuration, without memory
    for its weights. Facts of another model, or of one that cannot be built, are returned unchanged.
    """
    text = config.get_text_config()
    number = next((n for name in EXPERTS if (n := getattr(text, name, None))), None)
    if not isinstance(number, int):
        return facts
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # foreign code may raise any error
        return facts
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total, inside = sum(sizes.values()), sum(n for name, n in sizes.items() if ".experts." in name)
    read = min(1.0, int(getattr(text, "num_experts_per_tok", None) or number) / number)
    return replace(facts, parameters=total - inside * (1 - read), weights=float(total * NUMBER))


def _config(record: dict[str, Any]) -> PretrainedConfig:
    """A configuration with its family's defaults, or a plain one for an unknown family."""
    kind = record.get("model_type")
    try:
        return AutoConfig.for_model(**record) if kind else PretrainedConfig(**record)
    except ValueError:  # a family that transformers does not have
        return PretrainedConfig(**{k: v for k, v in record.items() if k != "model_type"})
