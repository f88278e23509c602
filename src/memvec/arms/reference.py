"""The paper's cramming loop for one passage, in plain PyTorch: read this file first.

Kuratov et al. (ACL 2025), section 3: K vectors in front of a passage are the only parameters, and
the model is frozen. The loss is the mean cross-entropy of the passage's tokens, each predicted from
the vectors and the true tokens before it. The engine (memvec.cramming.engine) does this for many
passages at once, and the tests compare it with this function.

One detail differs from the published code: the returned vectors are the measured ones, not those
after one more step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule


def cram_one(
    lm: FrozenLM,
    ids: list[int],
    initial: Float[Tensor, "K D"],
    *,
    start_rule: StartRule = "vectors",
    steps: int = 4999,
    patience: int = 2000,
    lr: float = 0.01,
) -> tuple[Float[Tensor, "K D"], int, list[float]]:
    """Cram T token ids into K vectors, beginning at `initial` (in the paper, `starts.noise`).

    Returns the best vectors (K, D), their number of right tokens with teacher forcing, and the loss
    (nats per token) of every step. It stops when all tokens are right, after `steps` moves, or
    after `patience` measurements without more right tokens than before. `start_rule` says what
    follows the vectors: nothing, the model's BOS, or the passage's first token, which is then
    given.
    """
    tokens = torch.tensor([ids], device=lm.device)  # (1, T)
    predicted = tokens[:, 1:] if start_rule == "first-token" else tokens
    vectors = initial.to(lm.device).float()[None].clone().requires_grad_()  # (1, K, D)
    optimizer = torch.optim.AdamW([vectors], lr=lr, betas=(0.9, 0.9), weight_decay=0.01)
    best, best_right, stale, losses = vectors.detach().clone(), -1, 0, []
    while True:
        logits = lm.logits(vectors, tokens, start_rule)  # (1, N, V); N = T, or T - 1: one is given
        loss = cross_entropy(logits[0], predicted[0])
        right = int((logits.argmax(-1) == predicted).sum())
        losses.append(loss.item())
        stale += 1
        if right > best_right:
            best, best_right, stale = vectors.detach().clone(), right, 0 if right else stale
        if best_right == predicted.shape[1] or len(losses) > steps or stale >= patience:
            return best[0], best_right, losses
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
