"""Workers: a pool of Ray actors crams and decodes every passage once, also if actors die.

Scripted actors take the place of Ray's in all tests but one.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import QUICK, passages, reader, tiny
from memvec import codec
from memvec.cramming.batch import Progress
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, SlowPathWarning
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.cells import expand
from memvec.lab.study.pool import StudyUnit, in_units
from memvec.lab.study.spec import parse_spec
from memvec.loading import load_lm
from memvec.passages.cutting import Cutter
from memvec.passages.documents import Document
from memvec.passages.passage import Passage
from memvec.progress_board import ProgressBoard
from memvec.vectors import MemVectors
from memvec.workers import (
    Batch,
    Crew,
    Cutting,
    Decoding,
    Loading,
    Worker,
    Workers,
    combined,
    cut_lengths,
    cutting,
    decode_passages,
    decoding,
)
from memvec.workers.pool import Member, _start_ray
from studies import HEAD
from test_report import alike

pytestmark = pytest.mark.filterwarnings("ignore:a worker died")


# The text of Ray's error for a worker that raised one: the traceback and the error's lines.
FAULTS = {
    "fault": "ray::Worker.stream() (pid=7)\n  File actor.py, line 120\ntorch.AcceleratorError: "
    "CUDA error: uncorrectable ECC error encountered\nSearch for `cudaErrorECCUncorrectable'.",
    "full": "ray::Worker.stream() (pid=7)\nRuntimeError: CUDA error: out of memory\nSearch it.",
    "other": "ray::Worker.stream() (pid=7)\nValueError: not CUDA's",
}


class DiedError(Exception):
    """A fake of Ray's RayActorError."""

    actor_init_failed = False


class UnbornError(DiedError):
    """A fake of Ray's error for an actor whose constructor raised one."""

    actor_init_failed = True


class Actor:
    """A scripted actor: its stream gives a number of rows and then ends in the way given."""

    def __init__(self, rows: int, end: str) -> None:
        self.rows, self.end = rows, end
        self.stream = SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda unit: self.results(unit))
        )

    def results(self, unit: StudyUnit | Batch) -> Any:
        """(key, result) for the unit's passages, then its end; it does units of other work."""
        if isinstance(unit, Decoding | Cutting):
            yield from itertools.islice(unit.work(reader("words"), "scripted", None), self.rows)
            if self.end == "error" and self.rows < len(unit.keys()):
                yield DiedError("killed")
            return
        if self.end == "unborn":
            yield UnbornError(
                "The actor died because of an error raised in its creation task\n"
                "memvec.errors.MemvecError: nowhere is no folder here."
            )
        for item in unit.passages[: self.rows]:
            if isinstance(item, SourcedPassage):
                yield item.number, alike(unit.cell.key, item.number, 1, "exact")
            else:
                yield (item.document, item.offset), item
        if self.end == "error" and self.rows < len(unit.passages):
            yield DiedError("killed")
        if self.end in FAULTS and self.rows < len(unit.passages):
            yield ZeroDivisionError(FAULTS[self.end])


def get(item: Any) -> Any:
    """A fake of Ray's `get`, which raises errors."""
    if isinstance(item, Exception):
        raise item
    return item


def pool(*actors: Actor, spare: Callable[[], Actor]) -> Workers:
    """A pool of scripted actors; `spare()` replaces one that died."""
    made = object.__new__(Workers)
    errors = SimpleNamespace(RayActorError=DiedError, RayTaskError=ZeroDivisionError)
    made.ray = SimpleNamespace(
        wait=lambda rows, **_: (rows, []), get=get, exceptions=errors, kill=lambda _: None
    )
    made.count = len(actors)
    made.members = [Member(f"ray-{i}", actor) for i, actor in enumerate(actors)]
    made._hired, made._board_request, made.gpu = 0, None, False
    latest = {
        f"ray-{i}": asdict(Progress(2, i, 3.0 + 4 * i, steps=10, tokens=100))
        for i in range(len(actors))
    }
    made.board = SimpleNamespace(all=SimpleNamespace(remote=lambda: latest))
    made._hire = lambda: Member("spare", spare())  # type: ignore[method-assign]
    made.check_model = lambda lm: None  # type: ignore[method-assign]
    return made


def one_by_one(things: Iterable[StudyUnit]) -> Callable[[], StudyUnit | None]:
    """A function that returns the next unit at each call, then None."""
    left = iter(things)
    return lambda: next(left, None)


