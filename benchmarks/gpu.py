"""How near a step is to the machine's limit, and how it spends the rest of its time; any device.

    python benchmarks/gpu.py                   # on a GPU: the shapes of Llama 3.2 1B and 3.1 8B
    python benchmarks/gpu.py --graphs          # each step also replayed from CUDA graphs
    python benchmarks/gpu.py --quick
    python benchmarks/gpu.py --shapes pocket pythia-160m --slots 1 8 32 --tokens 16 64 256

For each shape x slots x tokens, an engine step with every slot taken and every position counted, in
the dtype that steps really use, beside a bare forward and backward to the vectors of the same
module (autograd through the whole cross-entropy, nothing else), turn by turn:

- `mfu`: operations of the step over its time, as a share of the best square product of this machine
  in that dtype, measured at the start. Operations: 4 for each weight and token (2 forward, 2
  backward to the input; weights get no gradient), and 6 T for each token, layer and number of the
  attention (causal, forward and backward).
- `overhead`: the engine's median time over the bare one's.
- `outside`: share of the operators' own time that is neither a matrix product nor attention.
- `launch`: share of the time in which a GPU computes nothing, waiting for kernels.
- with `--graphs`, turn by turn with both: `graphs ms`, `graphs mfu`, how many `times` faster than
  the engine without, and the seconds of the step that captures (`capture s`).
- `passages`: exact passages a minute, all slots filled twice with `--crammed` random tokens for one
  vector, from noise; 0 leaves it out.

A cell that does not fit the model's context, or whose step would take longer than `--longest`
seconds at half of the machine's rate, is left out, and a line says so. Weights are random, so every
shape is made in memory, on the device.
RESULT: the smallest MFU, the largest overhead; with `--graphs` how many times faster, at least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from common import arguments, interleaved, report, run
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.statistics import median_and_spread
from models import SHAPES, random_model
from step import occupied, operations, product_rate
from texts import random_tokens

# Operators that are matrix products, or made of them; all others are what `outside` counts.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "attention", "convolution")
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of the square products that set the peak


def step_operations(lm: FrozenLM, slots: int, T: int) -> float:
    """Operations of a forward and a backward to the input of so many rows (see the top)."""
    config = lm.config.get_text_config()
    attention = 6 * T * int(config.hidden_size) * int(config.num_hidden_layers)
    return float(slots * T * (operations(lm) + attention))


def shares(work: Any, device: torch.device) -> tuple[float, float | None]:
    """`outside`, and `launch` on a GPU, of one call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    on_gpu = device.type == "cuda"
    operator_times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profile.key_averages()
        if event.key.startswith("aten::")
    }
    total = sum(operator_times.values())
    products = sum(t for key, t in operator_times.items() if any(part in key for part in PRODUCTS))
    outside = 1 - products / total if total else 0.0
    return outside, max(0.0, 1 - total * 1e-6 / wall) if on_gpu else None


def model_of(name: str) -> FrozenLM:
    """A shape with random weights, made on the device; or a model by name."""
    return random_model(name, on_device=True) if name in SHAPES else load_lm(name)


def captured(lm: FrozenLM, slots: int, T: int) -> tuple[Engine, float]:
    """An engine whose next step is a replay, and the seconds of the step that captured it."""
    engine = occupied(lm, slots, T, compute="auto", graphs=True)
    engine.step()  # as it is
    return engine, interleaved({"capture": engine.step}, rounds=1, warmup=0)["capture"][0]


def cell(
    lm: FrozenLM, slots: int, T: int, rounds: int, rate: float, graphs: bool = False
) -> dict[str, Any]:
    """One row: the times of a step, and the shares of the engine's time."""
    engine = occupied(lm, slots, T, compute="auto")
    module = engine.module
    ids, vectors = engine.batch.ids, engine.batch.vectors.clone().requires_grad_()

    def bare() -> None:
        inputs = torch.cat([vectors.to(module.dtype), module.embed(ids[:, :-1])], dim=1)
        logits = module.model(inputs_embeds=inputs, use_cache=False).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
        torch.autograd.grad(loss, vectors)

    works, capture = {"engine": engine.step, "bare": bare}, 0.0
    if graphs:
        replayed, capture = captured(lm, slots, T)
        works["graphs"] = replayed.step
    seconds = interleaved(works, rounds, warmup=1)
    median, low, high = median_and_spread(seconds["engine"])
    outside, launch = shares(engine.step, lm.device)
    row = {
        "model": lm.name,
        "slots": slots,
        "tokens": T,
        "dtype": str(module.rounding).removeprefix("torch."),
        "ms": 1e3 * median,
        "p10": 1e3 * low,
        "p90": 1e3 * high,
        "n": rounds,
        "tokens/s": slots * T / median,
        "GFLOP/s": step_operations(lm, slots, T) / median / 1e9,
        "mfu": step_operations(lm, slots, T) / median / rate,
        "overhead": median / statistics.median(seconds["bare"]),
        "outside": outside,
        "launch": "" if launch is None else launch,
    }
    if graphs:
        again = statistics.median(seconds["graphs"])
        row |= {"graphs ms": 1e3 * again, "graphs mfu": row["mfu"] * median / again}
        row |= {"times": median / again, "capture s": capture}
    return row


