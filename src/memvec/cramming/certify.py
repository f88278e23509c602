"""From 'every margin was met' to 'exact': stored vectors are reloaded, decoded and measured.

Everything in an outcome's record is measured here, in one place, on the vectors as they will be
stored: nothing is carried over from the optimisation but its costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import metrics
from memvec.corrections import Corrections, pick
from memvec.cramming.objective import CHUNK
from memvec.decoding import decode_ids, first_error
from memvec.model.lm import FrozenLM, StartRule
from memvec.passages.passage import Passage
from memvec.storage import Storage

Status = Literal["done", "budget", "not-finite"]


@dataclass(frozen=True)
class Finished:
    """A passage that left its slot: 'done' (every margin met), 'budget' or 'not-finite'."""

    passage: Passage
    vectors: Tensor  # (K, D) float32, already rounded as they will be stored
    status: Status
    margin_asked: float
    steps: int
    spent: int
    seconds: float


@dataclass(frozen=True)
class PassageMetrics:
    """What the stored vectors of one passage were measured to do. All sums over the same positions.

    Fields carry their unit in `metadata['help']`, which the docs and tables use.
    """

    tokens: int = field(metadata={"help": "tokens of the passage"})
    predicted: int = field(metadata={"help": "tokens that had to come from the vectors"})
    horizon: int = field(metadata={"help": "leading tokens that free-running decoding gave back"})
    accuracy: float = field(metadata={"help": "teacher-forced accuracy"})
    margin: float = field(metadata={"help": "smallest margin of tokens not corrected, logits"})
    lm_bits: float = field(metadata={"help": "H_LM: bits of the passage under the model alone"})
    mem_bits: float = field(metadata={"help": "H_mem: bits left with the vectors"})
    information_gain: float = field(metadata={"help": "H_LM - H_mem, bits"})
    token_gain: int = field(metadata={"help": "tokens right with the vectors minus without"})

    def record(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome(Finished):
    """A finished passage with its measures; `exact` is decided by free-running decoding alone.

    Decoding puts the listed `corrections` in their places; there are none unless they were allowed.
    """

    exact: bool
    metrics: PassageMetrics
    corrections: Corrections = ()


@torch.no_grad()
def certify(
    lm: FrozenLM,
    finished: Sequence[Finished],
    start: StartRule,
    storage: Storage,
    corrections: int = 0,
) -> Iterator[Outcome]:
    """Decode and measure finished passages in a batch, from the vectors as stored.

    Up to `corrections` tokens of each passage, those furthest below the margin asked, are listed.
    """
    if not finished:
        return
    # The very rounding that a file makes; a reader sees these numbers and no others.
    vectors = storage.rounded(torch.stack([f.vectors.float() for f in finished]))
    passages = [f.passage for f in finished]
    usable = torch.isfinite(vectors).flatten(1).all(1)
    vectors = torch.where(usable[:, None, None], vectors, 0.0)
    given = int(start == "first-token")
    found = positions(lm, vectors, passages, start)
    listed = [
        pick(row[: len(f.passage) - given], f.passage.ids, f.margin_asked, corrections)
        for f, row in zip(finished, found[1], strict=True)
    ]
    decoded = decode_ids(
        lm,
        vectors,
        [len(p) for p in passages],
        start=start,
        first=[p.ids[0] for p in passages] if start == "first-token" else None,
        corrections=listed,
    )
    measured = _figures(found, passages, start, listed)
    for f, kept, ids, figures, fixed in zip(
        finished, vectors, decoded, measured, listed, strict=True
    ):
        error = first_error(ids, f.passage.ids)
        right = len(f.passage) - given if error is None else error - given
        yield Outcome(
            **{**vars(f), "vectors": kept.to(storage.dtype)},  # a file holds finite numbers only
            exact=error is None and bool(torch.isfinite(f.vectors).all()),
            metrics=PassageMetrics(**{**figures, "horizon": right}),
            corrections=fixed,
        )


@torch.no_grad()
def measure(
    lm: FrozenLM,
    vectors: Float[Tensor, "B K D"],
    passages: Sequence[Passage],
    start: StartRule,
) -> list[dict[str, Any]]:
    """Teacher-forced measures of each passage, with its vectors and without."""
    return _figures(positions(lm, vectors, passages, start), passages, start, [()] * len(passages))


def _figures(
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    passages: Sequence[Passage],
    start: StartRule,
    listed: Sequence[Corrections],
) -> list[dict[str, Any]]:
    """The measures of `measure` from those of `positions`. Margins leave corrected tokens out."""
    bits, margin, base_bits, base_margin = found
    given = int(start == "first-token")
    rows = []
    for i, passage in enumerate(passages):
        n = len(passage) - given
        right, right_without = margin[i, :n] > 0, base_margin[i, :n] > 0
        fixed = {position - given for position, _ in listed[i]}
        kept = [t for t in range(n) if t not in fixed]
        rows.append(
            {
                "tokens": len(passage),
                "predicted": n,
                "accuracy": metrics.teacher_forced_accuracy(right),
                "margin": float(margin[i, kept].min()),
                "lm_bits": float(base_bits[i, :n].double().sum()),
                "mem_bits": float(bits[i, :n].double().sum()),
                "information_gain": metrics.information_gain(bits[i, :n], base_bits[i, :n]),
                "token_gain": metrics.token_gain(right, right_without),
            }
        )
    return rows


@torch.no_grad()
def positions(
    lm: FrozenLM,
    vectors: Float[Tensor, "B K D"],
    passages: Sequence[Passage],
    start: StartRule,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Bits and margin of each predicted position with the vectors, then the same without them.

    Rows of shorter passages are right-padded; what stands in the padding means nothing.
    """
    B, longest, given = len(passages), max(len(p) for p in passages), int(start == "first-token")
    ids = torch.zeros(B, longest, dtype=torch.long)
    for row, passage in zip(ids, passages, strict=True):
        row[: len(passage)] = torch.tensor(passage.ids)
    ids = ids.to(lm.device)
    bits, margin = _positions(lm, lm.states(vectors.to(lm.device), ids, start), ids[:, given:])
    if start == "first-token" or lm.bos_id is not None:
        base = lm.states(None, ids, "first-token" if start == "first-token" else "bos")
        base_bits, base_margin = _positions(lm, base, ids[:, given:])
    else:
        # No token starts a text for this model: the first token costs log2 V without vectors.
        base_bits = base_margin = bits.new_empty(B, 0)
        if longest > 1:
            states = lm.states(None, ids, "first-token")
            base_bits, base_margin = _positions(lm, states, ids[:, 1:])
        first = torch.full((B, 1), float(torch.tensor(float(lm.vocab_size)).log2()))
        base_bits = torch.cat([first, base_bits], dim=1)
        base_margin = torch.cat([torch.full_like(first, -1.0), base_margin], dim=1)
    return bits, margin, base_bits, base_margin


def _positions(
    lm: FrozenLM, states: Float[Tensor, "B T H"], ids: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Bits and margin of each position, a few rows of logits at a time, on the CPU."""
    B, T, H = states.shape
    flat, truth = states.reshape(1, B * T, H), ids.reshape(1, -1)
    rows = max(1, CHUNK // lm.vocab_size)
    bits, margin = [], []
    for at in range(0, B * T, rows):
        logits = lm.head(flat[:, at : at + rows])
        bits.append(metrics.surprisal(logits, truth[:, at : at + rows])[0].cpu())
        margin.append(metrics.margins(logits, truth[:, at : at + rows])[0].cpu())
    return torch.cat(bits).reshape(B, T), torch.cat(margin).reshape(B, T)
