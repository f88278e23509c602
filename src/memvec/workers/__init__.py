"""Workers: Ray actors, one per device. Each holds the model and its slots; only the driver writes.

Work is divided into units. A free worker takes the next unit, so no device is idle while units are
left, and each result is returned as soon as it is ready. If a worker dies, its unfinished items go
back to the queue and a new worker replaces it; after more than three deaths per worker on average
the run ends with MemvecError. The caller defines the units: passages of a study's cell
(memvec.lab), or of a long document (`Crew`, for memvec.codec).

actor.py     what lives in an actor, and how it loads its model
pool.py      the driver's side: hand out units, collect results, replace the dead
crew.py      a document's passages over the pool, behind the interface of one engine
cutting.py   the lengths of passages, over the pool
decoding.py  the decode that certifies a result, over the pool
"""

from memvec.workers.actor import Loading, OnProgress, Unit, Worker
from memvec.workers.crew import Batch, Crew
from memvec.workers.cutting import Cutting, cut_lengths
from memvec.workers.decoding import Decoding, decode_passages
from memvec.workers.pool import Workers, combined

__all__ = [
    "Batch",
    "Crew",
    "Cutting",
    "Decoding",
    "Loading",
    "OnProgress",
    "Unit",
    "Worker",
    "Workers",
    "combined",
    "cut_lengths",
    "decode_passages",
]
