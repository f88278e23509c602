"""`load_lm` loads a frozen model by name, with its encoders and its trigger."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError

from memvec.companions.encoder_files import read_encoders
from memvec.companions.triggers import FILE_NAME as TRIGGER_FILE
from memvec.companions.triggers import load_trigger
from memvec.errors import MemvecError, did_you_mean, first_line, first_problem
from memvec.machine import keep_freed_memory, plain_torch
from memvec.model.lm import FrozenLM
from memvec.model.memory import out_of_memory
from memvec.model.mixed import BFLOAT16_AUTOCAST, put_under_autocast
from memvec.model.precision import widen_attention
from memvec.versions import warn_of_untested_versions
from memvec.writing import path_of, read_json

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    BFLOAT16_AUTOCAST: torch.float32,  # dtype of the weights
}
# Parts of transformers' error messages for a name that it cannot load, and memvec's sentences.
EXPLAINED = {
    ("gated repo", "is restricted"): "is gated on the Hub: accept its terms on the model's page, "
    "then log in with 'hf auth login'.",
    ("couldn't connect", "offline", "Connection", "Failed to resolve"): "is not a folder here "
    "and the Hub could not be reached: check the name and the network, or give a local folder.",
    ("is not a valid model identifier", "Repository Not Found"): "is neither a folder nor a model "
    "on the Hub: check the name (private models need a login).",
    ("contains custom code",): "has code of its own, which memvec does not run: choose another "
    "model.",
    ("no file named", "have a file named"): "has no weights that transformers can load: {}",
}
POCKET = Path(__file__).parent / "pocket"


class CuttingFacts(BaseModel):
    """The entries of a model's memvec.json about cutting texts; other entries are not checked."""

    fill: float = Field(1, gt=0, le=1)
    """Information of a passage, as a share of the bits that its vectors can hold."""
    bits_per_vector: dict[PositiveInt, PositiveFloat] = {}
    """Bits that each vector can hold, by the number of vectors K."""


@plain_torch()
def load_lm(
    name: str | os.PathLike[str] = "pocket",
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    encoder: str | os.PathLike[str] | None = None,
    check: bool = True,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    checkpointing: bool = False,
    offload: bool = False,
    graphs: bool = False,
) -> FrozenLM:
    """Load a causal LM from the Hub (by id), from a local folder, or the built-in 'pocket'.

    `revision` is a branch, tag or commit of the Hub. `device` 'auto' is the first GPU, else the
    CPU. `dtype` 'auto' is float32 on a CPU and bfloat16 on a GPU; 'bfloat16-autocast' is mixed
    precision: float32 weights, matrix products in bfloat16. `attention` names an implementation of
    transformers ('sdpa', 'eager', 'flash_attention_2'); by default the model's, on a CPU in
    float32, which is faster there. `encoder` is a file of `memvec encoder train`; by default, the
    encoders in the model's folder. `check` False skips the self-checks.

    For big models: `device_map` ('auto', or transformers' dictionary) distributes layers over
    devices. `quantize` '8bit' or '4bit' keeps linear weights in few bits; vectors then decode only
    with the model quantized in the same way. `checkpointing` computes each layer twice instead of
    keeping activations; `offload` keeps them in main memory. On a GPU, `graphs` replays the steps.

    Raises MemvecError if there is no such model, no network or no weights, for a model that is no
    causal LM, and for a failed self-check.
    """
    warn_of_untested_versions()
    local, name, dtype = local_folder(name), os.fspath(name), str(dtype).removeprefix("torch.")
    where = _device(str(device))
    weights_dtype = _dtype(dtype, where)
    if where.type == "cpu":
        keep_freed_memory()
    options: dict[str, Any] = {"dtype": weights_dtype, "revision": revision}
    options |= {"attn_implementation": attention} if attention else {}
    big = device_map is not None or quantize is not None
    if big:
        from memvec.big import loading_options, prepare

        with _quiet():
            options |= loading_options(device_map, quantize, weights_dtype, where)
    if local is not None and revision is not None:
        raise MemvecError(f"{name} is a folder here: only models of the Hub have a revision.")
    model, tokenizer = _load_model(name, local, options, device=None if big else where)
    if big:
        prepare(model, name)
    if where.type == "cpu" and weights_dtype != torch.float32 and attention is None:
        widen_attention(model)
    if dtype == BFLOAT16_AUTOCAST:
        put_under_autocast(model)
    commit = revision or getattr(model.config, "_commit_hash", None)
    how: dict[str, Any] = {"quantize": quantize, "checkpointing": checkpointing, "offload": offload}
    lm = FrozenLM(model, tokenizer, name=name, revision=commit, check=check, **how)
    lm.graphs = graphs
    _read_extras(lm, local, encoder)
    return lm


