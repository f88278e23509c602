"""One call of `cram`: documents to passages, passages through the engine, outcomes to a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from memvec.assembly import assembled, passage_record
from memvec.certificate import certificate_of
from memvec.cramming.certify import Outcome
from memvec.cramming.engine import Engine, Job, Progress
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, check_minimum
from memvec.header import DocumentRecord
from memvec.journal import Journal
from memvec.model.batch_size import default_batch_size
from memvec.model.estimate import Estimate, Facts, estimate, facts_of
from memvec.model.lm import FrozenLM
from memvec.passages.cutting import Cutter, surprisals
from memvec.passages.documents import Document
from memvec.passages.passage import Passage
from memvec.storage import Storage
from memvec.vectors import MemVectors
from memvec.workers import Batch, Crew, Workers, decode_passages

FILL = 0.4  # share of a vector's measured bits to cut to: nearly full ones cost many steps.
# A model's folder may know better (`fill` in memvec.json): an encoder makes short passages cheap.
TRIAL = 8  # passages of the step that is timed before the start
PROBED = 8  # passages on which an unknown model's bits per vector are estimated
PROBE_STEPS = 200
PROBE_TOKENS = 128  # of each, for a vector; twice as many where all of them are given back


@dataclass(frozen=True)
class Expected:
    """The memory and time that cramming is expected to need."""

    slots: int
    tokens: int  # of the longest passage
    memory: Estimate
    step: float  # seconds of a step of all slots; 0: not tried, or there was too little memory
    fills: float  # how many times the slots are filled


@dataclass(frozen=True)
class CramStatus:
    """The state of a cram of documents, for a progress display."""

    stage: str  # 'preparing', 'measuring', 'cramming' or 'certifying'
    _: KW_ONLY
    tokens: int  # of all documents
    done: int  # tokens of finished passages
    vectors: int  # vectors finished
    split: int  # passages that did not fit and were halved
    engine: Progress | None = None
    expected: Expected | None = None  # once it is known


class CramJob:
    """One call of `cram`: the documents, the engine and the outcomes so far.

    `done` has the final outcomes by document and offset, `spent` the forward-backward tokens of
    every passage that was tried, by document, offset and length.
    """

    def __init__(
        self,
        lm: FrozenLM,
        documents: list[Document],
        K: int,
        *,
        tokens: int | None,
        recipe: Recipe,
        batch_size: int | None,
        storage: Storage,
        halve: bool = True,
        journal: Journal | None = None,
        on_status: Callable[[CramStatus], None] | None = None,
        workers: Workers | None = None,
    ) -> None:
        check_minimum(1, batch_size=batch_size)
        if lm.reading.crammer:
            recipe = lm.reading.crammer.without_parts(recipe)
        self.lm, self.documents, self.K, self.tokens = lm, documents, K, tokens
        self.recipe, self.storage, self._batch_size = recipe, storage, batch_size
        self.halve = halve  # passages that do not fit; else they stay as they are
        self.journal, self.on_status, self.workers = journal, on_status, workers
        self.total = sum(len(d.ids) for d in documents)
        self.done: dict[tuple[int, int], Outcome] = {}
        self.spent: dict[tuple[int, int, int], int] = {}
        self.split = 0
        self.expected: Expected | None = None
        self._enter("preparing")  # coordinates may have a model's gradients to measure
        self.engine = Engine(lm, recipe, vectors=K, storage=storage, on_progress=self._report)
        self._enter("measuring")

    def run(self, keep_text: bool) -> MemVectors:
        """Cut the documents, cram the passages, and certify the result.

        `keep_text` puts the texts in the header. Raises MemvecError as `make_cutter` does, and if a
        passage does not fit in memory.
        """
        cutter, shortest = self.make_cutter()
        passages = [p for i, d in enumerate(self.documents) for p in cutter.cut(d.ids, i, shortest)]
        self.choose_batch_size(passages)
        if self.lm.reading.crammer:
            self._cram_sharing_a_vector([Job(p, self.engine.recipe.margin) for p in passages])
        else:
            self.cram(passages)
        return self.certified(keep_text)[0]

    def choose_batch_size(self, passages: Sequence[Passage]) -> None:
        """Set the number of slots: the caller's, or as many as these passages allow.

        The memory of a step is that of the model or copy that computes it, measured once.
        """
        longest = max(map(len, passages))
        facts = facts_of(self.lm, longest, self.engine.module)
        slots = self._batch_size or default_batch_size(self.lm, longest, self.K, facts)
        self.engine.batch_size = slots
        if self.on_status is not None:
            self.expected = self._expected(passages, facts)
        self._enter("cramming")

    def _expected(self, passages: Sequence[Passage], facts: Facts) -> Expected:
        """Estimate memory from the model's facts, and the time of a step from a trial step.

        The number of steps is not estimated here (`memvec plan` does that, on a sample).
        """
        slots, longest = min(self.engine.batch_size, len(passages)), max(map(len, passages))
        memory = estimate(facts, batch_size=slots, tokens=longest, vectors=self.K)
        step = 0.0
        if self.workers is None and not self.lm.reading.crammer:
            step = self.engine.trial(longest, min(slots, TRIAL)) * max(1.0, slots / TRIAL)
        fills = sum(map(len, passages)) / longest / slots
        return Expected(slots, longest, memory, step, max(1.0, fills))

    def cram(self, passages: Iterable[Passage]) -> None:
        """Cram passages, halved where they do not fit, into outcomes in `done`."""
        todo = [part for passage in passages for part in self._unfinished(passage)]
        engine = self.engine if self.workers is None else self._crew(self.workers)
        self._record_all(engine.run(todo), engine)

    def _record_all(self, outcomes: Iterable[Outcome], engine: Engine | Crew) -> None:
        """Add outcomes to `done` and the journal; queue the halves of passages that do not fit."""
        for outcome in outcomes:
            if self.journal is not None:
                self.journal.put(outcome)
            for passage in self._keep_or_halve(outcome):
                for unknown in self._unfinished(passage):
                    engine.push(unknown)

    def _crew(self, workers: Workers) -> Crew:
        e = self.engine
        how: dict[str, Any] = {"storage": self.storage.name, "layout": self.lm.layout}
        batch = Batch((), self.recipe, vectors=self.K, batch_size=e.batch_size, **how)
        return Crew(workers, batch, self._report)

    def _cram_sharing_a_vector(self, jobs: list[Job]) -> None:
        """Cram all passages together, as they share m; again with halves of those that fail."""
        while jobs:
            self.done.clear()
            options = {"batch_size": self.engine.batch_size, "storage": self.storage}
            shared = self.lm.reading.crammer(
                self.lm, self.engine.recipe, on_progress=self._report, **options
            )
            crammed, jobs, split = shared.run(jobs), [], self.split
            for outcome in crammed:
                halves = self._keep_or_halve(outcome)
                jobs += [Job(h, self.engine.recipe.margin) for h in halves] or [Job.again(outcome)]
            if self.split == split:
                return

    # ------------------------------------------------------------------ passages in

    def make_cutter(self) -> tuple[Cutter, int]:
        """What cuts the documents, and the smallest number of tokens of a passage.

        For a model without measured facts, this crams a few passages to estimate the bits per
        vector. Raises MemvecError if a document is shorter than that number, if the vectors leave
        no room in the context, and as `Cutter` does.
        """
        shortest = self.engine.given + 1
        for d in self.documents:
            if len(d.ids) < shortest:
                raise MemvecError(f"{d.name} is too short for the start rule 'first-token'.")
        max_tokens = self.engine.max_tokens()
        if max_tokens is not None and max_tokens < shortest:
            raise MemvecError(
                f"{self.K} vectors leave no room for text in {self.lm.name}'s context of "
                f"{self.lm.context} tokens."
            )
        if self.tokens is not None:
            return Cutter(self.lm, tokens=self.tokens, max_tokens=max_tokens), shortest
        share = float(self.lm.facts.get("fill", FILL))
        share = share / 2 if self.lm.reading.crammer else share
        bits = share * self.K * self._bits_per_vector(max_tokens)
        return Cutter(self.lm, bits=bits, max_tokens=max_tokens), shortest

    def _bits_per_vector(self, max_tokens: int | None) -> float:
        """Measured for the model (its folder's memvec.json), else estimated on these documents.

        Infinite where nothing has to be cut.
        """
        table = self.lm.facts.get("bits_per_vector", {})
        known = [float(table[k]) for k in sorted(table, key=int) if int(k) <= self.K]
        if known:
            return known[-1]
        ids = max((d.ids for d in self.documents), key=len)
        limit, length = min(len(ids), max_tokens or len(ids)), PROBE_TOKENS * self.K
        bits, whole = self._probed(ids, min(length, limit))
        while whole and length < limit:
            length *= 2
            bits, whole = self._probed(ids, min(length, limit))
        return math.inf if whole else bits  # a document that fits as it is has no need to be cut

    def _probed(self, ids: Sequence[int], length: int) -> tuple[float, bool]:
        """Bits per vector given back of passages of `length` tokens, and whether all of each is."""
        room = len(ids) - length
        starts = sorted({room * i // PROBED for i in range(PROBED)})
        probes = [Passage(tuple(ids[at : at + length])) for at in starts]
        recipe = replace(self.recipe, steps=min(PROBE_STEPS, self.recipe.steps), schedule="growing")
        slots = min(len(probes), self._batch_size or default_batch_size(self.lm, length, self.K))
        engine = Engine(self.lm, recipe, vectors=self.K, batch_size=slots, storage=self.storage)
        outcomes = list(engine.run(p for p in probes if len(p) > engine.given))
        back = [o.passage.ids[: max(o.metrics.horizon, 1)] for o in outcomes]
        bits = math.fsum(float(surprisals(self.lm, ids).sum()) for ids in back)
        return bits / len(back) / self.K, all(o.exact for o in outcomes)

    def _unfinished(self, passage: Passage) -> list[Passage]:
        """Parts of a passage that the journal does not have: none, some, or the passage itself."""
        outcome = self.journal.get(passage) if self.journal is not None else None
        if outcome is None:
            return [passage]
        return [left for part in self._keep_or_halve(outcome) for left in self._unfinished(part)]

    def _keep_or_halve(self, outcome: Outcome) -> list[Passage]:
        """Keep an outcome that is final, or return the halves of a passage that did not fit."""
        passage = outcome.passage
        self.spent[passage.document, passage.offset, len(passage)] = outcome.spent
        halves = passage.halves() if self.halve and len(passage) > 1 else ()
        shortest = max(self.K, self.engine.given + 1)
        if outcome.exact or not halves or min(map(len, halves)) < shortest:
            self.done[passage.document, passage.offset] = outcome
            halves = ()
        else:
            self.split += 1
        self._report()
        return list(halves)

    # ------------------------------------------------------------------ result out

    def certified(self, keep_text: bool) -> tuple[MemVectors, list[bool]]:
        """The result, and whether each passage is exact when all are decoded as a user will: in the
        same order and batches."""
        self._enter("certifying")
        for attempts_left in (3, 2, 1, 0):
            mem = self._result(keep_text)
            decoded = decode_passages(self.lm, mem, self.workers)
            certificate, exact = certificate_of(self.lm, mem, decoded)
            pairs = zip(self._in_order(), exact, strict=True)
            fallen = [outcome for outcome, decodes in pairs if outcome.exact and not decodes]
            if not fallen or not attempts_left or self.recipe.if_not_exact == "stop":
                break
            # Another batch shape flipped an arg-max: ask these passages for a larger margin.
            self._cram_further(fallen)
        mem = mem.with_certificate(certificate, exact)
        passages = [outcome.passage.ids for outcome in self._in_order()]
        return mem.with_use(self.engine.stepper.term.certificate(mem, passages)), exact

    def _cram_further(self, fallen: list[Outcome]) -> None:
        """Cram further, with a larger margin for the fallen passages (all, if they share m)."""
        if self.lm.reading.crammer:
            fallen_ids, spread = {id(outcome) for outcome in fallen}, self.lm.logit_spread
            raised = [(o, spread if id(o) in fallen_ids else None) for o in self._in_order()]
            self._cram_sharing_a_vector([Job.again(outcome, raised=by) for outcome, by in raised])
            return
        for outcome in fallen:
            del self.done[outcome.passage.document, outcome.passage.offset]
            if outcome.status == "done":
                self.engine.push_again(outcome)
            else:  # no step is left in which its margin could rise
                self._record_all([replace(outcome, exact=False)], self.engine)
        self._record_all(self.engine.run(), self.engine)

    def _in_order(self) -> list[Outcome]:
        return [self.done[key] for key in sorted(self.done)]

    def _result(self, keep_text: bool) -> MemVectors:
        outcomes, engine = self._in_order(), self.engine
        documents = [
            DocumentRecord(
                **{name: value for name, value in vars(d).items() if name != "ids"},
                passages=sum(1 for o in outcomes if o.passage.document == i),
                text=d.data(self.lm).decode(d.encoding) if keep_text else None,
            )
            for i, d in enumerate(self.documents)
        ]
        passages = [
            passage_record(o.passage, o.result, engine.start_rule, o.corrections) for o in outcomes
        ]
        return assembled(
            engine.lm,
            [o.vectors for o in outcomes],
            self.storage,
            documents=documents,
            passages=passages,
            recipe=engine.recipe.record(),
            start_rule=engine.start_rule,
        )

    # ------------------------------------------------------------------ status

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self._report()

    def _report(self, progress: Progress | None = None) -> None:
        if self.on_status is not None:
            done = sum(len(o.passage) for o in self.done.values())
            now: dict[str, Any] = {"done": done, "vectors": self.K * len(self.done)}
            now |= {"split": self.split, "engine": progress, "expected": self.expected}
            self.on_status(CramStatus(self.stage, tokens=self.total, **now))
