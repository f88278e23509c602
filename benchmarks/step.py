"""Time and memory of one engine step, compared with the bare pass at the same shapes.

    python benchmarks/step.py --quick

The *bare pass* is the model's own forward on [vectors, tokens], the cross-entropy of all positions
through autograd, and the gradient at the vectors. It has no margins, no optimiser and no slots.
There are four parts:

- the model at several numbers of slots and lengths. RESULT `overhead` is the median time of a step
  divided by that of the bare pass at 16 slots, the largest over the lengths;
- a random-weight model with vocabularies up to 131,072, in the same way (not with --quick);
- vocabulary 131,072, 512 tokens, 4 slots: RESULT `memory_ratio` is the peak memory of the step
  divided by that of the bare pass;
- 16 slots with 16 and with 16,384 passages pushed into the engine: RESULT `waiting` is the peak
  memory with many divided by that with few.

The table has a row for each shape, `engine` and `bare`: the median time over n calls with the 10th
and the 90th percentile (`low_ms`, `high_ms`), tokens per second, `mfu`, and the peak memory above
the memory in use before. `mfu` is the share of this machine's rate of matrix products: 4 operations
for each weight and token (2 forward, 2 backward to the input; the weights get no gradient), over
the best rate of a product of square matrices, measured at the start.

`--quick` has fewer shapes, and 7 calls of each instead of 31.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from common import arguments, interleaved, report
from memory import peak_memory
from memvec.cli.program import run_program
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import median_and_spread
from models import SHAPES, random_model

WIDE = {"hidden_size": 256, "intermediate_size": 704}  # sizes of the second part's model
LARGE = (4, 512, 131_072)  # slots, tokens, vocabulary of memory_ratio
LINES = (16, 16_384)  # passages in the engine, for `waiting`


def passages(lm: FrozenLM, n: int, T: int) -> list[Passage]:
    """n passages of T pseudo-random ordinary tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, lm.vocab_size, (n, T), generator=generator)
    return [Passage(tuple(row)) for row in ids.tolist()]


def occupied(
    lm: FrozenLM, batch_size: int, T: int, compute: str = "model", graphs: bool = False
) -> Engine:
    """An engine with every slot taken by T tokens, all of which count.

    `compute` is the field of the recipe with this name.
    """
    # No passage reaches the margin, so all slots stay occupied.
    recipe = Recipe(schedule="whole", margin=1e9, steps=10**9, patience=10**9, compute=compute)
    engine = Engine(lm, recipe, batch_size=batch_size, graphs=graphs)
    for passage in passages(lm, batch_size, T):
        engine.push(passage)
    engine.fill(batch_size)
    return engine


def works(lm: FrozenLM, batch_size: int, T: int) -> dict[str, Callable[[], None]]:
    """An engine step with every slot taken and every position counted, and the bare pass."""
    engine = occupied(lm, batch_size, T)
    ids = engine.batch.ids
    vectors = engine.batch.vectors.clone().requires_grad_()

    def bare() -> None:
        inputs = torch.cat([vectors.to(lm.dtype), lm.embed(ids[:, :-1])], dim=1)
        logits = lm.model(inputs_embeds=inputs, use_cache=False).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
        torch.autograd.grad(loss, vectors)

    return {"engine": engine.step, "bare": bare}


def waiting(lm: FrozenLM, n: int, batch_size: int = 16, T: int = 32) -> int:
    """Peak bytes while n passages are pushed into an engine, which fills its slots and steps."""
    queue = passages(lm, n, T)

    def work() -> None:
        engine = Engine(lm, Recipe(compute="model"), batch_size=batch_size)
        for passage in queue:
            engine.push(passage)
        engine.fill(batch_size)
        for _ in range(3):
            engine.step()

    return peak_memory(work)


def product_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Operations per second of a product of two n × n matrices, the fastest of five."""
    matrix = torch.randn(n, n, device=device).to(dtype)
    seconds = interleaved({"product": lambda: matrix @ matrix}, rounds=5, warmup=2)["product"]
    return 2 * n**3 / min(seconds)


def operations(lm: FrozenLM) -> int:
    """Operations for each token of a forward and a backward to the input: 4 for each weight.

    The embedding counts only where it is the output head as well.
    """
    parameters = sum(p.numel() for p in lm.model.parameters() if p.dim() > 1)
    tied = lm.model.get_output_embeddings().weight is lm.embedding.weight
    return 4 * (parameters - (0 if tied else lm.embedding.weight.numel()))


def measure(
    lm: FrozenLM,
    batch_size: int,
    T: int,
    rounds: int,
    rate: float,
    rows: list[dict[str, Any]],
    warmup: int = 2,
) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of the engine step and the bare pass at one shape.

    Appends a row of each to `rows`. `rate`: the best operations per second of this machine.
    """
    passes = works(lm, batch_size, T)
    seconds = interleaved(passes, rounds, warmup=warmup)
    measured = {}
    for name, values in seconds.items():
        median, low, high = median_and_spread(values)
        measured[name] = {"seconds": median, "peak": peak_memory(passes[name])}
        rows.append(
            {
                "model": lm.name,
                "batch_size": batch_size,
                "tokens": T,
                "vocabulary": lm.vocab_size,
                "what": name,
                "n": len(values),
                "median_ms": 1e3 * median,
                "low_ms": 1e3 * low,
                "high_ms": 1e3 * high,
                "tokens_per_s": batch_size * T / median,
                "mfu": operations(lm) * batch_size * T / median / rate,
                "peak_MiB": measured[name]["peak"] / 2**20,
            }
        )
    return measured


def main() -> None:
    """Measure the four parts."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=31, help="timed calls of each")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    options = parser.parse_args()
    began = time.perf_counter()
    lm = random_model(options.shape) if options.shape else load_lm(options.model)
    quick = options.quick
    shapes = [(16, 32), (16, 64)]
    if not quick:
        shapes = [(1, 32), (4, 32), *shapes, (16, 128), (32, 64)]
    rate = product_rate(lm.device, lm.dtype, 1024 if lm.device.type == "cpu" else 8192)
    rows: list[dict[str, Any]] = []
    overheads = []
    for batch_size, T in shapes:
        measured = measure(lm, batch_size, T, 7 if quick else options.rounds, rate, rows)
        if batch_size == 16:
            overheads.append(measured["engine"]["seconds"] / measured["bare"]["seconds"])
    if not quick:
        for vocabulary in (2048, 32_768, 131_072):
            wide = random_model("tiny-llama", vocab_size=vocabulary, **WIDE)
            for batch_size in (1, 4, 16):
                for T in (32, 128):
                    measure(wide, batch_size, T, max(3, options.rounds // 4), rate, rows)
    batch_size, T, vocabulary = LARGE
    large = random_model("tiny-llama", vocab_size=vocabulary, max_position_embeddings=1024)
    measured = measure(large, batch_size, T, 1 if quick else 3, rate, rows, warmup=1)
    ratio = measured["engine"]["peak"] / measured["bare"]["peak"]
    few, many = (waiting(lm, n) for n in LINES)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; {time.perf_counter() - began:.0f} s")
    report("step", rows, options, overhead=max(overheads), memory_ratio=ratio, waiting=many / few)


if __name__ == "__main__":
    run_program(main)
