"""Protocols: how much fits, asked in different ways. One file each; this is their catalogue."""

from memvec.capacity.context import Context
from memvec.capacity.copy import Copy
from memvec.capacity.exact import Exact
from memvec.capacity.geometry import Geometry
from memvec.capacity.one_step import OneStep
from memvec.capacity.paper import Paper
from memvec.capacity.protocol import Protocol
from memvec.capacity.threshold import Threshold
from memvec.capacity.upper_bound import UpperBound
from memvec.capacity.vectors import Vectors

PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Paper(),
        Exact(),
        Vectors(),
        OneStep(),
        Threshold(),
        Context(),
        Copy(),
        UpperBound(),
        Geometry(),
    )
}

__all__ = ["PROTOCOLS", "Protocol"]