def left_out(lm: FrozenLM, slots: int, T: int, max_operations: float) -> str | None:
    """Why a cell is left out, or None; a step may have `max_operations` operations."""
    if lm.context is not None and lm.context <= T:
        return f"its context is {lm.context}"
    return "a step takes too long" if step_operations(lm, slots, T) > max_operations else None


def passages_a_minute(
    lm: FrozenLM, slots: int, tokens: int, graphs: bool = False
) -> tuple[float, int]:
    """Exact passages a minute, and how many of all were exact; decoding that certifies is in it."""
    passages = random_tokens(lm, 2 * slots, tokens)
    engine = Engine(lm, Recipe(start="noise", steps=400), batch_size=slots, graphs=graphs)
    began = time.perf_counter()
    exact = sum(outcome.exact for outcome in engine.run(passages))
    return 60 * exact / (time.perf_counter() - began), exact


def chosen(options: argparse.Namespace) -> tuple[list[str], list[int], list[int], int]:
    """Shapes, slots, tokens and rounds: those of the options, or defaults for the device."""
    gpu = torch.cuda.is_available()
    shapes = ["llama-3.2-1b", "llama-3.1-8b"] if gpu else ["pocket", "pythia-160m", "llama-3.2-1b"]
    slots, tokens = ([8, 32, 128], [32, 128, 512]) if gpu else ([1, 8, 32], [16, 64, 256, 512])
    if options.quick:
        shapes, slots, tokens = ["tiny-llama"], [8], [32]
    rounds = 3 if options.quick else options.rounds
    return options.shapes or shapes, options.slots or slots, options.tokens or tokens, rounds


def main() -> None:
    """The grid, then passages a minute of each shape at the most slots."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}, or models")
    parser.add_argument("--slots", nargs="+", type=int)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=float, default=20.0)
    parser.add_argument("--crammed", type=int, default=4)
    parser.add_argument("--graphs", action="store_true", help="also replayed steps; CUDA only")
    options = parser.parse_args()
    if options.graphs and not torch.cuda.is_available():
        raise SystemExit("--graphs replays CUDA graphs, and there is no GPU here: leave it out.")
    shapes, slots, tokens, rounds = chosen(options)
    rows: list[dict[str, Any]] = []
    rates: dict[torch.dtype, float] = {}
    for shape in shapes:
        lm = model_of(shape)
        dtype = occupied(lm, 1, 2, compute="auto").module.rounding
        if dtype not in rates:
            sides = SIDES[lm.device.type]
            rates[dtype] = max(product_rate(lm.device, dtype, n) for n in sides)
        rate = rates[dtype]
        for n in slots:
            for T in tokens:
                if why := left_out(lm, n, T, 0.5 * rate * options.longest):
                    print(f"left out: {lm.name}, {n} slots, {T} tokens: {why}.")
                    continue
                rows.append(cell(lm, n, T, rounds, rate, options.graphs))
                done = f"{lm.name}, {n} slots, {T} tokens: {rows[-1]['ms']:.0f} ms a step"
                print(done, file=sys.stderr)
        ways = (False, True) if options.graphs else (False,)
        for graphs in ways if options.crammed else ():
            rate_exact, exact = passages_a_minute(lm, max(slots), options.crammed, graphs)
            print(
                f"{lm.name}{', graphs' * graphs}: {rate_exact:.1f} exact passages a minute of "
                f"{options.crammed} random tokens ({exact} of {2 * max(slots)} exact, "
                f"{max(slots)} slots)"
            )
    if not rows:
        raise SystemExit("every cell was left out: raise --longest.")
    for dtype, rate in rates.items():
        print(f"best square product in {dtype}: {rate / 1e9:.0f} GFLOP/s")
    report(
        "gpu",
        rows,
        options,
        mfu=min(row["mfu"] for row in rows),
        overhead=max(row["overhead"] for row in rows),
        **({"times": min(row["times"] for row in rows)} if options.graphs else {}),
    )


if __name__ == "__main__":
    run(main)
