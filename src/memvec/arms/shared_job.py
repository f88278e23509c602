"""The job of `cram` for passages that share m: all are crammed together (memvec.arms.shared_m)."""

from __future__ import annotations

from collections.abc import Iterable

from memvec.arms.shared_m import Shared, for_shared_m
from memvec.cram_job import CramJob
from memvec.cramming.batch import Job
from memvec.cramming.outcomes import Outcome
from memvec.passages.passage import Passage


class SharedCramJob(CramJob):
    """A CramJob whose engine only provides settings and records; `Shared` crams the passages.

    It has no journal and no workers, because a passage is not finished before all are.
    """

    def __post_init__(self) -> None:
        self.recipe = for_shared_m(self.recipe)
        super().__post_init__()

    def cram(self, passages: Iterable[Passage]) -> None:
        """Cram all passages together; if some are halved, all are crammed again."""
        self._cram_together([Job(p, self.engine.recipe.margin) for p in passages])

    def cram_further(self, disagreeing: list[Outcome]) -> None:
        """Continue with all passages; only the margins of these passages are raised."""
        keys, spread = {id(outcome) for outcome in disagreeing}, self.lm.logit_spread
        self._cram_together(
            [
                Job.with_raised_margin(o, spread) if id(o) in keys else Job.from_outcome(o)
                for o in self.in_order()
            ]
        )

    def seconds_of_step(self, slots: int, tokens: int) -> float:
        """0: a step of the engine is none of `Shared`."""
        return 0.0

    def _cram_together(self, jobs: list[Job]) -> None:
        while jobs:
            self.done.clear()
            self.done_tokens = 0
            shared = Shared(
                self.lm,
                self.engine.recipe,
                batch_size=self.engine.batch_size,
                storage=self.storage,
                on_progress=self.report,
            )
            outcomes, jobs, split_before = shared.run(jobs), [], self.split
            for outcome in outcomes:
                halves = self.keep_or_halve(outcome)
                new = [Job(half, self.engine.recipe.margin) for half in halves]
                jobs += new or [Job.from_outcome(outcome)]
            if self.split == split_before:
                return
