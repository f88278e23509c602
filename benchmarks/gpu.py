"""How much of the device's speed does a step use, and where is the rest of the time spent?

    python benchmarks/gpu.py                   # on a GPU: the shapes of Llama 3.2 1B and 3.1 8B
    python benchmarks/gpu.py --graphs          # also with steps that are replayed from CUDA graphs
    python benchmarks/gpu.py --quick
    python benchmarks/gpu.py --shapes pocket pythia-160m --slots 1 8 32 --tokens 16 64 256

The program runs on any device. For each combination of shape, slots and tokens it times a step of
the engine with every slot taken and every position counted, in the dtype that steps really use, and
by turns the *bare pass*: forward and backward to the vectors of the same module, with autograd
through the whole cross-entropy and nothing else. A row of the table:

- `ms`, `p10`, `p90`: median, 10th and 90th percentile of the step's time over `n` rounds;
- `tokens/s`: slots times tokens, divided by the median time;
- `GFLOP/s`: operations of the step per second: 4 for each weight and token (2 forward, 2 backward
  to the input; weights get no gradient), and 6 T for each token, layer and number of the
  attention's width (causal, forward and backward);
- `mfu` (model FLOPs utilisation): these operations as a share of the best product of square
  matrices on this machine in the same dtype, measured at the start;
- `overhead`: the median time of the engine's step divided by that of the bare pass;
- `outside`: the share of the operators' own time that is neither in matrix products nor in
  attention;
- `launch`: the share of the time in which a GPU computes nothing, waiting for kernels;
- with `--graphs`, for replayed steps: `graphs ms`, `graphs mfu`, how many `times` faster they are
  than the engine's ordinary step, and the seconds of the step that captures the graph (`capture
  s`).

Afterwards a line for each shape says how many passages a minute become exact: all slots are filled
twice with `--crammed` random tokens for one vector, from noise (0 leaves this out).

A combination is left out, and a line says so, if it does not fit the model's context or if its step
would take longer than `--longest` seconds at half of the machine's rate. Weights are random: every
shape is made in memory, on the device.

RESULT has the smallest `mfu` and the largest `overhead` of the rows, and with `--graphs` the
smallest `times`. `--quick` has one tiny shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from common import arguments, interleaved, report
from memvec.cli.program import run_program
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.statistics import median_and_spread
from models import SHAPES, random_model
from step import occupied, operations, product_rate
from texts import random_tokens

# Operators that are matrix products or consist of them. `outside` counts all others.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "attention", "convolution")
# Sides of the square matrices whose product measures the best rate of the device.
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


def step_operations(lm: FrozenLM, slots: int, T: int) -> float:
    """Operations of a forward and a backward to the input, for `slots` passages of T tokens."""
    config = lm.config.get_text_config()
    attention = 6 * T * int(config.hidden_size) * int(config.num_hidden_layers)
    return float(slots * T * (operations(lm) + attention))


def shares(work: Any, device: torch.device) -> tuple[float, float | None]:
    """(`outside`, `launch`) of one call of `work`; `launch` is None on a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall_time = time.perf_counter() - start
    on_gpu = device.type == "cuda"
    operator_times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profile.key_averages()
        if event.key.startswith("aten::")
    }
    operator_time = sum(operator_times.values())
    product_time = sum(
        t for key, t in operator_times.items() if any(part in key for part in PRODUCTS)
    )
    outside = 1 - product_time / operator_time if operator_time else 0.0
    return outside, max(0.0, 1 - operator_time * 1e-6 / wall_time) if on_gpu else None


def model_of(name: str) -> FrozenLM:
    """The shape `name` with random weights, made on the device, or else the model of that name."""
    return random_model(name, on_device=True) if name in SHAPES else load_lm(name)


def captured(lm: FrozenLM, slots: int, T: int) -> tuple[Engine, float]:
    """An engine whose next step is a replay, and the seconds of the step that captured it."""
    engine = occupied(lm, slots, T, compute="auto", graphs=True)
    engine.step()  # the first step is not captured
    return engine, interleaved({"capture": engine.step}, rounds=1, warmup=0)["capture"][0]


