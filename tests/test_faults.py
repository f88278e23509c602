"""Too little memory, interrupts and a second process lose no passage that is finished."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from conftest import QUICK, build, one_step, passages, reader, tiny
from memvec import codec
from memvec.arms.shared_m import Shared
from memvec.cramming.batch import Job
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.errors import MemvecError
from memvec.journal import Journal
from memvec.model.lm import FrozenLM
from memvec.vectors import MemVectors

TEXT = "the cat sat on the lazy dog"
OPTIONS = {"vectors": 2, "tokens": 2, "recipe": QUICK}


class Cramped:
    """A model whose forward pass raises `error` for a batch of more than `rows` passages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception) -> None:
        self.rows, self.failures, self.batches = rows, 0, []
        model = build("llama")
        forward = type(model.model).forward

        def cramped(body, *args, **kwargs):
            given = kwargs.get("inputs_embeds")
            given = kwargs.get("input_ids") if given is None else given
            self.batches.append(len(given))
            if len(given) > self.rows:
                self.failures += 1
                raise error
            return forward(body, *args, **kwargs)

        self.lm = FrozenLM(model, name="cramped")
        monkeypatch.setattr(type(model.model), "forward", cramped)


NO_ROOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", NO_ROOM, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("rows", [1, 3])
def test_out_of_memory_halves_the_slots_and_goes_on(monkeypatch, rows, error):
    cramped, asked = Cramped(monkeypatch, rows, error), passages(2, 3, 2, 2, 3, 2, 2)
    engine = Engine(cramped.lm, QUICK, vectors=2, batch_size=7)
    outcomes = list(engine.run(asked))
    assert cramped.failures > 0
    assert engine.batch_size == rows
    assert sorted(o.passage.document for o in outcomes) == list(range(7))
    assert all(o.exact for o in outcomes)
    vectors = torch.stack([o.vectors for o in outcomes])
    found = decode_ids(cramped.lm, vectors, [len(o.passage) for o in outcomes])
    assert found == [list(o.passage.ids) for o in outcomes]


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 3])
def test_no_memory_for_new_slots_fills_fewer_slots(monkeypatch, room):
    """The slots are filled at the start and later; no passage is lost, and each is exact."""
    lm, filled = tiny(), []
    engine = Engine(lm, QUICK, vectors=2, batch_size=6)
    fresh = type(engine.stepper.optimizer).fresh

    def cramped(self, parameters):
        taken = len(engine.jobs)
        if taken + len(parameters) > room:
            raise NO_ROOM[0]
        filled.append(taken + len(parameters))
        return fresh(self, parameters)

    monkeypatch.setattr(type(engine.stepper.optimizer), "fresh", cramped)
    outcomes = list(engine.run(passages(2, 3, 2, 3, 3, 2, 2)))
    assert sorted(o.passage.document for o in outcomes) == list(range(7))
    assert all(o.exact for o in outcomes)
    assert max(filled) <= room
    assert engine.batch_size <= room


def test_no_memory_for_the_state_of_one_slot_is_one_sentence(monkeypatch):
    engine = Engine(tiny(), QUICK, vectors=2, batch_size=4)

    def cramped(self, parameters):
        raise NO_ROOM[0]

    monkeypatch.setattr(type(engine.stepper.optimizer), "fresh", cramped)
    with pytest.raises(MemvecError, match="one passage of 3 tokens does not fit"):
        list(engine.run(passages(3, 3, 3)))


def test_no_memory_for_a_forward_pass_of_one_passage_is_one_sentence(monkeypatch):
    cramped = Cramped(monkeypatch, 0, NO_ROOM[0])
    with pytest.raises(MemvecError, match="one passage of 3 tokens does not fit") as error:
        list(Engine(cramped.lm, QUICK, vectors=2, batch_size=4).run(passages(3, 3, 3)))
    assert "\n" not in str(error.value)


