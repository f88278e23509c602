"""What steps are computed in: bfloat16 weights where a CPU multiplies them several times faster.

A step needs a direction and margins, and neither needs float32: the vectors and their moments
stay in float32, the frozen weights are rounded for the steps only, and what is called exact has
its margins, and decodes, in the model's own dtype.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memvec.errors import SlowPathWarning
from memvec.model.agreement import TOLERANCE
from memvec.model.norms import join_norms

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

ATTENTION = "memvec_float32"  # the name under which transformers knows `attention`
MIN_PARAMETERS = 4_000_000  # parameters; below, a step is made of other things than products
LARGEST_DIFFERENCE = TOLERANCE[torch.bfloat16]  # of the logits' spread, to the original
# Of each model its copy, or why it is not used.
COPIES: WeakKeyDictionary[nn.Module, nn.Module | str] = WeakKeyDictionary()


def multiplies_bfloat16() -> bool:
    """True if this CPU has instructions for products of bfloat16 matrices, and torch says so."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    says = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in every torch we run on
    return says is not None and bool(says())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kw: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled dot-product attention, computed in float32.

    Some models hand the mask in by its name, so it has the one that transformers gives it.
    torch's kernel for short sequences in bfloat16 takes up to twenty times as long on a CPU, going
    back, and is half of a whole step (docs/log.md).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wide, mask = (t.float() for t in (query, key, value)), attention_mask
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    out, _ = sdpa_attention_forward(module, *wide, mask, **kw)
    return out.to(query.dtype), None


def widen_attention(model: nn.Module) -> None:
    """Give a half-width model on a CPU the attention above, if it takes scaled dot products."""
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
    """The model that steps are computed with: a rounded copy of `lm`, or `lm` itself.

    `compute` is a recipe's: 'model', 'bfloat16', or 'auto', which rounds float32 models of at least
    4 M parameters on CPUs with bfloat16 products. A copy that does not agree with its original is
    not used, and a SlowPathWarning says so.
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
    """A copy of the model with its parameters in bfloat16, made once; a reason if it does not fit.

    Buffers stay as they are: positions' frequencies lose too much.
    """
    if lm.model not in COPIES:
        # What deepcopy finds here it takes for copied: no second float32 model on the way.
        rounded = {
            id(parameter): nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
            for parameter in lm.model.parameters()
        }
        model = copy.deepcopy(lm.model, rounded)
        widen_attention(model)
        join_norms(model)
        COPIES[lm.model] = _disagreement(lm, lm.computed_by(model)) or model
    return COPIES[lm.model]


@torch.no_grad()
def _disagreement(lm: FrozenLM, rounded: FrozenLM) -> str:
    """Why a rounded copy cannot be used; '' if it can."""
    ids = lm._probe_ids()
    try:
        logits = rounded.own_logits(ids)
    except Exception as error:  # a model's own code may need one dtype throughout
        return f"fails ({(str(error).splitlines() or [type(error).__name__])[0]})"
    largest = float((logits - lm.own_logits(ids)).abs().max() / lm.logit_spread)
    return "" if largest <= LARGEST_DIFFERENCE else f"differs by {largest:.1e} of their spread"
