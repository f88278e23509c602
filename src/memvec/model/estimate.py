"""What a cram will take, from a model's configuration: memory part by part, and time.

Activations are counted, not guessed: of a loaded model, what autograd really keeps of a token; of a
configuration, what it keeps of one token and layer of a transformer whose weights are frozen. A
product with a frozen matrix keeps nothing; what stays are the inputs of the norms (in float32, as
RMSNorm computes), queries, keys, values and output of attention, and the MLP up to its last matrix.
To what is kept are added first the logits, later the gradients on their way back: never both.

Bytes are those of tensors, which `benchmarks/peak.py` compares with what torch counts. A process on
a CPU holds more than its tensors, by as much as its allocator keeps for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memvec.model.large import saved_bytes
from memvec.model.memory import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

LOGITS_COPIES = 3  # of a chunk of logits at once: the head's own, divided, exponentiated
# MLPs whose activation transformers writes out: intermediate tensors that autograd keeps.
WRITTEN_OUT = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
BOTH_ENDS = ("gemma2", "gemma3", "gemma3_text")
QUERIES_AND_KEYS = ("olmo2", "olmo3", "qwen3", "qwen3_moe", "gemma3", "gemma3_text")
FUSED = ("gpt_neox",)  # queries, keys and values are one tensor, which the values hold on to
MAX_MEASURED = 256  # tokens of the passage with which `kept` is measured
STATE_COPIES = 70  # of a slot's vectors: 60 last gradients; parameters, best, moments, update ...


@dataclass(frozen=True)
class Facts:
    """What a configuration says about size. `number` is the bytes of a weight's dtype."""

    parameters: float
    layers: int
    hidden: int
    inner: int  # width of the MLP
    attention: int  # heads x head width
    keys: int  # key-value heads x head width
    gated: bool  # the MLP has a gate beside its first matrix
    vocabulary: int
    width: int  # D
    number: int
    norms: int = 0  # channels of a layer's stream that pass through norms; RMSNorm's in float32
    normed: int = 0  # channels of queries and keys that do
    fused: bool = False
    inside: int = 1  # tensors as wide as the MLP that its activation keeps
    weights: float = 0.0  # bytes of them, as they are; 0: parameters x number
    kept: float | None = None  # bytes that all layers keep of a token, where that was measured
    checkpointing: bool = False  # a layer keeps its input only, and is computed again
    context: int | None = None  # tokens; None: no limit, or unknown


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part of a step, and what they add up to at its peak."""

    weights: float
    activations: float  # kept from the forward pass to the backward pass
    logits: float  # while they are scored
    passing: float  # gradients on their way back, and a layer computed again
    state: float  # what the slots hold

    @property
    def step(self) -> float:
        """What a step needs on top of weights and slots: logits are gone when gradients move."""
        return self.activations + max(self.logits, self.passing)

    @property
    def total(self) -> float:
        """All parts at the peak."""
        return self.weights + self.step + self.state


def facts_of_config(config: Any, number: int, parameters: float | None = None) -> Facts:
    """Facts from a configuration of transformers; `number` is 2 for bfloat16, 4 for float32.

    `parameters` where the model is at hand; otherwise they are added up from the sizes.
    """
    c = config.get_text_config()

    def first(*names: str, default: int = 0) -> int:
        values = (getattr(c, name, None) for name in names)
        return next((int(v) for v in values if isinstance(v, int) and v > 0), default)

    hidden = first("hidden_size", "n_embd", "d_model")
    layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = first("num_attention_heads", "n_head", "n_heads", "num_heads", default=1)
    head = first("head_dim", default=hidden // heads)
    keys = first("num_key_value_heads", default=heads) * head
    inner = first("intermediate_size", "ffn_dim", "n_inner", "d_ff", default=4 * hidden)
    # SiLU is what gated MLPs use; GELU and ReLU stand in plain ones (Gemma's is the exception).
    family = str(getattr(c, "model_type", ""))
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((str(v) for n in names if (v := getattr(c, n, None))), "")
    gated = "silu" in activation or "gemma" in family
    # Two norms a layer; four in models that also normalise behind; some normalise queries and keys.
    norms = hidden * (4 if family in BOTH_ENDS else 2)
    normed = heads * head + keys if family in QUERIES_AND_KEYS else 0
    vocabulary = first("vocab_size")
    if parameters is None:
        per_layer = 2 * hidden * heads * head + 2 * hidden * keys + (2 + gated) * hidden * inner
        tied = bool(getattr(c, "tie_word_embeddings", False))
        parameters = layers * per_layer + (2 - tied) * vocabulary * hidden
    return Facts(
        parameters=float(parameters),
        layers=layers,
        hidden=hidden,
        inner=inner,
        attention=heads * head,
        keys=keys,
        gated=gated,
        vocabulary=vocabulary,
        width=first("word_embed_proj_dim", default=hidden),
        number=number,
        norms=norms,
        normed=normed,
        fused=family in FUSED,
        inside=WRITTEN_OUT.get(activation, 1),
        context=first("max_position_embeddings", "n_positions", "max_seq_len") or None,
    )


def facts_of(lm: FrozenLM, tokens: int, fast: FrozenLM | None = None) -> Facts:
    """Facts of a loaded model: its weights as they are, and what it keeps of a token, measured.

    `tokens` is how long passages will be: attention that is written out keeps more of each in long
    ones. `fast` is the rounded copy that steps are computed with, where there is one.
    """
    steps = fast or lm
    parameters = {id(p): p for model in (lm.model, steps.model) for p in model.parameters()}
    parameter_count = float(sum(p.numel() for p in lm.model.parameters()))
    facts = facts_of_config(lm.config, steps.dtype.itemsize, parameter_count)
    weights = float(sum(map(_bytes, parameters.values())))
    token_bytes = kept_bytes(steps, tokens)
    measured = replace(facts, weights=weights, kept=token_bytes, width=lm.numbers)
    return replace(measured, checkpointing=lm.checkpointing)


def _bytes(parameter: Tensor) -> int:
    """Of one tensor; of its parts where it is made of some, as weights in few bits are."""
    parts = getattr(parameter, "__tensor_flatten__", None)
    if parts is None:
        return parameter.nbytes
    return sum(getattr(parameter, name).nbytes for name in parts()[0])


def kept_bytes(lm: FrozenLM, tokens: int) -> float | None:
    """Bytes that a model keeps of one token of a passage, of `tokens` at most 256, between forward
    and backward, as it is loaded.

    None where vectors do not stand in front of tokens (one-step layouts).
    """
    if lm.layout != "prefix":
        return None
    T = max(4, min(tokens, MAX_MEASURED))
    sizes = []
    for t in (T // 2, T):  # what any passage keeps, however short, is none of its tokens'
        ids = torch.zeros(1, t, dtype=torch.long, device=lm.device)
        vectors = torch.zeros(1, 1, lm.numbers, device=lm.device, requires_grad=True)
        with torch.enable_grad(), saved_bytes(lm.model) as saved:
            lm.states(vectors, ids, "first-token")
        sizes.append(saved())
    return (sizes[1] - sizes[0]) / (T - T // 2)


def layer_bytes(f: Facts) -> float:
    """Bytes that one layer keeps of one token between forward and backward."""
    norms = (f.norms + f.normed) * (4 if f.gated else f.number)
    # Queries and keys after their rotation, values, and the output of attention.
    attention = f.number * ((2 + f.fused) * f.attention + 2 * f.keys)
    mlp = f.number * f.inner * (2 * f.gated + f.inside)
    return float(norms + attention + mlp)


def estimate(f: Facts, *, batch_size: int, tokens: int, vectors: int = 1) -> Estimate:
    """Peak bytes of a step with `slots` passages of `tokens` tokens and K = `vectors`."""
    N = batch_size * (tokens + vectors - 1)
    one_layer = layer_bytes(f)
    kept = f.kept
    if kept is None:
        kept = f.layers * (f.number * f.hidden if f.checkpointing else one_layer)
    # The last norm, its output and their gradients; later the gradients of a layer's MLP and input,
    # or of its keys, values and normed queries.
    ends = f.hidden * (20 + 4 * f.number)
    mlp = f.number * ((2 * f.gated + f.inside) * f.inner + 2 * f.hidden)
    attention = f.number * 2 * f.keys + 8 * min(f.normed, f.attention)
    back = max(mlp, attention) + one_layer * f.checkpointing
    rows = min(N, max(1, LOGITS_AT_ONCE // max(1, f.vocabulary)))
    states = 3 * N * f.hidden * f.number  # and their gradients
    return Estimate(
        weights=f.weights or f.parameters * f.number,
        activations=float(N * kept),
        logits=rows * f.vocabulary * 4.0 * LOGITS_COPIES + states,
        passing=float(N * max(back, ends)),
        state=float(STATE_COPIES * 4 * batch_size * vectors * f.width),
    )


def max_batch_size(f: Facts, *, free: float, tokens: int, vectors: int = 1) -> int:
    """The largest number of slots whose peak, weights apart, stays in `free` bytes; at least 1."""
    slot = estimate(f, batch_size=1, tokens=tokens, vectors=vectors)
    logits = LOGITS_AT_ONCE * 4.0 * LOGITS_COPIES  # at most, at any number of slots
    slot_bytes = slot.activations + slot.passing + slot.state
    return max(1, int((free - logits) / slot_bytes))