def _device(name: str) -> torch.device:
    """The device of a name; 'auto' is the first GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise MemvecError(f"unknown device '{name}': use auto, cpu or cuda:0.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MemvecError("this machine has no usable GPU: use the device 'cpu'.")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; 'auto' is float32 on a CPU and bfloat16 on a GPU."""
    if name not in ("auto", *DTYPES):
        raise MemvecError(f"unknown dtype '{name}': {did_you_mean(name, ['auto', *DTYPES])}")
    auto = "float32" if device.type == "cpu" else "bfloat16"
    return DTYPES[auto if name == "auto" else name]


def _load_model(
    name: str, local: Path | None, options: dict[str, Any], *, device: torch.device | None
) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded by transformers.

    `options` are those of `from_pretrained`. The model is moved to `device`, unless it is None.
    """
    source = str(local) if local is not None else name
    # Without trust_remote_code=False, transformers asks on standard input whether to run code.
    safe = {"revision": options["revision"], "trust_remote_code": False}
    with _loading(name), _quiet():
        # This import takes two seconds; wrong options and missing folders are refused before it.
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(source, **safe)
        _refuse_other_tasks(name, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **{**options, **safe}
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        if device is not None:
            model = model.to(device)
    if missing := sorted(info["missing_keys"]):
        raise MemvecError(
            f"{name} has no weights for {len(missing)} tensors of a causal LM "
            f"(first: {missing[0]}), so its logits would be noise: is it another kind of model?"
        )
    return model, tokenizer


def _read_extras(lm: FrozenLM, local: Path | None, encoder: str | os.PathLike[str] | None) -> None:
    """Read what a model's folder holds besides weights: measured facts, a trigger, and encoders."""
    if local is not None and (facts := local / "memvec.json").is_file():
        try:
            lm.facts = dict(read_json(facts.read_text("utf-8")))
            CuttingFacts(**lm.facts)
        except (ValueError, TypeError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else error
            raise MemvecError(f"{facts} holds no measured facts ({reason}): delete it.") from None
    # The trigger was trained for the weights in the folder, and a quantized model has others.
    if local is not None and not lm.quantize and (trigger := local / TRIGGER_FILE).is_file():
        lm.own_trigger = load_trigger(trigger, lm)
    read_encoders(lm, local, encoder)


def local_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a model, or None for a Hub id. 'pocket' is a folder of this package.

    Raises MemvecError for a path without a model, and for another type than `str` and paths.
    """
    folder = POCKET if name == "pocket" else path_of(name)
    local = name == "pocket" or os.fspath(name).startswith((".", "/", "~"))
    if not (local or folder.exists()):
        return None
    if not (folder / "config.json").is_file():
        raise MemvecError(f"no model in {folder}: there is no config.json.")
    return folder


def _refuse_other_tasks(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made_for = ", ".join(getattr(config, "architectures", None) or ["?"])
    if getattr(config, "is_encoder_decoder", False):
        raise MemvecError(
            f"{name} is an encoder-decoder ({made_for}); memvec needs a decoder-only causal LM."
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "MaskedLM" in made_for:
        raise MemvecError(f"{name} is a {config.model_type} ({made_for}), not a causal LM.")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Context manager that turns the errors of loading into MemvecErrors of one sentence."""
    try:
        yield
    except MemvecError:
        raise
    except Exception as error:  # a model's own code may raise any error
        first = first_line(error)
        if out_of_memory(error):
            raise MemvecError(
                f"{name} does not fit in the memory of the device: use device_map='auto', "
                "or quantize='4bit'."
            ) from error
        if isinstance(error, ImportError):
            raise MemvecError(f"{name} needs a package that is missing: {first}") from error
        for words, sentence in EXPLAINED.items():
            if any(word in str(error) for word in words):
                raise MemvecError(f"{name} {sentence.format(first)}") from error
        raise MemvecError(f"{name} could not be loaded: {first}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: no progress bars and no log messages while weights load.

    The messages are transformers' report on weights, and those of packages that transformers
    imports if they are installed (torchao, about kernels for other machines). Exceptions pass.
    """
    from transformers.utils import logging as reports

    bars, disabled = reports.is_progress_bar_enabled(), logging.root.manager.disable
    reports.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        if bars:
            reports.enable_progress_bar()
