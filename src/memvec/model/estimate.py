"""Estimates the memory that cramming needs on a model, part by part.

The largest part is what autograd keeps from the forward to the backward pass. For a loaded model
this is measured. From a configuration alone it is counted for one token in one layer of a
transformer with frozen weights: a product with a frozen matrix keeps nothing; autograd keeps the
inputs of the norms (in float32, as RMSNorm computes), the queries, keys, values and output of
attention, and the activations of the MLP before its last matrix. The peak adds either the logits or
the gradients of the backward pass, whichever are larger: they never exist at the same time.

All figures are bytes of tensors; `benchmarks/peak.py` compares them with what torch counts. On a
CPU a process holds more, because its allocator keeps freed memory for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memvec.model.configuration import context_length, setting
from memvec.model.large import saved_bytes
from memvec.model.memory import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

LOGITS_COPIES = 3  # copies of a chunk of logits: head output, scaled logits, probabilities
# Activations that transformers computes from elementary operations: tensors that autograd keeps.
WRITTEN_OUT = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
BOTH_ENDS = ("gemma2", "gemma3", "gemma3_text")
QUERIES_AND_KEYS = ("olmo2", "olmo3", "qwen3", "qwen3_moe", "gemma3", "gemma3_text")
FUSED = ("gpt_neox",)  # queries, keys and values are one tensor; the values keep all of it alive
MAX_MEASURED = 256  # largest T of the passage with which `kept` is measured
STATE_COPIES = 70  # of size K x D per slot: 60 last gradients, best vectors, moments, ...


@dataclass(frozen=True)
class Facts:
    """Sizes of a model, from its configuration. `number` is the bytes per number of its dtype."""

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
    norms: int = 0  # channels per layer through norms of the hidden state; RMSNorm in float32
    normed: int = 0  # channels of queries and keys that pass through norms
    fused: bool = False  # queries, keys and values are one tensor, and the values keep all of it
    inside: int = 1  # tensors of the MLP's width that autograd keeps for its activation
    weights: float = 0.0  # bytes of all weights as loaded; 0: use parameters x number
    kept: float | None = None  # measured bytes that autograd keeps per token; None: counted
    checkpointing: bool = False  # each layer keeps only its input, and is computed twice
    context: int | None = None  # longest input in positions; None: no limit, or unknown
    copies: float = 0.0  # bytes of rounded weights that autocast keeps until the backward pass


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part of a step, and their sum at its peak."""

    weights: float  # and their rounded copies under autocast
    activations: float  # kept from the forward pass to the backward pass
    logits: float  # logits and their copies while losses are computed
    passing: float  # gradients of the backward pass, and the activations of a recomputed layer
    state: float  # vectors and optimiser state of all slots

    @property
    def step(self) -> float:
        """Bytes that a step adds to weights and slots; it frees logits before the backward pass."""
        return self.activations + max(self.logits, self.passing)

    @property
    def total(self) -> float:
        """All parts at the peak."""
        return self.weights + self.step + self.state


def facts_of_config(config: Any, number: int, parameters: float | None = None) -> Facts:
    """Facts from a configuration of transformers; `number` is 2 for bfloat16, 4 for float32.

    `parameters` is the number of parameters; without it, they are counted from the sizes.
    """
    c = config.get_text_config()

    def first(*names: str, default: int = 0) -> int:
        values = (setting(c, name) for name in names)
        return next((int(v) for v in values if isinstance(v, int) and v > 0), default)

    hidden = first("hidden_size", "n_embd", "d_model")
    layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = first("num_attention_heads", "n_head", "n_heads", "num_heads", default=1)
    head = first("head_dim", default=hidden // heads)
    keys = first("num_key_value_heads", default=heads) * head
    inner = first("intermediate_size", "ffn_dim", "n_inner", "d_ff", default=4 * hidden)
    # Gated MLPs use SiLU; plain ones use GELU or ReLU. Gemma is the exception: gated, with GELU.
    family = str(getattr(c, "model_type", ""))
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((str(v) for n in names if (v := getattr(c, n, None))), "")
    gated = "silu" in activation or "gemma" in family
    # Two norms per layer; four with norms after attention and MLP; some norm queries and keys.
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
        context=context_length(c),
    )