def units(n: int, size: int) -> list[StudyUnit]:
    cell = expand(parse_spec(HEAD + '[[runs]]\nprotocol = "exact"\nlengths = [3]\n', "spec"))[
        0
    ].cell
    found = [SourcedPassage(i, Passage((2, 3, 4)), "x") for i in range(n)]
    return list(in_units(cell, found, size, 2))


def test_rows_of_a_stream_that_did_not_end_are_not_those_of_the_next() -> None:
    """An interrupted call in Python leaves workers at work; their rows belong to other texts."""
    healthy = Actor(99, "done")
    made = pool(healthy, spare=lambda: healthy)
    stream = made.stream(one_by_one(units(4, 4)), None)
    next(stream)
    stream.close()
    with pytest.raises(MemvecError, match="for a call that did not end: close them and make new"):
        next(made.stream(lambda: None, None))


@pytest.mark.parametrize("end", ["error", "silence"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_another_worker_takes_the_passages_of_a_dead_one(end: str, rows: int) -> None:
    healthy = Actor(99, "done")
    made = pool(healthy, Actor(rows, end), spare=lambda: healthy)
    with pytest.warns(SlowPathWarning, match=r"does what is left of its work; 1 of at most 6"):
        numbers = [f.row.number for f in made.stream(one_by_one(units(11, 3)), None)]
    assert sorted(numbers) == list(range(11))


@pytest.mark.parametrize("rows", [0, 2])
def test_a_worker_whose_gpu_fails_is_ended_and_replaced(rows: int) -> None:
    """After such an error every call of its process to the GPU fails; other workers continue."""
    healthy, broken, killed = Actor(99, "done"), Actor(rows, "fault"), []
    made = pool(healthy, broken, spare=lambda: healthy)
    made.ray.kill = killed.append
    said = r"\(CUDA error: uncorrectable ECC error encountered\): .* 1 of at most 6"
    with pytest.warns(SlowPathWarning, match=said):
        numbers = [f.row.number for f in made.stream(one_by_one(units(11, 3)), None)]
    assert sorted(numbers) == list(range(11))
    assert killed == [broken]


@pytest.mark.parametrize("end", ["full", "other"])
def test_another_error_of_a_worker_ends_the_run(end: str) -> None:
    made = pool(Actor(0, end), spare=lambda: Actor(99, "done"))
    with pytest.raises(ZeroDivisionError):
        list(made.stream(one_by_one(units(4, 3)), None))


def test_units_for_gpus_fill_their_slots() -> None:
    """A unit for a GPU has at least as many passages as slots, if so many wait for each worker."""
    made = pool(*[Actor(99, "done")] * 8, spare=lambda: Actor(99, "done"))
    sizes = {}
    for made.gpu in (False, True):
        sizes[made.gpu] = [made.share(waiting, 100) for waiting in (1, 40, 800, 1600, 3200, 10_000)]
    assert sizes[False] == [1, 3, 50, 100, 200, 400]
    assert sizes[True] == [1, 5, 100, 100, 200, 400]


def test_a_worker_that_dies_while_a_unit_is_being_made_loses_nothing() -> None:
    healthy = Actor(99, "done")
    made = pool(Actor(0, "error"), spare=lambda: healthy)

    def slowly() -> Any:
        for unit in units(6, 3):
            made._replace(made.members[0])  # a failed call of the worker does the same
            yield unit

    numbers = [f.row.number for f in made.stream(one_by_one(slowly()), None)]
    assert sorted(numbers) == list(range(6))


def test_more_workers_than_cpus_of_ray_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would never start the last one, and its passages would wait forever."""
    here = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0})
    monkeypatch.setattr("memvec.workers.pool._start_ray", lambda *_: here)
    loading = Loading("pocket", None, "float32", None, {})
    with pytest.raises(MemvecError, match="3 workers need as many CPUs, and Ray has 2 here"):
        Workers(loading, workers=3)


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them would take the first GPU."""
    here = SimpleNamespace(cluster_resources=lambda: {"CPU": 64.0, "GPU": 2.0})
    monkeypatch.setattr("memvec.workers.pool._start_ray", lambda *_: here)
    loading = Loading("pocket", None, "float32", None, {})
    with pytest.raises(MemvecError, match="3 workers need a GPU each, and Ray has 2 here"):
        Workers(loading, workers=3)


@pytest.mark.parametrize("address", [None, "ray://there:10001"])
def test_workers_are_of_this_machine_unless_a_cluster_is_asked_for(address, monkeypatch) -> None:
    """Without an address Ray would join a cluster that RAY_ADDRESS or `ray start` names, and it
    refuses numbers of CPUs there."""
    asked: list[dict[str, Any]] = []
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **given: asked.append(given))
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert _start_ray(3, address) is ray
    assert asked[0]["address"] == (address or "local")
    assert asked[0].get("num_cpus") == (None if address else 3)


@pytest.mark.parametrize(
    ("gpus", "asked", "device"),
    [(2, "auto", "cuda"), (2, "cuda", "cuda"), (2, "cpu", "cpu"), (0, "auto", "auto")],
)
def test_workers_with_a_gpu_compute_on_it(
    gpus: int, asked: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is 'cuda', so a worker whose torch cannot use its GPU fails instead of computing
    on the CPU."""
    hired: list[Any] = []
    actor = SimpleNamespace(remote=lambda *given: hired.append(given))
    here = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 4.0, "GPU": float(gpus)},
        remote=lambda **_: lambda _: actor,
    )
    monkeypatch.setattr("memvec.workers.pool._start_ray", lambda *_: here)
    loading = Loading("pocket", None, "float32", None, {})
    made = Workers(loading, workers=2, device=asked)
    assert made.gpu == (device == "cuda")
    assert [given[1] for given in hired if given] == [device] * 2


def test_workers_on_one_numbered_gpu_are_refused() -> None:
    """Each of them would load the model on that GPU."""
    with pytest.raises(MemvecError, match="cuda:1 is one GPU, and each worker has its own"):
        Workers(Loading("pocket", None, "float32", None, {}), workers=2, device="cuda:1")


def test_a_worker_that_cannot_begin_ends_the_run_with_the_reason() -> None:
    """A replacement could not begin, either, so none is started."""
    hired = []

    def spare() -> Actor:
        hired.append(Actor(0, "unborn"))
        return hired[-1]

    made = pool(Actor(0, "unborn"), spare=spare)
    with pytest.raises(MemvecError, match=r"^a worker cannot begin: nowhere is no folder here\.$"):
        list(made.stream(one_by_one(units(6, 3)), None))
    assert not hired


def test_workers_that_keep_dying_end_the_study() -> None:
    made = pool(Actor(0, "error"), spare=lambda: Actor(0, "error"))
    with pytest.raises(MemvecError, match="workers died, the last one with: killed"):
        list(made.stream(one_by_one(units(6, 3)), None))
    assert made.share(100, 8) == 32
    assert made.share(3, 8) == 2
    made.close()


def test_the_horizon_of_all_workers_is_shown() -> None:
    """It is the mean over the slots of workers that have a unit; others are not counted."""
    healthy = Actor(99, "done")
    made = pool(healthy, Actor(99, "done"), spare=lambda: healthy)
    seen: list[Progress] = []
    list(made.stream(one_by_one(units(4, 2)), seen.append))
    assert {p.horizon for p in seen} <= {3.0, 5.0, 7.0}  # one, both, the other
    assert 5.0 in {p.horizon for p in seen}
    made = pool(Actor(99, "done"), Actor(99, "done"), spare=lambda: healthy)
    made.members[1].unit = units(4, 2)[0]
    assert made._progress().horizon == 7.0  # the first worker's report is of an earlier unit
    assert combined([]) is None
    both = [Progress(1, 0, 2.0, steps=5, tokens=50), Progress(3, 4, 6.0, steps=7, tokens=70)]
    assert combined(both) == Progress(4, 4, 5.0, steps=12, tokens=120)


def test_passages_that_share_a_vector_are_decoded_without_workers():
    recipe = Recipe(steps=3, if_not_exact="stop")
    options = {"layout": "one-step-shared", "tokens": 2, "recipe": recipe, "halve": False}
    lm = reader("words")
    mem = codec.cram(lm, ["the cat sat on the mat " * 12], **options)
    workers = pool(spare=lambda: Actor(0, "done"))  # this actor gives no results
    workers.gpu = False
    assert len(mem.passages) > 32
    decoded = decode_passages(mem.view(lm), mem, workers)
    assert decoded == mem.decode_passages(lm) == decode_passages(lm, mem)


def test_workers_decode_with_the_callers_force(monkeypatch):
    """With `force`, workers decode vectors of other weights, as one process does."""
    lm, forced, plain = reader("words"), [], MemVectors.decode_passages

    def noted(mem, lm, force=False):
        forced.append(force)
        return plain(mem, lm, force=force)

    recipe = Recipe(steps=0, if_not_exact="stop")
    mem = codec.cram(lm, ["the cat sat on the mat " * 7], tokens=1, recipe=recipe)
    monkeypatch.setattr(MemVectors, "decode_passages", noted)
    healthy = Actor(99, "done")
    workers = pool(healthy, healthy, spare=lambda: healthy)
    workers.gpu = False
    for force in (False, True):
        forced.clear()
        assert decode_passages(lm, mem, workers, force=force) == plain(mem, lm)
        assert forced == [force] * -(-len(mem.passages) // 32)
    assert len(forced) == 2


@pytest.mark.parametrize(("rows", "end"), [(99, "done"), (3, "error"), (0, "silence")])
@pytest.mark.parametrize(
    ("bits", "most", "least"), [pytest.param(12.0, None, 1, marks=pytest.mark.slow), (25.0, 4, 2)]
)
def test_documents_that_workers_cut_have_the_same_passages(
    bits, most, least, rows, end, monkeypatch
):
    """Also if a worker dies. The driver reads the first passages of a part only, until the two cuts
    have a start in common."""
    monkeypatch.setattr(cutting, "PART", 50)
    monkeypatch.setattr(cutting, "SECTION", 16)
    lm, read, shares = reader("words"), [], list[float]()
    draw = torch.Generator().manual_seed(3)
    plain = Document.of(lm, "the cat")
    documents = [
        replace(plain, ids=tuple(torch.randint(2, lm.vocab_size, (n,), generator=draw).tolist()))
        for n in (200, 7, 60)
    ]
    cutter = Cutter(lm, bits=bits, max_tokens=most, min_tokens=least)
    expected = [list(cutter.cut(d.ids, i)) for i, d in enumerate(documents)]
    healthy = Actor(99, "done")
    workers = pool(healthy, Actor(rows, end), healthy, spare=lambda: healthy)
    cutter.known = cut_lengths(workers, cutter, documents, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=0.05)
    fitting = Cutter._fitting
    monkeypatch.setattr(Cutter, "_fitting", lambda *given: read.append(given[2]) or fitting(*given))
    found = [list(cutter.cut(d.ids, i)) for i, d in enumerate(documents)]
    assert found == expected
    assert len(read) < sum(map(len, expected)) / 3
    assert not {0, *range(1, 40)} & set(read)  # the first parts are known whole


@pytest.mark.parametrize(
    ("limit", "number"), [({"tokens": 3}, 9), ({"bits": math.inf}, 9), ({"bits": 25.0}, 1)]
)
def test_workers_cut_nothing_that_one_process_cuts_as_fast(limit, number):
    """Passages of a number of tokens, whole documents, or one short document."""
    lm, healthy = reader("words"), Actor(99, "done")
    workers = pool(healthy, healthy, spare=lambda: healthy)
    documents = [Document.of(lm, "the cat sat on the mat " * 9)] * number
    assert cut_lengths(workers, Cutter(lm, **limit), documents, print) == {}
    assert cut_lengths(None, Cutter(lm, bits=25.0), documents, print) == {}


def test_workers_of_another_model_are_refused_before_they_work():
    """For example the model of the Hub, beside a model in memory that was trained further."""
    lm, healthy = reader("words"), Actor(99, "done")
    workers = pool(healthy, healthy, spare=lambda: healthy)
    del workers.check_model
    workers.loading, theirs = Loading("there"), reader("words", seed=1)
    workers.call = lambda function, *given: function(theirs, *given)
    sentence = r"loaded there, which has other weights than tiny-words: give both the same model\.$"
    with pytest.raises(MemvecError, match=sentence):
        codec.cram(lm, ["the cat sat on the mat"], tokens=2, workers=workers)
    workers.check_model(theirs)


def test_workers_in_another_dtype_are_refused_before_they_work():
    """They would decode for the certificate, which names the dtype of the model that is given."""
    lm, healthy = reader("words"), Actor(99, "done")
    workers = pool(healthy, healthy, spare=lambda: healthy)
    del workers.check_model
    workers.loading = Loading("there")
    workers.call = lambda *_: replace(lm.fingerprint, dtype="bfloat16")
    sentence = (
        r"loaded there in bfloat16, and tiny-words is in float32: give both the same dtype\.$"
    )
    with pytest.raises(MemvecError, match=sentence):
        codec.cram(lm, ["the cat sat on the mat"], tokens=2, workers=workers)


def test_closed_workers_are_refused():
    """A stream of no workers would end at once, without a result."""
    lm, healthy = reader("words"), Actor(99, "done")
    workers = pool(healthy, healthy, spare=lambda: healthy)
    del workers.check_model
    workers.close()
    workers.close()
    with pytest.raises(MemvecError, match=r"^the workers are closed: make new ones\.$"):
        codec.cram(lm, ["the cat"], tokens=2, workers=workers)
    with pytest.raises(MemvecError, match=r"^the workers are closed: make new ones\.$"):
        list(workers.stream(lambda: None, None))


def test_a_number_in_the_place_of_workers_is_refused_with_what_to_give(untyped):
    sentence = r"^workers are memvec\.workers\.Workers, as Workers\(.*\) gives, not 2\.$"
    with pytest.raises(MemvecError, match=sentence):
        codec.cram(reader("words"), ["the cat"], tokens=2, workers=2)


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(MemvecError, match=r"^workers must be at least 0, not -1\.$"):
        Workers(Loading("there"), workers=-1)


def test_each_document_is_cut_in_a_part_for_each_worker_if_it_is_long_enough(monkeypatch):
    """What a dead worker leaves of a part begins where its last result ends."""
    monkeypatch.setattr(cutting, "PART", 50)
    monkeypatch.setattr(cutting, "SECTION", 16)
    lm = reader("words")
    documents = [replace(Document.of(lm, "a"), ids=tuple(range(n))) for n in (50, 201, 60)]
    parts = list(cutting._parts(3, documents))
    assert parts == [
        (0, 0, 50), (1, 0, 67), (1, 67, 134), (1, 134, 201), (2, 0, 50), (2, 50, 60)
    ]  # fmt: skip
    cutter = Cutter(lm, bits=25.0, max_tokens=9, min_tokens=2)
    unit = cutting._unit(cutter, documents, parts[2])
    assert unit.keys() == {(1, 67), (1, 83), (1, 99), (1, 115), (1, 131)}
    left = unit.without({(1, 67), (1, 83), (2, 0)})
    assert left.keys() == {(1, 99), (1, 115), (1, 131)}
    assert left.ids == tuple(range(99, 134 + 9 + 2))


@pytest.mark.parametrize(("rows", "end"), [(99, "done"), (1, "error"), (0, "silence")])
def test_a_crew_returns_every_passage_once_those_pushed_later_too(rows: int, end: str) -> None:
    """Two workers cram a document, and one of them may die. Halves of passages are pushed while the
    crew runs."""
    healthy = Actor(99, "done")
    made = pool(healthy, Actor(rows, end), spare=lambda: healthy)
    crew = Crew(
        made, Batch((), Recipe(), vectors=1, batch_size=2, storage="float32", layout="prefix")
    )
    seen = []
    for passage in crew.run(Passage((2,) * (1 + i % 4), 0, 10 * i) for i in range(9)):
        seen.append((passage.offset, len(passage)))  # scripted actors give the passage itself
        if len(passage) == 4:
            for half in passage.halves():
                crew.push(half)
    whole = [(10 * i, 1 + i % 4) for i in range(9)]
    halves = [(10 * i + j, 2) for i in range(9) if i % 4 == 3 for j in (0, 2)]
    assert sorted(seen) == sorted(whole + halves)


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        pytest.param(99, "done", marks=pytest.mark.slow),
        pytest.param(0, "silence", marks=pytest.mark.slow),
        (1, "error"),
    ],
)
def test_workers_decode_what_one_process_decodes(
    rows: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They decode the same batches, each once, also if a worker dies. Workers on another device
    decode nothing, because their certificate would be of that device."""
    lm = reader("words")
    batches: list[int] = []
    plain = MemVectors.decode_passages

    def counted(mem: MemVectors, lm: Any, force: bool = False) -> list[list[int]]:
        batches.append(len(mem.passages))
        return plain(mem, lm, force=force)

    recipe = Recipe(steps=20, if_not_exact="stop")  # passages that are not exact are compared, too
    mem = codec.cram(lm, ["the cat sat on the mat " * 25], vectors=2, tokens=2, recipe=recipe)
    expected = mem.decode_passages(lm)
    monkeypatch.setattr(MemVectors, "decode_passages", counted)
    healthy = Actor(99, "done")
    made = pool(healthy, Actor(rows, end), spare=lambda: healthy)
    made.gpu = False
    assert decode_passages(lm, mem, made) == expected
    each_once = [32] * (len(expected) // 32) + [len(expected) % 32]
    assert sorted(batches) == sorted(each_once)
    batches.clear()
    made.members.clear()
    made.gpu = True  # another device than the caller's
    assert decode_passages(lm, mem, made) == expected
    shares: list[float] = []
    assert decode_passages(lm, mem, on_share=shares.append) == expected
    assert batches == 2 * each_once
    assert shares == [sum(each_once[: i + 1]) / len(expected) for i in range(len(each_once))]


@pytest.mark.slow
def test_two_real_workers_cram_a_document_as_one_process_does(
    folder: Path, tmp_path: Path, memvec_with_ray: list[str]
) -> None:
    """The command with Ray crams the same passages as one process; they are exact."""
    pytest.importorskip("ray")
    text = "the lazy dog\r\n\té 👍\n\n" * 2
    (tmp_path / "a.txt").write_bytes(text.encode())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file, stored = str(tmp_path / "a.txt"), tmp_path / "two.mem"
    options = ["-m", str(folder), "--vectors", "2", "--tokens", "2", "--steps", "600"]
    line = [*memvec_with_ray, "cram", file, *options, "-o", str(stored)]
    subprocess.run([*line, "--workers", "2"], env=environment, check=True, timeout=300)
    lm, two = load_lm(str(folder)), MemVectors.load(stored)
    assert codec.decode(lm, two) == [text]
    one = codec.cram(lm, [text], vectors=2, tokens=2, recipe=Recipe(steps=600))
    assert [p.sha256 for p in two.passages] == [p.sha256 for p in one.passages]
    assert two.exact


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("layout", ["prefix", "one-step"])
def test_a_workers_batch_has_the_vectors_of_one_engine(layout, storage):
    """The vectors are equal in each storage format, under the passage's key. `without` leaves the
    other passages."""
    lm, recipe = tiny(), replace(QUICK, steps=40)
    asked = tuple(
        Passage(p.ids, d, 5 * o)
        for d, o, p in zip([0, 0, 1, 1], [0, 1, 0, 1], passages(4, 3, 4, 2, seed=8), strict=True)
    )
    batch = Batch(asked, recipe, vectors=2, batch_size=2, storage=storage, layout=layout)
    found = dict(batch.work(lm, "here", None))
    assert found.keys() == batch.keys() == {(p.document, p.offset) for p in asked}
    engine = Engine(lm.read_as(layout), recipe, vectors=2, batch_size=2, storage=storage)
    for outcome in engine.run(asked):
        ours = found[outcome.passage.document, outcome.passage.offset]
        assert ours.passage == outcome.passage
        assert ours.vectors.dtype == outcome.vectors.dtype
        assert torch.equal(ours.vectors, outcome.vectors)
    for p in asked:
        left = batch.without({(p.document, p.offset)})
        assert left.keys() == batch.keys() - {(p.document, p.offset)}


@pytest.mark.parametrize("end", ["error", "silence"])
def test_a_unit_with_the_same_numbers_as_an_earlier_one_loses_no_passage(end):
    """The passages of each cell are numbered from 0, so results of one cell must not count as those
    of the next."""
    (first,), (second,) = units(4, 4), units(4, 4)
    first = replace(first, passages=first.passages[2:])
    # The first actor gives two passages of each unit: all of the first unit, half of the second.
    made = pool(Actor(2, end), spare=lambda: Actor(99, "done"))
    found = list(made.stream(one_by_one([first, second]), None))
    assert len(found) == 2 + 4
    assert sorted(f.row.number for f in found) == [0, 1, 2, 2, 3, 3]


GPUS = {"CPU": 4.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("resources", "asked", "device", "count", "gpu"),
    [
        ({"CPU": 4.0}, 0, "auto", 4, False),
        ({"CPU": 4.0}, 4, "auto", 4, False),
        ({}, 0, "auto", 1, False),
        (GPUS, 0, "auto", 2, True),
        (GPUS, 2, "cuda", 2, True),
        (GPUS, 1, "auto", 1, True),
        (GPUS, 3, "cpu", 3, False),
    ],
)
def test_workers_get_a_gpu_or_a_cpu_and_a_share_of_the_threads(
    resources, asked, device, count, gpu, monkeypatch
):
    """By default there is one for each GPU, else one for each CPU; they share the CPU's threads.

    A worker with a GPU gets the device 'cuda', so it computes on the GPU or fails.
    """
    hired: list[SimpleNamespace] = []

    def remote(**options):
        def made(kind):
            def hire(*arguments):
                hired.append(SimpleNamespace(kind=kind, options=options, arguments=arguments))
                return hired[-1]

            return SimpleNamespace(remote=hire)

        return made

    ray = SimpleNamespace(cluster_resources=lambda: resources, remote=remote)
    monkeypatch.setattr("memvec.workers.pool._start_ray", lambda *_: ray)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10)
    loading = Loading("pocket", None, "float32", None, {})
    workers = Workers(loading, workers=asked, device=device)
    board, *actors = hired
    assert (workers.count, workers.gpu) == (count, gpu)
    assert board.options == {"num_cpus": 0}
    assert [actor.options for actor in actors] == [
        {"max_restarts": 0, "num_gpus": int(gpu), "num_cpus": 1}
    ] * count
    threads = 0 if gpu else max(1, 10 // count)
    assert [actor.arguments for actor in actors] == [
        (loading, "cuda" if gpu else device, threads, f"ray-{i}", board)
        for i in range(1, count + 1)
    ]


def answering(answer: Any) -> Any:
    """An actor that answers every call, with an error if `answer` is one."""
    return SimpleNamespace(call=SimpleNamespace(remote=lambda function, *args: answer))


def test_a_call_asks_an_idle_worker_and_replaces_it_if_it_died():
    """A busy worker that died is replaced by the stream, which knows its unit, not by the call."""
    made = pool(answering("busy"), answering("idle"), spare=lambda: answering("spare"))
    made.members[0].unit = units(1, 1)[0]
    assert made.call(str) == "idle"
    made.members[1].actor = answering(DiedError("killed"))
    assert made.call(str) == "spare"
    assert [member.name for member in made.members] == ["ray-0", "spare"]
    made = pool(answering(DiedError("killed")), spare=lambda: answering("spare"))
    made.members[0].unit = units(1, 1)[0]
    with pytest.raises(MemvecError, match="workers die at start: killed"):
        made.call(str)
    assert [member.name for member in made.members] == ["ray-0"]


@pytest.mark.parametrize("cause", [MemvecError("bad input"), ValueError("a fault"), None])
def test_a_call_raises_the_error_of_the_function(cause):
    """A MemvecError is raised as it is; any other error is raised as Ray's error."""
    error = ZeroDivisionError("Ray's account")  # RayTaskError in this pool
    error.cause = cause  # type: ignore[attr-defined]
    with pytest.raises((MemvecError, ZeroDivisionError)) as raised:
        pool(answering(error), spare=lambda: answering("spare")).call(str)
    assert raised.value is (cause if isinstance(cause, MemvecError) else error)


def test_units_of_dead_workers_are_done_before_new_units():
    healthy = Actor(99, "done")
    made = pool(Actor(0, "error"), spare=lambda: healthy)
    found = [f.row.number for f in made.stream(one_by_one(units(9, 3)), None)]
    assert found == list(range(9))


def test_a_worker_reports_once_a_second_and_the_seconds_of_all_are_added(monkeypatch):
    reported: list[Any] = []
    board = SimpleNamespace(report=SimpleNamespace(remote=lambda *each: reported.append(each)))
    clock = iter([10.0, 10.0, 10.5, 11.5, 11.5, 12.0])  # sending a report reads it twice
    monkeypatch.setattr("memvec.workers.actor.time.monotonic", clock.__next__)
    worker = object.__new__(Worker)
    worker.name, worker.board, worker._last_report = "one", board, 0.0
    states = [Progress(1, 0, 2.0, steps=i, tokens=i, seconds=1.0 + i) for i in range(4)]
    for state in states:
        worker._report(state)
    assert reported == [("one", asdict(states[0])), ("one", asdict(states[2]))]
    assert combined(states[:3]).seconds == 6.0
    # The board's own process does not import torch, which takes seconds of a core.
    program = (
        "import pickle, sys; made, reports = pickle.loads(sys.stdin.buffer.read())\n"
        "for report in reports: made.report(*report)\n"
        "assert made.all() == dict(reports[1:]) and 'torch' not in sys.modules"
    )
    sent = pickle.dumps((ProgressBoard(), reported))
    subprocess.run([sys.executable, "-c", program], input=sent, check=True, timeout=100)


def test_batches_of_a_result_are_decoded_once_and_put_in_order(monkeypatch):
    """This holds for every order in which workers finish them, and for a unit continued twice."""
    rows = property(lambda mem: list(getattr(mem, "rows", range(9))))

    def part(mem, first, end):
        made = object.__new__(MemVectors)
        made.rows = mem.passages[first:end]
        return made

    monkeypatch.setattr(decoding, "BATCH", 2)
    monkeypatch.setattr(decoding, "UNITS", 2)
    monkeypatch.setattr(decoding, "passages_of", part)
    monkeypatch.setattr(MemVectors, "passages", rows)
    monkeypatch.setattr(MemVectors, "check_model", lambda mem, lm, force: None)
    monkeypatch.setattr(
        MemVectors, "decode_passages", lambda mem, lm, force: [[n] for n in mem.passages]
    )
    lm, mem = tiny(), object.__new__(MemVectors)
    unit = Decoding(part(mem, 4, 9), 4)
    found = dict(unit.work(lm, "one", None))
    assert found == {4: (4, [[4], [5]]), 6: (6, [[6], [7]]), 8: (8, [[8]])}
    assert unit.keys() == found.keys()
    left = unit.without({6}).without({4})
    assert left.keys() == dict(left.work(lm, "two", None)).keys() == {8}

    def backwards(next_unit, on_progress):
        given = iter(next_unit, None)
        return reversed([result for unit in given for _, result in unit.work(lm, "one", None)])

    workers = pool(Actor(0, "done"), spare=lambda: Actor(0, "done"))
    workers.gpu, workers.stream = False, backwards
    assert decode_passages(lm, mem, workers) == [[n] for n in range(9)]


def test_a_unit_of_a_crew_refills_the_slots_of_its_worker():
    """It has at most four passages for each slot, the longest first."""
    batch = Batch((), Recipe(), vectors=1, batch_size=3, storage="float32", layout="prefix")
    crew = Crew(pool(*[Actor(0, "done")] * 2, spare=lambda: Actor(0, "done")), batch)
    for n in range(100):
        crew.push(Passage((2,) * (1 + n % 50), 0, n))
    taken = [len(crew._next_batch().passages) for _ in range(2)]
    assert taken == [12, 12]
    assert max(len(job.passage) for job in crew.waiting.jobs()) == 38
    for _ in range(70):
        crew.waiting.pop()
    assert len(crew._next_batch().passages) == 2  # of six, so that the other worker gets some


def test_progress_is_asked_for_again_after_each_answer():
    """The newest answer of the board is shown; a board that died is asked no more."""
    made = pool(Actor(0, "error"), spare=lambda: Actor(0, "error"))
    made.members[0].unit = units(1, 1)[0]
    answers: list[Any] = [{"ray-0": asdict(Progress(1, 0, 2.0, steps=i, tokens=i))} for i in (3, 4)]
    answers.append(DiedError("killed"))
    made.board = SimpleNamespace(all=SimpleNamespace(remote=iter(answers).__next__))
    assert [made._progress().steps for _ in range(2)] == [3, 4]
    assert made._progress() is None
    assert (made.board, made._progress()) == (None, None)


def test_a_worker_loads_the_model_with_all_settings(monkeypatch):
    asked: list[Any] = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return tiny()

    monkeypatch.setattr("memvec.workers.actor.load_lm", load)
    loading = Loading("some", "v2", "bfloat16", Path("an.encoder"), {"offload": True})
    assert loading.load("cuda") is tiny()
    names = {"revision": "v2", "dtype": "bfloat16", "encoder": Path("an.encoder")}
    assert asked == [(("some",), {**names, "device": "cuda", "offload": True})]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_ends_after_more_than_three_deaths_for_each_worker(count):
    hired = []

    def spare():
        hired.append(Actor(0, "error"))
        return hired[-1]

    made = pool(*(Actor(0, "error") for _ in range(count)), spare=spare)
    with pytest.raises(MemvecError, match=f"^{3 * count + 1} workers died"):
        list(made.stream(one_by_one(units(60, 3)), None))
    assert len(hired) == 3 * count
