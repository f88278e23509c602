"""The dtype of steps: bfloat16 weights on a CPU that multiplies them several times faster.

The gradients and margins of a step do not need float32. The vectors and their moments stay in
float32, and the frozen weights are rounded for the steps only. Whether a passage is exact is
decided with the margins, and by decoding, in the model's own dtype.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memvec.errors import SlowPathWarning, first_line
from memvec.model.agreement import TOLERANCE
from memvec.model.fingerprint import Fingerprint, fixed_prompt
from memvec.model.norms import join_norms

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

ATTENTION = "memvec_float32"  # the name under which transformers knows `attention`
MIN_PARAMETERS = 4_000_000  # in smaller models, matrix products are a small part of a step's time
LARGEST_DIFFERENCE = TOLERANCE[torch.bfloat16]  # allowed difference of logits, in logit spreads
# The rounded copy of each model, or the reason why it cannot be used.
COPIES: WeakKeyDictionary[Fingerprint, nn.Module | str] = WeakKeyDictionary()


def multiplies_bfloat16() -> bool:
    """True if torch reports that this CPU has instructions for bfloat16 matrix products."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in every supported torch
    return known is not None and bool(known())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kw: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled dot-product attention, computed in float32.

    The backward pass of torch's bfloat16 kernel for short sequences takes up to twenty times as
    long on a CPU, which is half of a whole step (docs/log.md). Some models pass the mask by
    keyword, so `attention_mask` has its name from transformers.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wide, mask = (t.float() for t in (query, key, value)), attention_mask
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    out, _ = sdpa_attention_forward(module, *wide, mask, **kw)
    return out.to(query.dtype), None


def widen_attention(model: nn.Module) -> None:
    """Make a bfloat16 model on a CPU use `attention`, if it uses scaled dot-product attention."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config: Any = model.config
    takes: Any = getattr(model, "_can_set_attn_implementation", lambda: False)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not takes():
        return
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def for_steps(lm: FrozenLM, compute: str) -> FrozenLM:
    """The model that computes the steps: a bfloat16 copy of `lm`, or `lm` itself.

    `compute` is the recipe's choice: 'model', 'bfloat16', or 'auto', which rounds float32 models of
    at least 4 M parameters on CPUs with bfloat16 products. If the copy's logits differ too much
    from the original's, it is not used and a SlowPathWarning is issued.
    """
    if compute == "model" or lm.rounding != torch.float32 or lm.quantize:
        return lm
    if compute == "auto":
        large = sum(p.numel() for p in lm.model.parameters()) >= MIN_PARAMETERS
        if lm.device.type != "cpu" or not large or not multiplies_bfloat16():
            return lm
    model = _rounded(lm)
    if isinstance(model, str):
        warning = f"steps of {lm.name} are computed in float32, as a copy in bfloat16 {model}."
        warnings.warn(warning, SlowPathWarning, stacklevel=2)
        return lm
    return lm.computed_by(model)


def _rounded(lm: FrozenLM) -> nn.Module | str:
    """A bfloat16 copy of the model, made once; the reason, as a string, if it cannot be used.

    Buffers are not rounded: the frequencies of rotary positions would lose too much precision.
    """
    if lm.fingerprint not in COPIES:
        # deepcopy treats these as already copied, so no second float32 model is made.
        rounded = {
            id(parameter): nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
            for parameter in lm.model.parameters()
        }
        model = copy.deepcopy(lm.model, rounded)
        if lm.device.type == "cpu":  # its bfloat16 kernels for attention and norms are slow
            widen_attention(model)
            join_norms(model)
        COPIES[lm.fingerprint] = _disagreement(lm, lm.computed_by(model)) or model
    return COPIES[lm.fingerprint]


@torch.no_grad()
def _disagreement(lm: FrozenLM, rounded: FrozenLM) -> str:
    """The reason why a rounded copy cannot be used; '' if it can."""
    ids = fixed_prompt(lm)
    try:
        logits = rounded.own_logits(ids)
    except Exception as error:  # a model's own code may need one dtype throughout
        return f"fails ({first_line(error)})"
    largest = float((logits - lm.own_logits(ids)).abs().max() / lm.logit_spread)
    return "" if largest <= LARGEST_DIFFERENCE else f"differs by {largest:.1e} of their spread"
