"""The work of one call of `cram`: cut documents into passages, cram them, certify the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from memvec.assembly import assembled, passage_record
from memvec.certificate import certificate_of
from memvec.cramming.batch import Progress
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
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
from memvec.workers import Batch, Crew, Workers, cut_lengths, decode_passages

# Information of a passage, as a share of the bits that its vectors can hold: a nearly full vector
# takes many steps. `fill` in the memvec.json of a model's folder replaces this value.
FILL = 0.4
TRIAL_PASSAGES = 8  # in the step that is timed before cramming starts on a CPU
# The bits per vector of a model without measured facts are estimated on this number of passages.
PROBE_PASSAGES = 8
PROBE_STEPS = 200
PROBE_TOKENS = 128  # tokens per vector of such a passage; doubled while all passages are exact


@dataclass(frozen=True)
class Expected:
    """The memory and time that cramming is expected to need."""

    slots: int
    tokens: int  # tokens of the longest passage
    memory: Estimate
    step: float  # seconds of a step with all slots; 0: not timed, or memory ran out
    fills: float  # number of times that all slots are filled


@dataclass(frozen=True)
class CramStatus:
    """The progress of one call of `cram`, for a progress display."""

    stage: str  # 'preparing', 'measuring', 'cutting', 'cramming' or 'certifying'
    _: KW_ONLY
    tokens: int  # tokens of all documents
    done: int  # tokens of finished passages
    vectors: int  # vectors of finished passages
    split: int  # passages that were halved, since they were not exact
    share: float = 0.0  # of the work of 'cutting' or 'certifying' that is done
    engine: Progress | None = None
    expected: Expected | None = None  # None until it is estimated


@dataclass(eq=False, repr=False)
class CramJob:
    """One call of `cram`: the documents, the engine and the outcomes so far.

    `done` maps (document, offset) to a final outcome. `spent` maps (document, offset, length) to
    the forward-backward tokens of every passage that was crammed, also of passages that were later
    halved. The other options are those of `memvec.cram`.
    """

    lm: FrozenLM
    documents: list[Document]
    K: int
    _: KW_ONLY
    tokens: int | None
    recipe: Recipe
    batch_size: int | None
    storage: Storage
    halve: bool = True
    keep_text: bool = False
    journal: Journal | None = None
    on_status: Callable[[CramStatus], None] | None = None
    workers: Workers | None = None

    def __post_init__(self) -> None:
        check_minimum(1, batch_size=self.batch_size)
        self.done: dict[tuple[int, int], Outcome] = {}
        self.done_tokens = 0  # of the passages in `done`
        self.spent: dict[tuple[int, int, int], int] = {}
        self.split, self.total = 0, sum(len(d.ids) for d in self.documents)
        self.expected: Expected | None = None
        self._enter("preparing")  # some coordinates first measure the model's gradients
        options: dict[str, Any] = {"storage": self.storage, "on_progress": self.report}
        self.engine = Engine(self.lm, self.recipe, vectors=self.K, **options)
        self._enter("measuring")

    def run(self) -> MemVectors:
        """Cut the documents, cram the passages, and certify the result.

        Raises MemvecError as `make_cutter` does, and if a passage does not fit in memory.
        """
        cutter = self.make_cutter()
        self._enter("cutting")
        cutter.known = cut_lengths(self.workers, cutter, self.documents, self._on_share)
        passages: list[Passage] = []
        for i, d in enumerate(self.documents):
            for passage in cutter.cut(d.ids, i):
                passages.append(passage)
                if not cutter.known:
                    self._on_share((i + passage.offset / len(d.ids)) / len(self.documents))
        self.choose_batch_size(passages)
        self.cram(passages)
        return self.certified()

    def choose_batch_size(self, passages: Sequence[Passage]) -> None:
        """Set the number of slots: the caller's `batch_size`, else what memory allows.

        Memory is measured for the module that computes the steps, on the longest of `passages`.
        """
        longest = max(map(len, passages))
        facts = facts_of(self.lm, longest, self.engine.module)
        slots = self.batch_size or default_batch_size(self.lm, longest, self.K, facts)
        self.engine.batch_size = slots
        if self.on_status is not None:
            self.expected = self._expected(passages, facts)
        self._enter("cramming")

    def _expected(self, passages: Sequence[Passage], facts: Facts) -> Expected:
        """Estimate memory from the model's facts, and the seconds of a step from a trial step."""
        slots, longest = min(self.engine.batch_size, len(passages)), max(map(len, passages))
        memory = estimate(facts, batch_size=slots, tokens=longest, vectors=self.K)
        step = 0.0 if self.workers is not None else self.seconds_of_step(slots, longest)
        fills = sum(map(len, passages)) / longest / slots
        return Expected(slots, longest, memory, step, max(1.0, fills))

    def seconds_of_step(self, slots: int, tokens: int) -> float:
        """The seconds of a step with `slots` passages of `tokens` tokens, from a trial step."""
        # The time of a GPU is not proportional to the slots: it waits for kernel launches.
        timed = min(slots, TRIAL_PASSAGES) if self.lm.device.type == "cpu" else slots
        return self.engine.trial(tokens, timed) * slots / timed

    def cram(self, passages: Iterable[Passage]) -> None:
        """Cram passages, and halves of those that are not exact; `done` gets the outcomes."""
        unfinished = [part for passage in passages for part in self._unfinished(passage)]
        engine = self.engine if self.workers is None else self._crew(self.workers)
        self._record_all(engine.run(unfinished), engine)

    def _record_all(self, outcomes: Iterable[Outcome], engine: Engine | Crew) -> None:
        """Add outcomes to `done` and the journal; queue the halves of passages not exact."""
        for outcome in outcomes:
            if self.journal is not None:
                self.journal.put(outcome)
            for half in self.keep_or_halve(outcome):
                for part in self._unfinished(half):
                    engine.push(part)

    def _crew(self, workers: Workers) -> Crew:
        formats: dict[str, Any] = {"storage": self.storage.name, "layout": self.lm.reading.layout}
        batch = Batch((), self.recipe, vectors=self.K, batch_size=self.engine.batch_size, **formats)
        return Crew(workers, batch, self.report)

    # ------------------------------------------------------------------ passages in

    def make_cutter(self) -> Cutter:
        """The cutter of the documents.

        For a model without measured facts, this crams a few passages to estimate the bits per
        vector. Raises MemvecError if a document has fewer tokens than a passage needs, if the
        vectors leave no room in the context, and as `Cutter` does.
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
        bits = None
        if self.tokens is None:
            own = self.K - self.lm.reading.shares_vector  # vectors of a passage alone
            share = float(self.lm.facts.get("fill", FILL))
            bits = share * own * self._bits_per_vector(max_tokens)
        return Cutter(
            self.lm, bits=bits, tokens=self.tokens, max_tokens=max_tokens, min_tokens=shortest
        )

    def _bits_per_vector(self, max_tokens: int | None) -> float:
        """Bits that one vector holds: from the model's memvec.json, or estimated on the documents.

        Infinite if the longest document is exact as one passage, so that nothing has to be cut.
        """
        table = self.lm.facts.get("bits_per_vector", {})
        known = [float(table[k]) for k in sorted(table, key=int) if int(k) <= self.K]
        if known:
            return known[-1]
        ids = max((d.ids for d in self.documents), key=len)
        limit, length = min(len(ids), max_tokens or len(ids)), PROBE_TOKENS * self.K
        bits, all_exact = self._probed(ids, min(length, limit))
        while all_exact and length < limit:
            length *= 2
            bits, all_exact = self._probed(ids, min(length, limit))
        return math.inf if all_exact else bits

    def _probed(self, ids: Sequence[int], length: int) -> tuple[float, bool]:
        """Cram sample passages of `length` tokens: mean bits per vector, and if all are exact.

        The bits are those of the tokens up to the horizon.
        """
        starts = sorted({(len(ids) - length) * i // PROBE_PASSAGES for i in range(PROBE_PASSAGES)})
        probes = [Passage(tuple(ids[at : at + length])) for at in starts]
        recipe = replace(self.recipe, steps=min(PROBE_STEPS, self.recipe.steps), schedule="growing")
        slots = min(len(probes), self.batch_size or default_batch_size(self.lm, length, self.K))
        options: dict[str, Any] = {"storage": self.storage, "on_progress": self.report}
        engine = Engine(self.lm, recipe, vectors=self.K, batch_size=slots, **options)
        outcomes = list(engine.run(p for p in probes if len(p) > engine.given))
        decoded = [o.passage.ids[: max(o.metrics.horizon, 1)] for o in outcomes]
        bits = math.fsum(float(surprisals(self.lm, ids).sum()) for ids in decoded)
        return bits / len(decoded) / self.K, all(o.exact for o in outcomes)

    def _unfinished(self, passage: Passage) -> list[Passage]:
        """Parts of a passage that are not in the journal: the passage, some of its parts, or none.

        Outcomes in the journal are kept in `done`.
        """
        outcome = self.journal.get(passage) if self.journal is not None else None
        if outcome is None:
            return [passage]
        return [part for half in self.keep_or_halve(outcome) for part in self._unfinished(half)]

    def keep_or_halve(self, outcome: Outcome) -> list[Passage]:
        """Keep an outcome that is final, or return the two halves of a passage that is not exact.

        An outcome is final if it is exact or if its passage may not be halved further.
        """
        passage = outcome.passage
        self.spent[passage.document, passage.offset, len(passage)] = outcome.spent
        halves = passage.halves() if self.halve and len(passage) > 1 else ()
        shortest = max(self.K, self.engine.given + 1)
        if outcome.exact or not halves or min(map(len, halves)) < shortest:
            self.done[passage.document, passage.offset] = outcome
            self.done_tokens += len(passage)
            halves = ()
        else:
            self.split += 1
        self.report()
        return list(halves)

    # ------------------------------------------------------------------ result out

    def certified(self) -> MemVectors:
        """The certified result of all outcomes.

        All passages are decoded in the order and batches in which a user decodes them. Passages
        whose decoding disagrees with their certification are crammed further.
        """
        self._enter("certifying")
        for attempts_left in (3, 2, 1, 0):
            mem = self._result()
            decoded = decode_passages(self.lm, mem, self.workers, on_share=self._on_share)
            certificate, exact = certificate_of(self.lm, mem, decoded)
            pairs = zip(self.in_order(), exact, strict=True)
            disagreeing = [outcome for outcome, decodes in pairs if outcome.exact and not decodes]
            if not disagreeing or not attempts_left or self.recipe.if_not_exact == "stop":
                break
            # Another batch shape changed an arg-max, so these passages need a larger margin.
            self.cram_further(disagreeing)
        mem = mem.with_certificate(certificate, exact)
        passages = [outcome.passage.ids for outcome in self.in_order()]
        return mem.with_use(self.engine.stepper.term.certificate(mem, passages))

    def cram_further(self, disagreeing: list[Outcome]) -> None:
        """Continue to cram these passages, with raised margins."""
        for outcome in disagreeing:
            del self.done[outcome.passage.document, outcome.passage.offset]
            self.done_tokens -= len(outcome.passage)
            if outcome.status == "done":
                self.engine.push_again(outcome)
            else:  # the recipe has no steps left to reach a larger margin
                self._record_all([replace(outcome, exact=False)], self.engine)
        self._record_all(self.engine.run(), self.engine)

    def in_order(self) -> list[Outcome]:
        """The final outcomes, in the order of the text."""
        return [self.done[key] for key in sorted(self.done)]

    def _result(self) -> MemVectors:
        outcomes, engine = self.in_order(), self.engine
        documents = [
            DocumentRecord(
                **{name: value for name, value in vars(d).items() if name != "ids"},
                passages=sum(1 for o in outcomes if o.passage.document == i),
                text=d.data(self.lm).decode(d.encoding) if self.keep_text else None,
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

    def _on_share(self, share: float) -> None:
        self.report(share=share)

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self.report()

    def report(self, progress: Progress | None = None, share: float = 0.0) -> None:
        """Call `on_status`, with the engine's progress or the share of a stage that is done."""
        if self.on_status is not None:
            counts: dict[str, Any] = {"done": self.done_tokens, "vectors": self.K * len(self.done)}
            counts |= {"split": self.split, "engine": progress, "expected": self.expected}
            self.on_status(CramStatus(self.stage, tokens=self.total, share=share, **counts))
