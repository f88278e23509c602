"""Context mode and knocked-out layers, computed slowly and independently of memvec.usable.

As in memvec.lab.slow, one text at a time goes through the model's own forward, with log
probabilities in float64 with numpy. A layer is knocked out by running its attention on the two
parts separately (no mask), gradients are taken one word at a time, and spans are compared by least
squares. A word is one token of a held-out text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memvec.lab import slow
from memvec.model.lm import FrozenLM

Floats = NDArray[np.float64]


def log_probabilities(
    lm: FrozenLM, vectors: Tensor | None, before: Sequence[int], words: Sequence[int]
) -> Floats:
    """(len(words), V) log-probabilities, nats, at each word after [vectors (K, D), before]."""
    table = slow.logits(lm, vectors, [*before, *words])[-len(words) - 1 : -1]
    table = table - table.max(1, keepdims=True)
    return np.asarray(table - np.log(np.exp(table).sum(1, keepdims=True)))


def context_ids(lm: FrozenLM, ids: Sequence[int], K: int) -> dict[str, list[int]]:
    """Token ids of each context by its name: the text, nothing, and the last tokens of the text."""
    bos = [] if lm.bos_id is None else [lm.bos_id]
    ends = {n: list(ids)[len(ids) - n :] for n in (K, 2 * K, 4 * K, 8 * K) if n < len(ids)}
    named = {f"last {n} tokens": [*bos, *end] for n, end in ends.items()}
    text = list(ids) if ids[0] == lm.bos_id else [*bos, *ids]
    return {"text": text, "nothing": bos, **named}


def divergence_and_nll(  # noqa: PLR0917 (what is read, and the words after it)
    lm: FrozenLM,
    vectors: Tensor | None,
    before: Sequence[int],
    text: Sequence[int],
    words: Any,
    given: int = 0,
) -> tuple[float, float]:
    """(KL divergence from the model after `text`, NLL of the words), nats per word.

    Both are measured after [vectors (K, D), before]. The first `given` words of each row are read
    and not predicted.
    """
    kl, nll = [], []
    for row in words:
        first, predicted = row[:given], row[given:]
        p = log_probabilities(lm, None, [*text, *first], predicted)
        q = log_probabilities(lm, vectors, [*before, *first], predicted)
        kl.append(float((np.exp(p) * (p - q)).sum(1).mean()))
        nll.append(-float(q[np.arange(len(predicted)), predicted].mean()))
    return float(np.mean(kl)), float(np.mean(nll))


def both_modes(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int], words: Any, layers: Collection[int] = ()
) -> tuple[list[float], bool]:
    """([leading right tokens, mean margin, KL as context], whether a margin is nearly zero).

    Attention to the vectors (K, D) is knocked out in `layers`. Margins are logits of decoding mode,
    the KL divergence is that of context mode in nats per word. Where a margin is nearly zero, the
    number of leading right tokens may differ by rounding.
    """
    text = context_ids(lm, ids, len(vectors))["text"]
    with apart(lm, layers, len(vectors)):
        _, margin = slow.teacher_forced(lm, vectors, ids, "bos")
        after = [log_probabilities(lm, lm.context_scale * vectors, [], row) for row in words]
    kl = []
    for row, q in zip(words, after, strict=True):
        p = log_probabilities(lm, None, text, row)
        kl.append(float((np.exp(p) * (p - q)).sum(1).mean()))
    leading = int(np.cumprod(margin > 0).sum())
    tie = bool((np.abs(margin) < 1e-2).any())
    return [float(leading), float(margin.mean()), float(np.mean(kl))], tie


@contextlib.contextmanager
def apart(lm: FrozenLM, layers: Collection[int], K: int) -> Iterator[None]:
    """Knock out attention to the K vectors in these layers while the context is open.

    The attention of such a layer is computed once for the first F + K positions, and once for all
    positions but the vectors, so that no later position attends to a vector.
    """
    named = [
        module
        for name, module in lm.model.named_modules()
        if name.rsplit(".", 1)[-1] in ("self_attn", "self_attention", "attention", "attn")
    ]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            module: Any = named[layer]
            module.forward = _in_two(module.forward, len(lm.front), K)
            stack.callback(delattr, module, "forward")
        yield


def _in_two(forward: Callable[..., Any], F: int, K: int) -> Callable[..., Any]:
    def run(hidden_states: Tensor, **options: Any) -> Any:
        parts, N = [], hidden_states.shape[1]
        for part in ([*range(F + K)], [*range(F), *range(F + K, N)]):
            part_options = dict(options)
            part_options["position_embeddings"] = tuple(
                x[:, part] for x in options["position_embeddings"]
            )
            if options.get("attention_mask") is not None:
                part_options["attention_mask"] = options["attention_mask"][..., part, :][..., part]
            if options.get("position_ids") is not None:
                part_options["position_ids"] = options["position_ids"][:, part]
            parts.append(forward(hidden_states=hidden_states[:, part], **part_options))
        return torch.cat([parts[0][0], parts[1][0][:, F:]], 1), *parts[0][1:]

    return run


def margin_gradients(lm: FrozenLM, vectors: Tensor, ids: Sequence[int]) -> Floats:
    """(T, K·D) gradients of each token's margin (logits) in decoding mode, at vectors (K, D)."""
    rows = []
    for at, token in enumerate(ids):
        point, logits = _last_logits(lm, vectors, [*lm.trigger, *ids[:at]])
        others = torch.cat([logits[:token], logits[token + 1 :]])
        (gradient,) = torch.autograd.grad(logits[token] - others.max(), point)
        rows.append(gradient.double().cpu().numpy().ravel())
    return np.stack(rows)


def word_gradients(lm: FrozenLM, vectors: Tensor, words: Any, n: int) -> Floats:
    """(n, K·D) gradients of the log-probability of n words in context mode, at vectors (K, D).

    The words are spread evenly over the texts.
    """
    rows, flat = [], [(row, at) for row in words for at in range(len(row))]
    for i in range(n):
        row, at = flat[len(flat) * i // n]
        point, logits = _last_logits(lm, lm.context_scale * vectors, row[:at])
        (gradient,) = torch.autograd.grad(logits[row[at]] - logits.logsumexp(0), point)
        rows.append(gradient.double().cpu().numpy().ravel())
    return np.stack(rows)


def share_inside(rows: Floats, others: Floats) -> float:
    """Mean share of a row's squared length inside the span of `others`; both (rows, K·D)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return float(1 - (residual(unit, others) ** 2).sum(1).mean())


def residual(rows: Floats, others: Floats) -> Floats:
    """The part of each row (rows, K·D) outside the span of `others`, by least squares."""
    A = (others / np.linalg.norm(others, axis=1, keepdims=True)).T
    fitted, *_ = np.linalg.lstsq(A, rows.T, rcond=None)
    return np.asarray(rows - (A @ fitted).T)


def _last_logits(lm: FrozenLM, vectors: Tensor, ids: Sequence[int | None]) -> tuple[Tensor, Tensor]:
    """(the vectors (K, D) as a leaf of autograd, the logits (V,) after [vectors, ids])."""
    table = torch.tensor([[i for i in ids if i is not None]], device=lm.device, dtype=torch.long)
    with torch.enable_grad():
        point = vectors.to(lm.device, lm.dtype).detach().clone().requires_grad_()
        inputs = torch.cat([slow.first_rows(lm)[None], point[None], lm.embed(table)], 1)
        logits = lm.model(inputs_embeds=inputs, use_cache=False).logits[0, -1].float()
    return point, logits
