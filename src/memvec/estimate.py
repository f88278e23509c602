"""What a cram will take, from a model's configuration: memory part by part, and time.

Activations are counted, not guessed: what autograd keeps of one token and layer of a transformer
whose weights are frozen. A product with a frozen matrix keeps nothing; what stays are the inputs of
the norms (in float32, as RMSNorm computes), queries, keys, values and output of attention, and the
MLP up to its last matrix. A test holds the layers against what autograd keeps, within 15 %; the
passing parts (logits, gradients on their way) are not measured yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from memvec.cramming.objective import CHUNK

if TYPE_CHECKING:
    from memvec.lm import FrozenLM

OPERATIONS = 4  # per parameter and forward-backward token: weights get no gradient
LOGITS_COPIES = 4  # of a chunk of logits at once: divided, exponentiated, masked, the head's own
STATE_COPIES = 8  # of a seat's vectors: parameters, best, gradient, moments and the update


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
    rounded: bool = False  # a bfloat16 copy of the weights stands beside them (memvec.precision)


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part at the peak of a step, and what they add up to."""

    weights: float
    activations: float
    logits: float
    state: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.activations + self.logits + self.state

    def sentence(self) -> str:
        """For people, in GiB, or MiB where that is little."""
        unit, name = (2**30, "GiB") if self.total >= 2**30 else (2**20, "MiB")
        digits = 1 if name == "GiB" else 0
        parts = (self.total, self.weights, self.activations, self.logits + self.state)
        total, weights, activations, rest = (f"{part / unit:.{digits}f}" for part in parts)
        return (
            f"about {total} {name} at the peak: weights {weights}, activations {activations}, "
            f"logits and optimiser {rest}"
        )


def facts_of_config(config: Any, number: int, parameters: float | None = None) -> Facts:
    """Facts from a configuration of transformers; `number` is 2 for bfloat16, 4 for float32.

    `parameters` where the model is at hand; otherwise they are added up from the sizes.
    """
    c = config.get_text_config()

    def first(*names: str, default: int = 0) -> int:
        found = (getattr(c, name, None) for name in names)
        return next((int(v) for v in found if isinstance(v, int) and v > 0), default)

    hidden = first("hidden_size", "n_embd", "d_model")
    layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = first("num_attention_heads", "n_head", "n_heads", "num_heads", default=1)
    head = first("head_dim", default=hidden // heads)
    keys = first("num_key_value_heads", default=heads) * head
    inner = first("intermediate_size", "ffn_dim", "n_inner", "d_ff", default=4 * hidden)
    # SiLU is what gated MLPs use; GELU and ReLU stand in plain ones (Gemma's is the exception).
    activation = str(getattr(c, "hidden_activation", None) or getattr(c, "hidden_act", ""))
    gated = "silu" in activation or "gemma" in str(getattr(c, "model_type", ""))
    vocabulary = first("vocab_size")
    if parameters is None:
        each = 2 * hidden * heads * head + 2 * hidden * keys + (2 + gated) * hidden * inner
        tied = bool(getattr(c, "tie_word_embeddings", False))
        parameters = layers * each + (2 - tied) * vocabulary * hidden
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
    )


def facts_of(lm: FrozenLM, rounded: bool = False) -> Facts:
    """Facts of a loaded model: its parameters and their dtype as they are.

    `rounded` if steps are computed with a bfloat16 copy of them. Activations are counted as those
    of the model itself all the same: an upper bound.
    """
    parameters = float(sum(p.numel() for p in lm.model.parameters()))
    facts = facts_of_config(lm.config, lm.dtype.itemsize, parameters)
    return replace(facts, rounded=rounded)


def layer_bytes(f: Facts) -> float:
    """Bytes that one layer keeps of one token between forward and backward."""
    norms = 2 * 4 * f.hidden if f.gated else 2 * f.number * f.hidden
    # Queries and keys stay twice, before and after their rotation; values and the output once.
    attention = f.number * (3 * f.attention + 3 * f.keys)
    mlp = f.number * f.inner * (3 if f.gated else 1)
    return float(norms + attention + mlp)


def estimate(
    f: Facts, *, seats: int, tokens: int, vectors: int = 1, checkpointing: bool = False
) -> Estimate:
    """Peak bytes of a step with `seats` passages of `tokens` tokens and K = `vectors`.

    With `checkpointing` a layer keeps its input only, and one layer at a time is computed again.
    """
    N = seats * (tokens + vectors - 1)
    each = layer_bytes(f)
    kept = f.layers * each
    if checkpointing:
        kept = f.layers * f.number * f.hidden + each
    # While a layer's gradient is formed, gradients of its MLP and of its input stand beside it.
    passing = f.number * ((2 + f.gated) * f.inner + 2 * f.hidden)
    ends = f.hidden * (4 + 3 * f.number)  # the last norm, its output, its gradient, the inputs
    rows = min(N, max(1, CHUNK // max(1, f.vocabulary)))
    return Estimate(
        weights=f.parameters * (f.number + 2 * f.rounded),
        activations=float(N * (kept + passing + ends)),
        logits=rows * f.vocabulary * (4.0 * LOGITS_COPIES),
        state=float(STATE_COPIES * 4 * seats * vectors * f.width),
    )


def most_seats(f: Facts, *, free: float, tokens: int, vectors: int = 1, **options: bool) -> int:
    """Most seats whose peak, weights apart, stays in `free` bytes; at least 1."""
    one = estimate(f, seats=1, tokens=tokens, vectors=vectors, **options)
    each = one.activations + one.state
    return max(1, int((free - one.logits) / each))


def seconds(f: Facts, *, tokens: float, steps: float, flops: float) -> float:
    """Time of `steps` steps over `tokens` tokens in all, at `flops` operations per second."""
    return OPERATIONS * f.parameters * tokens * steps / flops


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    if math.isnan(seconds):
        return "?"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
