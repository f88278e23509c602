"""Llama and OLMo 2 for training, with the arithmetic and the tensor names of transformers.

Notable:
- parameter names are those of transformers, which loads the `state_dict()`;
- the model takes input vectors (B, S, D), not token ids, and returns hidden states (B, S, D). One
  call encodes passages, and a second one decodes them. S is the number of positions;
- Llama normalises the input of attention and MLP (norm "before"). OLMo 2 normalises their output,
  and queries and keys as well (norm "after");
- the model has only linear maps, norms, rotary positions and causal attention, which torch.compile
  fuses well on a CPU.

`pocket.py` imports this module; it is not run.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memvec.errors import MemvecError


@dataclass(frozen=True)
class Shape:
    """The architecture: fields of a transformers configuration, and `norm`."""

    vocab_size: int = 2048
    """Tokens of the vocabulary (V)."""
    hidden_size: int = 384
    """Width of input vectors and hidden states (D)."""
    num_hidden_layers: int = 6
    """Layers."""
    num_attention_heads: int = 6
    """Attention heads of a layer."""
    intermediate_size: int = 1024
    """Width of the gated MLP."""
    max_position_embeddings: int = 512
    """Positions of the longest input."""
    rope_theta: float = 10000.0
    """Base of the rotary positions."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the RMS norms."""
    norm: str = "after"
    """'before' attention and MLP (Llama), or 'after' them (OLMo 2)."""

    def __post_init__(self):
        if self.norm not in ("before", "after"):
            raise MemvecError(f"norm must be 'before' or 'after', not '{self.norm}'.")

    def config(self):
        """The same shape as a transformers configuration: LlamaConfig or Olmo2Config."""
        from transformers import LlamaConfig, Olmo2Config

        fields = asdict(self)
        theta = fields.pop("rope_theta")
        kind = Olmo2Config if fields.pop("norm") == "after" else LlamaConfig
        return kind(
            **fields,
            num_key_value_heads=self.num_attention_heads,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            dtype="bfloat16",
        )


def rms_norm(x, weight, eps: float):
    """RMS norm of x (..., D), computed in float32 and returned in the dtype of x."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


normalise = torch.compile(rms_norm, dynamic=True)


@torch.compile(dynamic=True)
def added(residual, output, weight, eps: float):
    """The residual stream plus the RMS norm of a layer's output."""
    return residual + rms_norm(output, weight, eps)


@torch.compile(dynamic=True)
def gated(gate, up):
    """SwiGLU: silu(gate) times up."""
    return F.silu(gate) * up


class Norm(nn.Module):
    """RMS norm with a learnt gain."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return normalise(x, self.weight, self.eps)

    def add(self, stream, part):
        """The residual stream plus the norm of a layer's output."""
        return added(stream, part, self.weight, self.eps)


@torch.compile(dynamic=True)
def rotate(x, cos, sin, scale: float):
    """Rotary positions of x (B, heads, S, d) times `scale`; cos and sin (S, d/2).

    The two halves of d form the pairs, as in transformers.
    """
    a, b = (x * scale).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, all heads with their own keys and values."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        if shape.norm == "after":
            self.q_norm = Norm(width, shape.rms_norm_eps)
            self.k_norm = Norm(width, shape.rms_norm_eps)

    def forward(self, x, cos, sin):
        B, S, D = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, S, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        if x.is_cuda:
            q, k = rotate(q, cos, sin, 1.0), rotate(k, cos, sin, 1.0)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o_proj(mixed.transpose(1, 2).reshape(B, S, D))
        # not the CPU's flash kernel, whose backward pass takes 8 times as long at S = 40
        q = rotate(q, cos, sin, (D // self.heads) ** -0.5)
        scores = q @ rotate(k, cos, sin, 1.0).transpose(-1, -2)
        future = torch.full((S, S), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        mixed = (scores + future).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(B, S, D))


class MLP(nn.Module):
    """Gated MLP (SwiGLU)."""

    def __init__(self, shape: Shape):
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """Attention and MLP of norm "before": the input of each is normalised."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerNormAfter(nn.Module):
    """Attention and MLP of norm "after": the output of each is normalised."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_feedforward_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x, cos, sin):
        x = self.post_attention_layernorm.add(x, self.self_attn(x, cos, sin))
        return self.post_feedforward_layernorm.add(x, self.mlp(x))


class Trunk(nn.Module):
    """Embedding, layers and final norm; their parameters' names begin with `model.`."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        kind = LayerNormAfter if shape.norm == "after" else Layer
        self.layers = nn.ModuleList(kind(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)


class Decoder(nn.Module):
    """Maps input vectors (B, S, D) to last hidden states after the final norm (B, S, D)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= (2 * shape.num_hidden_layers) ** 0.5
                nn.init.normal_(parameter, std=std)
        half = shape.hidden_size // shape.num_attention_heads // 2
        rates = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(shape.max_position_embeddings).double(), rates)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    @property
    def embedding(self):
        """The input embedding (V, D), which is also the output head (tied weights)."""
        return self.model.embed_tokens.weight

    def forward(self, x):
        S = x.shape[1]
        cos, sin = self.cos[:S], self.sin[:S]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)
