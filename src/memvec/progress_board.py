"""The Ray actor that keeps the progress of workers.

It is not in memvec.workers, because that package imports torch. In the actor's own process, the
import took 2.5 seconds of a core and 190 MB.
"""

from __future__ import annotations


class ProgressBoard:
    """A small actor that keeps the last progress of each worker, for the driver to display.

    Workers are busy while they cram and cannot answer, so they report here and the driver reads. A
    progress is a dictionary of the fields of `memvec.cramming.batch.Progress`.
    """

    def __init__(self) -> None:
        self.latest: dict[str, dict[str, float]] = {}

    def report(self, name: str, progress: dict[str, float]) -> None:
        """Keep a worker's progress."""
        self.latest[name] = progress

    def all(self) -> dict[str, dict[str, float]]:
        """The last progress of every worker, by its name."""
        return self.latest
