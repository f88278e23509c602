"""What tests of every encoder's training share: text, a step's gradient, a run that is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memvec.encoders.base import TrainedEncoder
from memvec.encoders.training_run import TrainingRun
from memvec.model.lm import FrozenLM


def stream(lm: FrozenLM, n: int = 4000, seed: int = 0) -> torch.Tensor:
    """Token ids with something to learn: half of the tokens follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, lm.vocab_size, (n,), generator=generator)
    ids[1::2] = (ids[::2] + 1).clamp_max(lm.vocab_size - 1)
    return ids


def one_step(training: TrainingRun) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The ids (B, T) that one step takes, and the gradient that it moves by, before any clipping.

    Nothing moves; parameters without a gradient are left out.
    """
    seen: dict[str, Any] = {}
    training.optimizer.step = lambda: seen.update(
        {k: p.grad.clone() for k, p in training.network.named_parameters() if p.grad is not None}
    )
    given = training._windows
    training._windows = lambda *a: seen.setdefault("ids", given(*a))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
        training._train_step()
    return seen.pop("ids"), seen


def assert_gradient_of(
    training: TrainingRun, loss: torch.Tensor, found: dict[str, torch.Tensor], **tolerance: float
) -> None:
    """The gradient that was found is autograd's of a loss that is written out."""
    parameters = {k: p for k, p in training.network.named_parameters() if k in found}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, **tolerance)


def stopped_and_resumed(
    make: Callable[[], TrainingRun], partial: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[TrainedEncoder, list[Any]]:
    """A run that is interrupted behind step `stop` and goes on: the encoder of one that was not.

    Returns the encoder, and what the second half reported.
    """
    monkeypatch.setattr("memvec.encoders.training_run.CHECKPOINT_EVERY", 1)
    whole = make().run()

    def interrupt(now: Any) -> None:
        if now.step > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make().run(partial, interrupt)
    seen: list[Any] = []
    again = make().run(partial, seen.append)
    assert [now.step for now in seen] == list(range(stop + 1, seen[-1].steps + 1))
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])
    assert whole.tokens == again.tokens
    return again, seen
