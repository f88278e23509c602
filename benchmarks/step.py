"""One engine step against bare forward + backward-to-input at the same shapes.

    python benchmarks/step.py --quick

Bare means: the model's own forward on [vectors, tokens], cross-entropy of all positions, gradient
at the vectors; no margins, no optimiser, no seats. RESULT overhead is the ratio of medians at 16
seats, worst case over the lengths.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from common import arguments, interleaved, median_and_spread, report
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.lm import FrozenLM, load_lm
from memvec.passages.passage import Passage


def passages(lm: FrozenLM, n: int, T: int) -> list[Passage]:
    """n passages of T pseudo-random ordinary tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, lm.vocab_size, (n, T), generator=generator)
    return [Passage(tuple(row)) for row in ids.tolist()]


def main() -> None:
    """Time both, side by side, for several shapes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    lm = load_lm(options.model)
    shapes = (
        [(16, 32), (16, 64)]
        if options.quick
        else [(1, 32), (4, 32), (16, 32), (16, 64), (16, 128), (32, 64)]
    )
    rounds = 15 if options.quick else options.rounds
    rows, overheads = [], []
    for seats, T in shapes:
        # A margin nobody reaches: all seats stay occupied, every position counts.
        recipe = Recipe.of("default", schedule="whole", margin=1e9, steps=10**9, patience=10**9)
        engine = Engine(lm, recipe, seats=seats)
        for passage in passages(lm, seats, T):
            engine.push(passage)
        engine._seat_waiting(seats)
        ids = engine.state["ids"]
        vectors = engine.state["vectors"].clone().requires_grad_()

        def bare(vectors: torch.Tensor = vectors, ids: torch.Tensor = ids) -> None:
            inputs = torch.cat([vectors.to(lm.dtype), lm.embed(ids[:, :-1])], dim=1)
            logits = lm.model(inputs_embeds=inputs, use_cache=False).logits.float()
            loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
            torch.autograd.grad(loss, vectors)

        seconds = interleaved({"engine": engine.step, "bare": bare}, rounds, warmup=3)
        medians = {}
        for name, values in seconds.items():
            median, low, high = median_and_spread(values)
            medians[name] = median
            rows.append(
                {
                    "seats": seats,
                    "tokens": T,
                    "what": name,
                    "n": len(values),
                    "median_ms": 1e3 * median,
                    "low_ms": 1e3 * low,
                    "high_ms": 1e3 * high,
                    "tokens_per_s": seats * T / median,
                }
            )
        if seats == 16:
            overheads.append(medians["engine"] / medians["bare"])
    report("step", rows, options, overhead=max(overheads))


if __name__ == "__main__":
    main()
