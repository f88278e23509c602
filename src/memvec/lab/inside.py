"""How the model processes vectors: attention on them, predictions of each layer, and their path.

Three measurements of vectors (K, D) that are followed by a start token and the passage:

- the share of attention on the vectors in each layer (`attention_shares`);
- the logit lens (nostalgebraist 2020): the prediction that the final norm and the head make from
  each layer's state at the position that predicts the first token (`logit_lens`);
- the path of the vectors during optimisation, in the plane of its first two principal components
  (`Path`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memvec import metrics
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@contextlib.contextmanager
def eager(lm: FrozenLM) -> Iterator[None]:
    """Use eager attention while the context is open, which returns the attention weights.

    Raises MemvecError for a model without eager attention.
    """
    before = getattr(lm.config, "_attn_implementation", None)
    change: Any = getattr(lm.model, "set_attn_implementation", None)
    if before is None or change is None:
        raise MemvecError(f"{lm.name} has no attention whose weights could be read.")
    try:
        change("eager")
        yield
    except ValueError as error:  # raised by transformers if the model lacks the implementation
        raise MemvecError(f"{lm.name} has no attention whose weights could be read.") from error
    finally:
        change(before)


@torch.no_grad()
def attention_shares(lm: FrozenLM, inputs: Float[Tensor, "1 N D"], K: int) -> list[float]:
    """For each layer, the share of attention on the first K inputs.

    It is the mean over heads and over the positions after these inputs. Raises MemvecError for a
    model without attention weights.
    """
    with eager(lm):
        out = lm.model(inputs_embeds=inputs.to(lm.dtype), use_cache=False, output_attentions=True)
    tables = getattr(out, "attentions", None) or ()
    layers = [table for table in tables if table is not None and table.dim() == 4]
    if len(layers) != int(lm.config.get_text_config().num_hidden_layers):
        raise MemvecError(f"{lm.name} has no attention whose weights could be read.")
    return [float(table[0, :, K:, :K].float().sum(-1).mean()) for table in layers]


@torch.no_grad()
def logit_lens(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], position: int, token: int
) -> list[list[float]]:
    """For each layer, [-log2 p of a token in bits, its rank (1: the arg-max), id of the arg-max].

    The layer's state at `position` goes directly through the final norm and the head. Raises
    MemvecError for a model without a final norm under a known name, or without a split head.
    """
    answers: list[list[float]] = []
    norm, layers = _norm_and_layers(lm)
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        states.append((out[0] if isinstance(out, tuple) else out)[:, position])

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        last = lm.hidden(inputs.to(lm.dtype), keep=inputs.shape[1])[:, position]
    finally:
        for hook in hooks:
            hook.remove()
    looked = norm(states[-1])
    if looked.shape != last.shape or not torch.allclose(looked, last, atol=1e-2, rtol=1e-2):
        raise _no_lens(lm)
    for state in states:
        logits = lm.head(norm(state))[0]
        truth = torch.tensor([[token]], device=logits.device)
        bits = float(metrics.surprisal(logits[None, None], truth)[0, 0])
        rank = 1 + int((logits > logits[token]).sum())
        answers.append([bits, float(rank), float(logits.argmax())])
    return answers


def _norm_and_layers(lm: FrozenLM) -> tuple[nn.Module, list[nn.Module]]:
    count = int(getattr(lm.config.get_text_config(), "num_hidden_layers", 0))
    stacks = [m for m in lm.model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    inner = {id(module) for stack in stacks for module in stack.modules()}  # has norms of its own
    modules = [(name, m) for name, m in lm.model.named_modules() if id(m) not in inner]
    named = {name.rsplit(".", 1)[-1]: module for name, module in modules}
    norm = next((named[name] for name in NORMS if name in named), None)
    if not stacks or norm is None or not lm.has_split_head:
        raise _no_lens(lm)
    return norm, list(stacks[0])


def _no_lens(lm: FrozenLM) -> MemvecError:
    return MemvecError(f"{lm.name} has no final norm where a logit lens could look through.")


class Path(NamedTuple):
    """The vectors of each step in the plane of their first two principal components."""

    x: list[float]
    y: list[float]
    leading: list[int]  # leading tokens that each step's best vectors gave back
    explained: float  # share of the variance inside the plane


def path_of(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe, storage: str) -> Path:
    """Cram a passage of T token ids alone into K vectors, and return the path of the vectors.

    The path has one point for each optimiser step, and a last one for the vectors that are kept.
    """
    points: list[Tensor] = []
    leading: list[int] = []
    engine = Engine(lm, recipe, vectors=K, batch_size=1, storage=storage, poll=1)

    def look(_: Any) -> None:
        if engine.batch is not None:
            vectors = engine.stepper.coordinates.vectors(engine.batch.parameters.detach())
            points.append(vectors[0].flatten().double().cpu())
            leading.append(max(0, int(engine.batch.schedule.best[0])))

    engine.on_progress = look
    (outcome,) = engine.run([Passage(tuple(ids))])
    points.append(outcome.vectors.flatten().double())  # the vectors that are kept
    leading.append(outcome.metrics.horizon)
    if len(points) < 3:
        return Path([0.0] * len(points), [0.0] * len(points), leading, 1.0)
    rows = torch.stack(points)
    rows = rows - rows.mean(0)
    left, sizes, _ = torch.linalg.svd(rows, full_matrices=False)
    plane = left[:, :2] * sizes[:2]
    plane = plane * torch.sign(plane[-1])  # the sign is arbitrary: the end is positive
    explained = float(sizes[:2].square().sum() / sizes.square().sum().clamp_min(1e-30))
    return Path(plane[:, 0].tolist(), plane[:, 1].tolist(), leading, explained)
