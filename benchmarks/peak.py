"""Is the estimate of memory right? The measured peak of each part of a step over the estimated one.

    python benchmarks/peak.py --quick

Three parts of a step are measured at several shapes, each alone, with and without checkpointing of
activations: the model's forward pass and the gradient back to the vectors (`activations`), the
losses and their gradients at the hidden states (`logits`), and a whole step of an engine with every
slot taken (`step`). The table has the estimated bytes, the peak bytes of tensors as torch counts
them, and their `ratio`, which compares the two. `process_MiB` is the growth of the process; on a
CPU it is larger, because the allocator keeps memory for the next step.

RESULT has the smallest and the largest ratio of measured to estimated bytes over all rows, and the
largest ratio of process to tensors for whole steps (`process`). `--quick` leaves out the larger
shape and Pythia-160m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from common import arguments, report
from memory import peak_memory, peak_tensors
from memvec.cli.program import run_program
from memvec.cramming.objectives import score
from memvec.loading import load_lm
from memvec.model.estimate import estimate, facts_of
from memvec.model.lm import FrozenLM
from models import random_model
from step import occupied

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}


def works(lm: FrozenLM, batch_size: int, T: int) -> dict[str, Callable[[], Any]]:
    """The parts of a step as functions, each of which is measured alone."""
    engine = occupied(lm, batch_size, T)
    ids, vectors = engine.batch.ids, engine.batch.vectors.clone().requires_grad_()
    states = lm.states(vectors, ids, engine.start_rule).detach()

    def forward_backward() -> None:
        with torch.enable_grad():
            outputs = lm.states(vectors, ids, engine.start_rule)
        torch.autograd.grad(outputs, vectors, torch.ones_like(outputs))

    return {
        "activations": forward_backward,
        "logits": lambda: score(lm.head, states, ids, engine.recipe, V=lm.vocab_size),
        "step": engine.step,
    }


def estimates(lm: FrozenLM, batch_size: int, T: int) -> dict[str, float]:
    """The estimated peak of each part, in bytes."""
    sizes = {"batch_size": batch_size, "tokens": T}
    memory = estimate(facts_of(lm, T), **sizes)
    return {
        "activations": memory.activations + memory.passing,
        "logits": memory.logits,
        "step": memory.step,
    }


def main() -> None:
    """Measure every shape, with and without checkpointing."""
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    lms = {
        options.model: lambda: load_lm(options.model),
        "llama, V 32k": lambda: random_model("tiny-llama", vocab_size=32_768, **WIDE),
        "pythia-160m": lambda: random_model("pythia-160m"),
    }
    shapes = [(16, 128), (32, 256)]
    if options.quick:
        lms.pop("pythia-160m")
        shapes = shapes[:1]
    rows = []
    for name, load in lms.items():
        lm = load()
        for checkpointing in (False, True):
            lm.checkpointing = checkpointing
            for batch_size, T in shapes:
                estimated = estimates(lm, batch_size, T)
                for part, work in works(lm, batch_size, T).items():
                    work()  # the first call needs more memory, so it is not measured
                    tensors, process = peak_tensors(work), peak_memory(work)
                    rows.append(
                        {
                            "model": name,
                            "checkpointing": checkpointing,
                            "batch_size": batch_size,
                            "tokens": T,
                            "part": part,
                            "estimated_MiB": estimated[part] / 2**20,
                            "tensors_MiB": tensors / 2**20,
                            "ratio": tensors / estimated[part],
                            "process_MiB": process / 2**20,
                        }
                    )
    ratios = [row["ratio"] for row in rows]
    process = max(r["process_MiB"] / r["tensors_MiB"] for r in rows if r["part"] == "step")
    report("peak", rows, options, ratio_min=min(ratios), ratio_max=max(ratios), process=process)


if __name__ == "__main__":
    run_program(main)