def facts_of(lm: FrozenLM, tokens: int, fast: FrozenLM | None = None) -> Facts:
    """Facts of a loaded model, with the bytes of its weights and of its activations measured.

    `tokens` is the length T of the passages: attention without a fused kernel keeps more bytes per
    token in longer ones. `fast` is the rounded copy that computes the steps, if there is one.
    """
    steps = fast or lm
    parameters = {id(p): p for model in (lm.model, steps.model) for p in model.parameters()}
    parameter_count = float(sum(p.numel() for p in lm.model.parameters()))
    facts = facts_of_config(lm.config, steps.dtype.itemsize, parameter_count)
    # Autocast has no cache for frozen weights: every product rounds its own, and autograd keeps it.
    number = steps.autocast.itemsize if steps.autocast and not lm.checkpointing else 0
    copies = float(number * sum(p.numel() for p in steps.model.parameters() if p.dim() > 1))
    return replace(
        facts,
        weights=float(sum(map(_bytes, parameters.values()))),
        kept=kept_bytes(steps, tokens),
        checkpointing=lm.checkpointing,
        width=lm.numbers,
        copies=copies,
    )


def _bytes(parameter: Tensor) -> int:
    """Bytes of one tensor; for a quantized weight, the sum over the tensors that it consists of."""
    parts = getattr(parameter, "__tensor_flatten__", None)
    if parts is None:
        return parameter.nbytes
    return sum(getattr(parameter, name).nbytes for name in parts()[0])


def kept_bytes(lm: FrozenLM, tokens: int) -> float | None:
    """Measured bytes per token that autograd keeps between forward and backward pass.

    They are measured on a passage of `tokens` tokens, or of 4 or 256 where `tokens` is below or
    above these. None for the one-step layouts, which put no vectors in front of tokens.
    """
    if lm.reading.layout != "prefix":
        return None
    T = max(4, min(tokens, MAX_MEASURED))
    sizes = []
    for t in (T // 2, T):  # the difference drops the bytes that do not depend on length
        ids = torch.zeros(1, t, dtype=torch.long, device=lm.device)
        vectors = torch.zeros(1, 1, lm.numbers, device=lm.device, requires_grad=True)
        with torch.enable_grad(), saved_bytes(lm.model) as saved:
            lm.states(vectors, ids, "first-token")
        sizes.append(saved())
    return (sizes[1] - sizes[0]) / (T - T // 2)


def layer_bytes(f: Facts) -> float:
    """Bytes that autograd keeps of one token in one layer between forward and backward pass."""
    norms = (f.norms + f.normed) * (4 if f.gated else f.number)
    # Queries and keys after their rotation, values, and the output of attention.
    attention = f.number * ((2 + f.fused) * f.attention + 2 * f.keys)
    mlp = f.number * f.inner * (2 * f.gated + f.inside)
    return float(norms + attention + mlp)


def estimate(f: Facts, *, batch_size: int, tokens: int, vectors: int = 1) -> Estimate:
    """Peak bytes of a step with B = `batch_size` slots, T = `tokens` and K = `vectors`."""
    N = batch_size * (tokens + vectors - 1)
    one_layer, kept = layer_bytes(f), f.kept
    if kept is None:
        kept = f.layers * (f.number * f.hidden if f.checkpointing else one_layer)
    # The backward pass first holds the last norm, its output and their gradients, later those of a
    # layer's MLP and input, or of its keys, values and normed queries.
    ends = f.hidden * (20 + 4 * f.number)
    mlp = f.number * ((2 * f.gated + f.inside) * f.inner + 2 * f.hidden)
    attention = f.number * 2 * f.keys + 8 * min(f.normed, f.attention)
    back = max(mlp, attention) + one_layer * f.checkpointing
    rows = min(N, max(1, LOGITS_AT_ONCE // max(1, f.vocabulary)))
    states = 3 * N * f.hidden * f.number  # hidden states and their gradients
    return Estimate(
        weights=(f.weights or f.parameters * f.number) + f.copies,
        activations=float(N * kept),
        logits=rows * f.vocabulary * 4.0 * LOGITS_COPIES + states,
        passing=float(N * max(back, ends)),
        state=float(STATE_COPIES * 4 * batch_size * vectors * f.width),
    )


def max_batch_size(f: Facts, *, free: float, tokens: int, vectors: int = 1) -> int:
    """The largest number of slots that needs at most `free` bytes besides the weights, or 1."""
    slot = estimate(f, batch_size=1, tokens=tokens, vectors=vectors)
    logits = LOGITS_AT_ONCE * 4.0 * LOGITS_COPIES  # upper bound, for any number of slots
    slot_bytes = slot.activations + slot.passing + slot.state
    return max(1, int((free - logits) / slot_bytes))
