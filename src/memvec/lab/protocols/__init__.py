"""Protocols: how much fits, asked in different ways. One file each; this is their catalogue."""

from memvec.lab.protocols.context import Context
from memvec.lab.protocols.copy import Copy
from memvec.lab.protocols.exact import Exact
from memvec.lab.protocols.geometry import Geometry
from memvec.lab.protocols.one_step import OneStep
from memvec.lab.protocols.paper import Paper
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.protocols.threshold import Threshold
from memvec.lab.protocols.upper_bound import UpperBound
from memvec.lab.protocols.vectors import Vectors

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
