"""Where cramming begins: the first vectors of each passage, and the view that reads them.

Random vectors depend only on the passage's token ids and the recipe's seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from memvec import part_checks, plugins, registry
from memvec.companions.around import as_context_at, with_front, with_trigger
from memvec.companions.triggers import trigger_named
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule, in_space
from memvec.passages.passage import ids_hash

if TYPE_CHECKING:
    from memvec.companions.encoder import OnePassEncoder

ENCODER_REACH = 2  # passages of up to this multiple of an encoder's length start near a solution


def passage_seed(ids: Sequence[int], seed: int) -> int:
    """A seed from the passage's token ids and the recipe's seed, independent of order and slot."""
    digest = hashlib.sha256(f"{ids_hash(ids)} {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """Gaussian noise with the embeddings' standard deviation (Kuratov et al., train.py)."""
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    return torch.randn(K, lm.width, generator=generator) * lm.embedding_std


def encoder_of(lm: FrozenLM, recipe: Recipe) -> OnePassEncoder | None:
    """The model's usable encoder for a recipe of usable vectors, else its encoder; None: none."""
    return lm.usable_encoder if recipe.term == "use" else lm.encoder


def start_of(lm: FrozenLM, recipe: Recipe) -> str:
    """The name of the recipe's start, where 'auto' is resolved for this model.

    'auto' is 'encoder' if the model has an encoder that fits, else 'last-tokens' for usable vectors
    and 'noise' for others.
    """
    if recipe.start != "auto":
        return recipe.start
    encoder = encoder_of(lm, recipe)
    if encoder is not None and encoder.fits(lm, recipe):
        return "encoder"
    return "last-tokens" if recipe.term == "use" else "noise"


def start_vectors(
    lm: FrozenLM, passages: Sequence[Sequence[int]], K: int, recipe: Recipe, *, alone: bool = False
) -> list[Float[Tensor, "K D"]]:
    """First vectors of each passage (token ids), float32 on the CPU.

    An encoder reads passages of equal length as one batch, so the batch changes their rounding;
    with `alone` it reads them one by one. The vectors are divided by `context_scale`, because
    context mode multiplies by it. Raises MemvecError if the start is 'encoder' and the model has no
    encoder that fits.
    """
    if (name := start_of(lm, recipe)) == "encoder":
        rows = _encoded(lm, passages, K, recipe, alone=alone)
    else:
        rows = [_started(lm, name, ids, K, recipe) for ids in passages]
    return [vectors / recipe.context_scale for vectors in rows]


def _started(
    lm: FrozenLM, name: str, ids: Sequence[int], K: int, recipe: Recipe
) -> Float[Tensor, "K W"]:
    """The vectors of a registered start, as numbers of the model's space."""
    inputs = registry.get("start", name)(lm, ids, K, recipe)
    part_checks.check_tensor("start", name, inputs, (K, lm.width))
    numbers: Tensor = lm.reading.begun_at(lm, inputs)
    part_checks.check_tensor("space", lm.reading.space, numbers, (K, lm.numbers))
    return numbers


def _encoded(
    lm: FrozenLM, passages: Sequence[Sequence[int]], K: int, recipe: Recipe, *, alone: bool
) -> list[Float[Tensor, "K D"]]:
    """The encoder's vectors of each passage; passages of equal length are read together."""
    if (encoder := encoder_of(lm, recipe)) is None:
        kind, other = ("usable", "last-tokens") if recipe.term == "use" else ("one-pass", "noise")
        raise MemvecError(f"{lm.name} has no {kind} encoder for such vectors: use start '{other}'.")
    encoder.refuse_unfit(lm, recipe)
    batches: dict[int, list[int]] = {}
    for i, ids in enumerate(passages):
        batches.setdefault(i if alone else len(ids), []).append(i)
    vectors: dict[int, Tensor] = {}
    for indices in batches.values():
        table = torch.tensor([list(passages[i]) for i in indices], device=lm.device)
        vectors |= dict(zip(indices, encoder.encode(lm, table, K).cpu(), strict=True))
    return [vectors[i] for i in range(len(passages))]


def view_for(lm: FrozenLM, recipe: Recipe) -> FrozenLM:
    """A view of the model with the recipe's space, context scale, front and trigger.

    The defaults, front 'none' and trigger 'bos', keep the front and trigger of `lm`. Raises
    MemvecError if the model does not support one of the choices.
    """
    lm = as_context_at(in_space(lm, recipe.space, recipe.record()), recipe.context_scale)
    lm = lm if recipe.front == "none" else with_front(lm, recipe.front)
    return lm if recipe.trigger == "bos" else with_trigger(lm, trigger_named(lm, recipe.trigger))


def resolve_start_rule(lm: FrozenLM, recipe: Recipe) -> StartRule:
    """The recipe's start rule, where 'paper' is resolved by the model's tokenizer.

    Raises MemvecError if the space or the model does not support the rule.
    """
    rule = recipe.start_rule
    if rule == "paper":
        rule = "bos" if lm.tokenizer is not None and lm.adds_bos else "first-token"
    if rule not in lm.reading.start_rules:
        rules = " or ".join(lm.reading.start_rules)
        raise MemvecError(
            f"in the space '{lm.reading.space}' a token stands before the first predicted one: "
            f"use the start rule {rules}, not {rule}."
        )
    if rule == "bos" and not lm.trigger:
        raise MemvecError(f"{lm.name} has no BOS token: use the start rule 'vectors'.")
    return rule


def continues(recipe: Recipe) -> bool:
    """True if cramming continues from vectors that were crammed before (memvec.arms.saved)."""
    return plugins.plain(recipe.start) == "saved"


def encoder_reach(lm: FrozenLM, recipe: Recipe, K: int) -> float:
    """The longest passage (tokens) whose start is close to a solution.

    0 means that no passage is, and infinity that all are.
    """
    if continues(recipe):
        return math.inf
    encoder = encoder_of(lm, recipe)
    if encoder is None or start_of(lm, recipe) != "encoder" or not recipe.lr_large:
        return 0.0
    # An encoder with `tokens` 0 reads the whole passage, whatever its length.
    return float(ENCODER_REACH * encoder.tokens * K) or math.inf
