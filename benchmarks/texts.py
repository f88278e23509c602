"""Passages for the benchmarks: running prose written for this project, cut at seeded places."""

from __future__ import annotations

import random
from pathlib import Path

from memvec.lm import FrozenLM
from memvec.passages.passage import Passage

PROSE = Path(__file__).parent.parent / "examples" / "harbour.txt"


def passages_of(lm: FrozenLM, n: int, T: int, seed: int = 0) -> list[Passage]:
    """n different passages of T tokens, starting at random places of the text."""
    ids = lm.tokenize(PROSE.read_text(encoding="utf-8"))
    places = random.Random(seed).sample(range(len(ids) - T), n)
    return [Passage(tuple(ids[at : at + T])) for at in places]
