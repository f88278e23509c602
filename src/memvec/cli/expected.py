"""What cramming will take, in words: memory, and the time of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memvec.cram_job import Expected
    from memvec.model.estimate import Estimate


def sentence(expected: Expected, workers: int = 0) -> str:
    """The slots, their memory, and what ten steps for every passage take.

    Each of the workers has as many slots and as much memory.
    """
    slots, tokens = number_of(expected.slots, "slot"), number_of(expected.tokens, "token")
    each = f"{number_of(workers, 'worker')}, each with " if workers else ""
    needs = f"{each}{slots} of up to {tokens}: {memory(expected.memory)}."
    if not expected.step:
        return needs
    ten = 10 * expected.step * expected.fills
    return (
        f"{needs} A step takes about {duration(expected.step)}; if passages need 10 steps on "
        f"average, all of them take {duration(ten)}."
    )


def memory(estimate: Estimate) -> str:
    """Its parts in GiB, or MiB where that is little."""
    unit, name = (2**30, "GiB") if estimate.total >= 2**30 else (2**20, "MiB")
    digits = 1 if name == "GiB" else 0
    others = estimate.total - estimate.weights - estimate.activations
    parts = (estimate.total, estimate.weights, estimate.activations, others)
    total, weights, activations, more = (f"{part / unit:.{digits}f}" for part in parts)
    return (
        f"about {total} {name} at the peak: weights {weights}, activations {activations}, "
        f"the rest (logits or gradients, optimiser) {more}"
    )


def number_of(n: int, noun: str) -> str:
    """A number and what it counts: '1 passage', '2 passages'."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def counted(n: int, noun: str) -> str:
    """As the beginning of a sentence: '1 passage is', '2 passages are'."""
    return f"{number_of(n, noun)} {'is' if n == 1 else 'are'}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if math.isnan(seconds):
        return "?"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