def test_passages_continue_after_out_of_memory(monkeypatch):
    """After step 3 the device has room for one passage of four."""
    cramped = Cramped(monkeypatch, 4, NO_ROOM[0])
    engine = Engine(cramped.lm, QUICK, vectors=2, batch_size=4)

    def shrink(progress):
        if progress.steps == 3:
            cramped.rows = 1

    engine.on_progress = shrink
    outcomes = list(engine.run(passages(3, 3, 3, 3)))
    assert cramped.failures > 0
    assert all(o.exact for o in outcomes)
    # No step is repeated. Each passage has one pass more, in which it meets its margin.
    assert engine.steps <= 3 + sum(o.steps - 3 + 1 for o in outcomes)


def test_out_of_memory_at_the_last_step_keeps_the_longest_horizon(monkeypatch):
    """At the last step of passages that are not exact, the device has room for one of them."""
    steps = 40
    cramped = Cramped(monkeypatch, 4, NO_ROOM[0])
    recipe = Recipe(steps=steps, margin=0.0)
    engine, measured = Engine(cramped.lm, recipe, batch_size=4), {}

    def shrink(progress):
        best_so_far = engine.batch.schedule.best.tolist() if engine.batch is not None else []
        for job, best in zip(engine.jobs, best_so_far, strict=True):
            measured[job.passage.document] = best
        if progress.steps == steps:
            cramped.rows = 1

    engine.on_progress = shrink
    outcomes = list(engine.run(passages(24, 24, 24, 24)))
    assert cramped.failures > 0
    assert min(measured.values()) > 0
    for outcome in outcomes:
        assert outcome.metrics.horizon >= measured[outcome.passage.document]


def test_passages_that_share_a_vector_are_crammed_in_smaller_passes(monkeypatch):
    cramped = Cramped(monkeypatch, 1, NO_ROOM[0])
    jobs = [Job(p, QUICK.margin) for p in passages(2, 2, 2)]
    found = Shared(one_step(cramped.lm), QUICK, batch_size=3, storage="float32").run(jobs)
    assert cramped.failures > 0
    assert all(o.exact for o in found)
    cramped.rows = 0
    with pytest.raises(MemvecError, match="one passage of 2 tokens does not fit"):
        Shared(one_step(cramped.lm), QUICK, batch_size=3, storage="float32").run(jobs)


def test_other_errors_of_the_device_are_not_taken_for_too_little_memory(monkeypatch):
    cramped = Cramped(monkeypatch, 0, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        list(Engine(cramped.lm, QUICK, batch_size=2).run(passages(2, 2)))


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_an_interrupt_during_save_leaves_the_old_file_or_none(tmp_path, monkeypatch, call, before):
    mem = codec.cram(reader(), ["the"], **OPTIONS)
    target = tmp_path / "a.mem"
    if before is not None:
        target.write_bytes(before)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            mem.save(target, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["a.mem"])
    assert before is None or target.read_bytes() == before
    assert MemVectors.load(mem.save(target, force=True)).exact


@pytest.mark.slow
def test_after_an_interrupt_during_save_nothing_is_crammed_again(
    command, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.txt").write_text(TEXT)
    words = ["cram", "letter.txt", "-m", folder, "--vectors", 2, "--tokens", 2, "--steps", 600]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        ran = command(*words)
    assert ran.code == 130
    assert "the same command goes on from there" in ran.err
    assert not list(tmp_path.glob("letter.mem.safetensors"))
    pushed = []
    push = Engine.push
    monkeypatch.setattr(Engine, "push", lambda self, p: pushed.append(p) or push(self, p))
    assert command(*words).code == 0
    assert pushed == []
    assert command("decode", "letter.mem").out == TEXT.encode()


HOLDS = """
import sys
from pathlib import Path
from memvec.journal import Journal
journal = Journal(Path(sys.argv[1]), {})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_process_on_the_same_output_is_refused(tmp_path):
    """The lock of a process that was killed is gone."""
    path = tmp_path / "a.mem.partial"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(MemvecError, match=r"another memvec is writing a\.mem"):
        Journal(path, {})
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    Journal(path, {}).close(delete=True)