def cell(
    lm: FrozenLM, slots: int, T: int, rounds: int, rate: float, graphs: bool = False
) -> dict[str, Any]:
    """A row of the table: the times of a step, and shares of its time.

    `rate`: the best operations per second of this machine in the dtype of steps.
    """
    engine = occupied(lm, slots, T, compute="auto")
    module = engine.module
    ids, vectors = engine.batch.ids, engine.batch.vectors.clone().requires_grad_()

    def bare() -> None:
        inputs = torch.cat([vectors.to(module.dtype), module.embed(ids[:, :-1])], dim=1)
        logits = module.model(inputs_embeds=inputs, use_cache=False).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
        torch.autograd.grad(loss, vectors)

    passes, capture = {"engine": engine.step, "bare": bare}, 0.0
    if graphs:
        replayed, capture = captured(lm, slots, T)
        passes["graphs"] = replayed.step
    seconds = interleaved(passes, rounds, warmup=1)
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
        graph_median = statistics.median(seconds["graphs"])
        row |= {"graphs ms": 1e3 * graph_median, "graphs mfu": row["mfu"] * median / graph_median}
        row |= {"times": median / graph_median, "capture s": capture}
    return row


def left_out(lm: FrozenLM, slots: int, T: int, max_operations: float) -> str | None:
    """Why a combination is left out, or None; a step may have `max_operations` operations."""
    if lm.context is not None and lm.context <= T:
        return f"its context is {lm.context}"
    return "a step takes too long" if step_operations(lm, slots, T) > max_operations else None


def passages_a_minute(
    lm: FrozenLM, slots: int, tokens: int, graphs: bool = False
) -> tuple[float, int]:
    """(exact passages a minute, number of exact passages); the time includes certification."""
    passages = random_tokens(lm, 2 * slots, tokens)
    engine = Engine(lm, Recipe(start="noise", steps=400), batch_size=slots, graphs=graphs)
    began = time.perf_counter()
    exact = sum(outcome.exact for outcome in engine.run(passages))
    return 60 * exact / (time.perf_counter() - began), exact


def chosen(options: argparse.Namespace) -> tuple[list[str], list[int], list[int], int]:
    """(shapes, slots, tokens, rounds): those of the options, or the defaults for the device."""
    gpu = torch.cuda.is_available()
    shapes = ["llama-3.2-1b", "llama-3.1-8b"] if gpu else ["pocket", "pythia-160m", "llama-3.2-1b"]
    slots, tokens = ([8, 32, 128], [32, 128, 512]) if gpu else ([1, 8, 32], [16, 64, 256, 512])
    if options.quick:
        shapes, slots, tokens = ["tiny-llama"], [8], [32]
    rounds = 3 if options.quick else options.rounds
    return options.shapes or shapes, options.slots or slots, options.tokens or tokens, rounds


def main() -> None:
    """Measure every combination, then exact passages a minute of each shape at the most slots."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", help=f"{', '.join(SHAPES)}, or a model")
    parser.add_argument("--slots", nargs="+", type=int, help="passages in the batch")
    parser.add_argument("--tokens", nargs="+", type=int, help="of each passage")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds that a step may take")
    parser.add_argument(
        "--crammed", type=int, default=4, help="tokens of the passages that are crammed; 0: none"
    )
    parser.add_argument(
        "--graphs", action="store_true", help="also time steps from CUDA graphs (needs CUDA)"
    )
    options = parser.parse_args()
    if options.graphs and not torch.cuda.is_available():
        raise MemvecError("--graphs replays CUDA graphs, and there is no GPU here: leave it out.")
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
                if reason := left_out(lm, n, T, 0.5 * rate * options.longest):
                    print(f"left out: {lm.name}, {n} slots, {T} tokens: {reason}.")
                    continue
                rows.append(cell(lm, n, T, rounds, rate, options.graphs))
                line = f"{lm.name}, {n} slots, {T} tokens: {rows[-1]['ms']:.0f} ms a step"
                print(line, file=sys.stderr)
        graph_modes = (False, True) if options.graphs else (False,)
        for graphs in graph_modes if options.crammed else ():
            rate_exact, exact = passages_a_minute(lm, max(slots), options.crammed, graphs)
            print(
                f"{lm.name}{', graphs' * graphs}: {rate_exact:.1f} exact passages a minute of "
                f"{options.crammed} random tokens ({exact} of {2 * max(slots)} exact, "
                f"{max(slots)} slots)"
            )
    if not rows:
        raise MemvecError("every combination was left out, for the reasons above.")
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
    run_program(main)
