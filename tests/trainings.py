"""Helpers for tests of every encoder's training: text, a step's gradient, an interrupted run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memvec.companions.encoder import TrainedEncoder
from memvec.companions.encoder_files import load_encoder, save_encoder
from memvec.encoders.training_run import TrainingRun
from memvec.model.lm import FrozenLM


def stream(lm: FrozenLM, n: int = 4000, seed: int = 0) -> torch.Tensor:
    """Token ids with a pattern to learn: every second token is the one before plus 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, lm.vocab_size, (n,), generator=generator)
    ids[1::2] = (ids[::2] + 1).clamp_max(lm.vocab_size - 1)
    return ids


def one_step(training: TrainingRun) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The ids (B, T) that one step takes, and its gradient by parameter, before any clipping.

    No parameter moves; those without a gradient are left out.
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
    """The gradient `found` equals autograd's gradient of `loss`."""
    parameters = {k: p for k, p in training.network.named_parameters() if k in found}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, **tolerance)


def stopped_and_resumed(
    make: Callable[[], TrainingRun], partial: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[TrainedEncoder, list[Any]]:
    """A run that is interrupted after step `stop` and resumed gives the uninterrupted encoder.

    Returns the encoder, and the reports of the resumed part.
    """
    monkeypatch.setattr("memvec.encoders.resumable.CHECKPOINT_EVERY", 1)
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


def assert_moves_the_encoder_alone(training: TrainingRun) -> TrainedEncoder:
    """Every tensor of the network is changed and none of the model; returns the encoder.

    For encoders whose files are in bfloat16.
    """
    lm = training.lm
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    start = {k: v.clone() for k, v in training.network.state_dict().items()}
    encoder = training.run()
    for key, value in lm.model.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.grad is None
    now = {k: v.float() for k, v in encoder.network.state_dict().items()}
    still = {k for k in start if torch.equal(now[k], start[k].bfloat16().float())}
    assert still == set()
    return encoder


def assert_reads_batched_and_reloaded(
    lm: FrozenLM, encoder: TrainedEncoder, ids: torch.Tensor, K: int, file: Path
) -> TrainedEncoder:
    """K vectors of a batch equal those of each passage alone, and those of the reloaded encoder.

    Returns the reloaded encoder.
    """
    together = encoder.encode(lm, ids, K)
    assert together.shape == (len(ids), K, lm.width)
    alone = torch.cat([encoder.encode(lm, row[None], K) for row in ids])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    save_encoder(file, encoder, lm, {"steps": 1})
    again = load_encoder(file, lm)
    torch.testing.assert_close(again.encode(lm, ids, K), together, rtol=1e-4, atol=1e-5)
    return again


def assert_reads_in_another_dtype(
    encoder: TrainedEncoder, lm: FrozenLM, half: FrozenLM, file: Path
) -> None:
    """Loaded for the model in bfloat16, the encoder makes nearly the same vectors, in float32."""
    save_encoder(file, encoder, lm)
    ids = stream(lm, 12).view(2, 6)
    found, exact = load_encoder(file, half).encode(half, ids, 2), encoder.encode(lm, ids, 2)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max() / exact.abs().max()) < 0.1
