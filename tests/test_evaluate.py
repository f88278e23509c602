"""`memvec eval`: the inputs in place of a context, answers after them, receipts, and the harness.

Tests that need lm-evaluation-harness are skipped without it; `make test-eval` installs it.
"""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from copy import copy
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import reader, tiny
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.journal import Journal
from memvec.statistics import bootstrap_mean, share_interval
from memvec.usable import columns, receipts
from memvec.usable import evaluate as evaluating
from memvec.usable.answers import EmbeddedRequest, likelihoods, written
from memvec.usable.columns import COLUMNS, Column, request_of, split_text
from memvec.usable.evaluate import Evaluation, _recipe_arguments, evaluate
from memvec.usable.queries import text_inputs
from memvec.usable.receipts import Answer, Receipt, score_figures, scores_of

pytestmark = pytest.mark.slow  # left out of `make check`

ROOT = Path(__file__).parent.parent
TASKS = Path(__file__).parent / "evaluation"
QUICK = Recipe.of("usable", settle=3, steps=300, query_count=2, query_tokens=4)
SIZES = {"vectors": 2, "tokens": 3, "recipe": QUICK}
IDS = (5, 9, 7, 11, 6, 8, 12)


# ---------------------------------------------------------------------- context and question


@pytest.mark.parametrize(
    ("prompt", "split", "context", "question"),
    [
        ("one\n\ntwo\n\nthree", "\n\n", "one\n\ntwo\n\n", "three"),
        ("three", "\n\n", "", "three"),
        ("one\n\ntwo\n\n", "\n\n", "one\n\n", "two\n\n"),
        (
            "Text.\n\nQuestion: a?\n\nAnswer:",
            "\n\nQuestion:",
            "Text.\n\n",
            "Question: a?\n\nAnswer:",
        ),
        ("Q: a Q: b", "Q:", "Q: a ", "Q: b"),
    ],
)
def test_a_question_begins_at_the_last_split(prompt, split, context, question):
    assert split_text(prompt, split) == (context, question)
    assert context + question == prompt


@pytest.mark.parametrize("prompt", ["the cat\n\nthe dog", "a  b\n\n\n\nthe fox sat ", "the dog on"])
def test_context_question_and_answer_are_the_tokens_of_the_whole_text(prompt):
    lm = reader()
    request = request_of(lm, prompt, " the mat")
    assert lm.text([*request.context, *request.question, *request.answer]) == prompt + " the mat"
    assert list(sum(request, ())) == lm.tokenize(prompt + " the mat")
    alone, beside = lm.tokenize(split_text(prompt)[0]), lm.tokenize(prompt.rstrip())
    common = max(n for n in range(len(alone) + 1) if alone[:n] == beside[:n])
    assert list(request.context) == beside[:common]
    assert (common > 0) == ("\n\n" in prompt)
    after = request_of(lm, "<s>" + prompt, " the mat")
    assert after == request, "the start token of a template is removed, because the column adds it"


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_answer():
    lm = reader()
    asked, spaced = request_of(lm, "the cat sat", " on"), request_of(lm, "the cat sat ", "on")
    assert asked == spaced
    assert lm.text(request_of(lm, "the cat ").question) == "the cat ", "without an answer it stays"


# ---------------------------------------------------------------------- columns


def test_each_column_has_its_own_inputs_in_place_of_the_context():
    lm = tiny()
    embedded = {name: Column(lm, name, **SIZES).stand_in(IDS) for name in COLUMNS}
    bos = [lm.bos_id]
    for name, ids in (("full", [*bos, *IDS]), ("none", bos), ("truncated", [*bos, *IDS[-6:]])):
        assert torch.equal(embedded[name].inputs, lm.embed(torch.tensor([ids])))
        assert embedded[name].exact is None
    slots = {name: stand.slots for name, stand in embedded.items()}
    assert slots == {"full": 7, "none": 0, "truncated": 6, "crammed": 6}, "7 tokens in 3 passages"
    inputs = embedded["crammed"].inputs  # after BOS, too
    assert inputs.shape == (1, 1 + 6, lm.width)
    assert torch.equal(inputs[:, :1], lm.embed(torch.tensor([bos])))
    assert embedded["crammed"].exact is True
    assert Column(lm, "crammed", **SIZES).stand_in(()).slots == 0


@pytest.mark.slow
def test_a_context_that_is_not_exact_gets_no_more_vectors():
    """16 tokens in one vector are not exact; halves would have two vectors, and so are not made."""
    lm = reader()
    text = "the quick brown fox jumps over the lazy dog and the cat sat on the mat"
    ids = tuple(lm.tokenize(text))
    recipe = Recipe.of("usable", settle=5, decay=5, steps=10, patience=10, compute="model")
    recipe = replace(recipe, query_count=2, query_tokens=4)
    crammed, end = (
        Column(lm, name, vectors=1, tokens=len(ids), recipe=recipe).stand_in(ids)
        for name in ("crammed", "truncated")
    )
    assert crammed.exact is False
    assert crammed.slots == end.slots == 1


def test_the_passages_of_a_context_are_of_equal_length():
    column = Column(tiny(), vectors=2, tokens=3)
    assert column.pieces(IDS) == [(0, 2), (2, 4), (4, 7)]
    assert column.pieces(IDS[:3]) == [(0, 3)]
    assert column.pieces(()) == []


def test_a_cache_has_each_passage_as_soon_as_it_is_crammed(tmp_path, monkeypatch):
    lm, other = tiny(), (20, 21, 22)
    put, crammed = Journal.put, []

    def counted(self, outcome):
        if len(crammed) == 2:
            raise KeyboardInterrupt
        crammed.append(outcome.passage.ids)
        put(self, outcome)

    monkeypatch.setattr(Journal, "put", counted)
    with pytest.raises(KeyboardInterrupt):  # killed with two passages of four done
        Column(lm, "crammed", cache=tmp_path, batch_size=1, **SIZES).prepare([IDS, other])
    monkeypatch.setattr(Journal, "put", put)
    run, asked = Engine.run, []

    def listed(self, passages=()):
        passages = list(passages)
        asked.extend(p.ids for p in passages)
        yield from run(self, passages)

    monkeypatch.setattr(Engine, "run", listed)
    again = Column(lm, "crammed", cache=tmp_path, batch_size=1, **SIZES)
    again.prepare([IDS, other, IDS])
    assert sorted([*crammed, *asked]) == sorted([IDS[:2], IDS[2:4], IDS[4:], other])
    asked.clear()
    third = Column(lm, "crammed", cache=tmp_path, **SIZES)
    assert torch.equal(third.stand_in(IDS).inputs, again.stand_in(IDS).inputs)
    assert asked == []
    fewer = Column(lm, "crammed", cache=tmp_path, **{**SIZES, "vectors": 1})
    fewer.stand_in(other)
    assert asked[0] == other, "other sizes are other vectors"


def test_a_cache_depends_on_the_content_of_files_that_the_recipe_names(tmp_path, monkeypatch):
    """Other questions in a file of the same name give other vectors."""
    settings = []
    monkeypatch.setattr(columns, "Journal", lambda _, of: settings.append(of))
    monkeypatch.setattr(columns.CramJob, "cram", lambda *_: None)
    questions = tmp_path / "questions.txt"
    sizes = {**SIZES, "recipe": replace(QUICK, queries=str(questions))}
    for text in ("a", "a", "b"):
        questions.write_text(text, "utf-8")
        Column(reader(), "crammed", cache=tmp_path, batch_size=1, **sizes).prepare([IDS])
    assert settings[0] == settings[1] != settings[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "cramed"}, "there is no column 'cramed': did you mean 'crammed'"),
        ({"vectors": 0}, "^vectors must be at least 1, not 0"),
        ({"tokens": 0}, "^tokens must be at least 1, not 0"),
    ],
)
def test_a_column_with_wrong_arguments_is_refused(arguments, sentence):
    with pytest.raises(MemvecError, match=sentence):
        Column(tiny(), **arguments)


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("preset", ["usable", "usable-quick", "usable-long", "default", "paper"])
@pytest.mark.parametrize("changes", [{}, {"front": "none"}, {"lr": 0.5, "temperature": 1.0}])
def test_the_harness_gets_arguments_that_give_the_same_recipe(preset, changes):
    """The arguments change the preset `usable`, so fields at their defaults must be among them."""
    recipe = Recipe.of(preset, **changes)
    assert Recipe.of("usable", **_recipe_arguments(recipe)) == recipe


def test_answers_of_no_and_one_token_are_scored_in_any_order():
    lm = tiny()
    inputs = text_inputs(lm, [3, 4])
    asked = [EmbeddedRequest(inputs, (5,), answer) for answer in ((), (6,), (7,), (6, 7))]
    alone = {one.answer: likelihoods(lm, [one])[0] for one in asked}
    for order in permutations(asked):
        for one, found in zip(order, likelihoods(lm, order, batch_size=4), strict=True):
            assert found.greedy == alone[one.answer].greedy
            assert found.value == pytest.approx(alone[one.answer].value, abs=1e-4)


def test_likelihoods_are_those_of_the_model_s_own_forward():
    lm = tiny()
    contexts = {ids: Column(lm, "full").stand_in(ids).inputs for ids in (IDS, IDS[:2], ())}
    cases = [
        (IDS, (3, 4), (5, 6, 7)),
        (IDS, (3, 4), (5, 6, 9)),  # shares the forward pass of the first
        (IDS[:2], (3, 4), (5, 6, 7)),  # the same after another context
        (IDS[:2], (), (8,)),
        ((), (13,), (2, 2)),
        (IDS, (3, 4), ()),
    ]
    best = lm.own_logits(torch.tensor([[lm.bos_id, *IDS, 3]]))[0, -1].argmax()
    cases.append((IDS, (3,), (int(best),)))
    for batch_size in (1, 4):
        asked = [
            EmbeddedRequest(contexts[ids], question, answer) for ids, question, answer in cases
        ]
        for (ids, question, answer), found in zip(
            cases, likelihoods(lm, asked, batch_size), strict=True
        ):
            whole = torch.tensor([[lm.bos_id, *ids, *question, *answer]])
            log_p = lm.own_logits(whole)[0].log_softmax(-1)[-len(answer) - 1 : -1]
            right = [float(row[token]) for row, token in zip(log_p, answer, strict=True)]
            assert found.value == pytest.approx(math.fsum(right), abs=1e-4)
            assert found.greedy == (log_p.argmax(-1).tolist() == list(answer))
    assert likelihoods(lm, asked)[-1].greedy


def test_a_generated_text_ends_at_its_first_stop_string():
    lm = reader()
    inputs = Column(lm, "full").stand_in(tuple(lm.tokenize("the cat"))).inputs
    asked = EmbeddedRequest(inputs, tuple(lm.tokenize(" sat")), ())
    settings = {"max_new_tokens": 12, "do_sample": False}
    free = written(lm, asked, (), **settings)
    own = lm.model.generate(
        torch.tensor([[lm.bos_id, *lm.tokenize("the cat"), *lm.tokenize(" sat")]]), **settings
    )[0, -12:]
    assert free == lm.text([token for token in own.tolist() if token != 1])
    stop = free[2:4]
    assert written(lm, asked, ("never written", stop), **settings) == free[: free.index(stop)]
    # If one token completes two stop strings, the text ends before the one that begins first.
    i = next(i for i in range(len(free) - 1) if free.index(free[i + 1]) == i + 1)
    assert written(lm, asked, (free[i + 1], free[i : i + 2]), **settings) == free[:i]


def test_a_request_that_does_not_fit_the_model_is_refused():
    lm = tiny()
    long = EmbeddedRequest(Column(lm, "full").stand_in((5,) * 130).inputs, (3,), (4,))
    sentence = (
        r"^132 inputs and an answer of 1 tokens do not fit .*: use fewer examples, or another"
    )
    with pytest.raises(MemvecError, match=sentence):
        likelihoods(lm, [long])
    without = copy(lm)
    without.bos_id = None
    nothing = EmbeddedRequest(Column(without, "none").stand_in(()).inputs, (), (4,))
    with pytest.raises(MemvecError, match="has no start token, so an answer needs a question"):
        likelihoods(without, [nothing])


# ---------------------------------------------------------------------- receipts


def receipt(kind="choice", column="full", document=0, **changes):
    """A receipt with its scores."""
    values = {
        "task": "t",
        "document": document,
        "column": column,
        "kind": kind,
        "context_sha256": "0" * 64,
        "context_tokens": 7,
        "slots": 7,
        "exact": None,
        "question": "q",
        "answers": [
            Answer(text=" no", loglikelihood=-3.0, greedy=False),
            Answer(text=" perhaps", loglikelihood=-4.0, greedy=True),
        ],
        "choices": ["no", "perhaps"] if kind == "choice" else [],
        "gold": 0,
        "scores": {},
    }
    made = Receipt(**(values | changes))
    return made.model_copy(update={"scores": scores_of(made)})


def text(said):
    return {"kind": "text", "answers": [Answer(text=said)], "gold": ["The cat", "a big dog"]}


@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({}, {"acc": 1, "acc_norm": 0}),
        ({"gold": [1]}, {"acc": 0, "acc_norm": 1}),
        ({"gold": [0, 1]}, {"acc": 1, "acc_norm": 1}),
        ({"kind": "likelihood"}, {"acc": 0, "nll": 3}),
        (text(" Cat."), {"exact_match": 1, "f1": 1}),
        (text("dog"), {"exact_match": 0, "f1": 2 / 3}),
        (text(""), {"exact_match": 0, "f1": 0}),
    ],
)
def test_scores_are_computed_from_the_answers(changes, scores):
    assert receipt(**changes).scores == pytest.approx(scores)


def test_a_table_has_n_an_interval_and_the_share_kept():
    nll = {"full": (1.0, 3.0), "none": (2.0, 6.0), "crammed": (1.5, 4.0)}
    rows = [
        receipt("likelihood", column, i, answers=[Answer(text="a", loglikelihood=-v, greedy=True)])
        for column, values in nll.items()
        for i, v in enumerate(values)
    ]
    figures = {(f.score, f.column): f for f in score_figures(rows)}
    crammed = figures["nll", "crammed"]
    assert (crammed.value, crammed.documents) == (2.75, 2)
    assert crammed.kept == pytest.approx(2.5 / 4)
    assert crammed.low <= crammed.value <= crammed.high
    assert figures["nll", "full"].kept is None
    assert figures["acc", "crammed"].kept is None, "the context changes nothing"
    assert figures["acc", "full"].low == pytest.approx(0.342, abs=1e-3), "Wilson, 2 of 2"


def test_shares_have_wilson_intervals_and_other_means_those_of_a_bootstrap():
    """f1 may lie between 0 and 1, and nll may happen to be 0 or 1."""
    rows = [receipt(document=i).model_copy(update={"scores": {}}) for i in range(3)]
    for scores in ({"f1": [2 / 3, 1.0, 0.0]}, {"nll": [1.0, 1.0, 0.0]}, {"acc": [1.0, 1.0, 0.0]}):
        ((name, values),) = scores.items()
        of = [r.model_copy(update={"scores": {name: v}}) for r, v in zip(rows, values, strict=True)]
        (figure,) = score_figures(of)
        expected = share_interval(2, 3) if name == "acc" else bootstrap_mean(values)
        assert (figure.low, figure.high) == (expected.low, expected.high)


def test_a_table_has_the_mean_inputs_and_the_number_of_exact_contexts():
    rows = [
        receipt("choice", "crammed", i, context_tokens=tokens, slots=slots, exact=exact)
        for i, (tokens, slots, exact) in enumerate([(7, 4, True), (12, 8, False), (5, 3, True)])
    ]
    for figure in score_figures(rows):
        assert (figure.context_tokens, figure.slots, figure.exact) == (8, 5, 2)
        assert figure.documents == 3


@pytest.mark.parametrize("kind", ["choice", "likelihood"])
def test_only_tasks_of_one_kind_have_a_common_row(kind):
    """Documents of two tasks have the same numbers and are not confused."""
    nll = {("a", "full"): 1.0, ("a", "none"): 2.0, ("a", "crammed"): 1.5}
    nll |= {("b", "full"): 4.0, ("b", "none"): 9.0, ("b", "crammed"): 5.0}
    rows = [
        receipt(
            kind if task == "b" else "likelihood",
            column,
            task=task,
            answers=[Answer(text="x", loglikelihood=-value, greedy=True)],
            choices=["x"] if (task, kind) == ("b", "choice") else [],
        )
        for (task, column), value in nll.items()
    ]
    together = {(f.score, f.column): f for f in score_figures(rows) if f.task == "all tasks"}
    assert bool(together) == (kind == "likelihood")
    if together:
        crammed = together["nll", "crammed"]
        assert (crammed.value, crammed.documents) == (3.25, 2)
        assert crammed.kept == pytest.approx((0.5 + 4) / (1 + 5))


def test_receipts_are_scored_again_and_a_changed_one_is_refused(tmp_path, command):
    receipts.write(tmp_path, "full", [receipt(), receipt(document=1, gold=1)])
    assert receipts.read(tmp_path) == [receipt(), receipt(document=1, gold=1)]
    ran = command("eval", "--rescore", tmp_path, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)[0]["value"] == 0.5
    first = command("eval", "--rescore", tmp_path).out.decode().splitlines()[1]
    assert first.split()[:4] == ["t", "acc", "full", "0.500"]
    file = tmp_path / "full.jsonl"
    file.write_text(file.read_text("utf-8").replace("-4.0", "-2.0", 1), "utf-8")
    ran = command("eval", "--rescore", tmp_path)
    assert (ran.code, "line 1, claims acc 1.0 and its answers give 0.0" in ran.sentence) == (
        2,
        True,
    )
    file.write_text("{}\n", "utf-8")
    assert "line 1, is no receipt" in command("eval", "--rescore", tmp_path).sentence
    assert "there are no receipts in" in command("eval", "--rescore", tmp_path / "no").sentence


def test_receipts_of_two_runs_make_no_table(tmp_path):
    receipts.write(tmp_path, "full", [receipt().model_copy(update={"run": "a"})])
    receipts.refuse_another_run(tmp_path, "a")
    with pytest.raises(MemvecError, match=r"full.jsonl is of another run"):
        receipts.refuse_another_run(tmp_path, "b")
    receipts.write(tmp_path, "none", [receipt("choice", "none").model_copy(update={"run": "b"})])
    with pytest.raises(MemvecError, match="are of several runs"):
        receipts.read(tmp_path)


def test_a_folder_refuses_a_column_of_other_documents(tmp_path):
    receipts.write(tmp_path, "full", [receipt(question="q")])
    with pytest.raises(MemvecError, match="document 0 of t is another one in the column"):
        receipts.write(tmp_path, "none", [receipt("choice", "none", question="p")])
    with pytest.raises(MemvecError, match="document 0 of t is another one in the column"):
        receipts.write(tmp_path, "none", [receipt("choice", "none", context_sha256="1" * 64)])
    assert [path.name for path in tmp_path.iterdir()] == ["full.jsonl"]
    receipts.write(tmp_path, "full", [receipt(question="p")])  # its own column is replaced


@pytest.mark.parametrize("end", ["\u2028", "\u0085", "\x0b", "\r"])
def test_a_receipt_may_hold_any_character(tmp_path, end):
    row = receipt(question=f"one{end}two")
    receipts.write(tmp_path, "full", [row])
    assert receipts.read(tmp_path) == [row]
    (tmp_path / "full.jsonl").write_bytes(b"\xff")
    with pytest.raises(MemvecError, match="is damaged: it is not UTF-8"):
        receipts.read(tmp_path)


def test_one_document_has_no_interval_of_a_mean():
    asked = [Answer(text="a", loglikelihood=-2.0, greedy=True)]
    figures = {f.score: f for f in score_figures([receipt("likelihood", "full", answers=asked)])}
    assert math.isnan(figures["nll"].low)
    assert figures["acc"].low == pytest.approx(0.207, abs=1e-3), "Wilson, 1 of 1"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["t", "--columns", "ful"], "there is no column 'ful': did you mean 'full'?"),
        (["t", "--columns", ","], "there is no column to evaluate"),
        (["t", "--vectors", "0"], "--vectors must be at least 1, not 0."),
        (["t", "--tokens", "0"], "--tokens must be at least 1, not 0."),
        (["t", "--limit", "0"], "--limit must be at least 1, not 0."),
        (["t", "--batch-size", "0"], "--batch-size must be at least 1, not 0."),
        (["t", "--split", ""], "--split must be the text at which a question begins"),
        (["t", "--set", "stepps=3"], "a recipe has no 'stepps': did you mean 'steps'?"),
        (["t", "--include-path", "/none"], "there is no folder /none with task files."),
        ([], "there is no task to evaluate"),
        (["t", "--rescore", "x"], "--rescore reads receipts only: leave out the tasks."),
        (["--rescore", "x", "--limit", "3"], "--rescore reads receipts only: leave out --limit."),
        (["t", "--seed", "-1"], "--seed must be from 0 to 4294967295, not -1."),
        (["t", "--columns", "full,none,full"], "the column 'full' is named twice"),
        (["t"], "evaluation needs lm-evaluation-harness: pip install '.[eval]'"),
    ],
)
def test_bad_input_is_one_sentence(command, monkeypatch, words, sentence):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = command("eval", *words)
    assert (ran.code, ran.out) == (2, b"")
    assert sentence in ran.sentence


@pytest.mark.parametrize("exact", [(True, True), (True, False), (None, True), (None, None)])
def test_a_document_is_exact_if_all_its_contexts_are(exact):
    traces = [
        SimpleNamespace(task="t", document=0, context=(i,), slots=2, exact=e, question="q")
        for i, e in enumerate(exact)
    ]
    task = SimpleNamespace(
        OUTPUT_TYPE="loglikelihood",
        config=SimpleNamespace(task="t", doc_to_choice=None),
        multiple_input=0,
        doc_to_target=lambda doc: "x",
    )
    row = {"doc_id": 0, "doc": {}, "arguments": [("a", "x")], "resps": [[(-1.0, True)]]}
    model = SimpleNamespace(column=SimpleNamespace(name="crammed"), traces=traces)
    (receipt,) = evaluating._receipts({"t": [row]}, {"t": task}, model, "run")
    assert receipt.exact == {(None, None): None, (True, False): False}.get(exact, True)


# ---------------------------------------------------------------------- the harness


@pytest.fixture(scope="module")
def harness():
    """The plug-in, where lm-evaluation-harness is installed."""
    pytest.importorskip("lm_eval", reason="needs memvec[eval]: run `make test-eval`")
    from memvec.usable import harness

    return harness


def settings(**changes):
    """An evaluation of the tests' own tasks."""
    values = {"tasks": ("choose", "finish", "say"), "tasks_folder": TASKS, **SIZES}
    return Evaluation(**(values | changes))


@pytest.fixture(scope="module")
def evaluated(harness, tmp_path_factory):
    """All columns of all tasks: figures, and the folder with receipts and cache."""
    out = tmp_path_factory.mktemp("evaluated")
    what = settings(receipts=out / "receipts", cache=out / "cache")
    return evaluate(copy(reader()), what), out


def test_the_figures_are_those_of_the_harness(evaluated):
    figures, out = evaluated
    run = json.loads((out / "receipts" / "run.json").read_text())
    compared = 0
    for figure in figures:
        theirs = run["harness_results"][figure.column][figure.task]
        if f"{figure.score},none" in theirs and figure.task != "say":
            assert figure.value == pytest.approx(theirs[f"{figure.score},none"]), figure
            compared += 1
    assert compared == 3 * len(COLUMNS)
    assert {f.documents for f in figures} == {4}
    assert run["model"]["memvec"]["name"] == "tiny-bytes"
    assert run["model"]["recipe"]["settle"] == 3


def test_right_answers_are_those_of_the_harness(harness, tmp_path):
    """For choices scored also without a context, and right answers that are no choice or a text."""
    tasks = ("mutual", "outside", "pick")
    figures = evaluate(
        copy(reader()), settings(tasks=tasks, columns=("full",), receipts=tmp_path / "receipts")
    )
    theirs = json.loads((tmp_path / "receipts" / "run.json").read_text())["harness_results"]["full"]
    compared = [(f.task, f.score) for f in figures if f"{f.score},none" in theirs[f.task]]
    assert set(compared) >= {("mutual", "acc"), ("mutual", "acc_norm"), ("outside", "acc")}
    for f in figures:
        if f.task != "pick" and (f.task, f.score) in compared:
            assert f.value == pytest.approx(theirs[f.task][f"{f.score},none"]), f
    words = ["fox", "dog", "cat", "mat"]
    rows = {(r.task, r.document): r for r in receipts.read(tmp_path / "receipts")}
    for i, word in enumerate(words):
        assert [a.text.strip() for a in rows["mutual", i].answers] == words
        assert rows["pick", i].gold == word
        assert rows["outside", i].gold == (i if i < 2 else -1)


def test_columns_of_one_run_may_be_evaluated_one_after_the_other(harness, tmp_path):
    run, one = tmp_path / "run.json", {"tasks": ("finish",), "receipts": tmp_path}
    for some in (("full",), ("none", "truncated")):
        evaluate(copy(reader()), settings(columns=some, **one))
    assert list(json.loads(run.read_text())["harness_results"]) == ["full", "none", "truncated"]
    (tmp_path / "none.jsonl").unlink()
    evaluate(copy(reader()), settings(columns=("full",), **one))
    assert list(json.loads(run.read_text())["harness_results"]) == ["full", "truncated"]
    run.write_text("{")
    evaluate(copy(reader()), settings(columns=("full",), **one))
    assert list(json.loads(run.read_text())["harness_results"]) == ["full"]


def test_a_folder_refuses_another_run(evaluated):
    with pytest.raises(MemvecError, match="is of another run"):
        evaluate(copy(reader()), settings(receipts=evaluated[1] / "receipts", limit=1))


def test_the_receipts_give_the_same_table_and_name_every_context(evaluated, command):
    figures, out = evaluated
    rows = receipts.read(out / "receipts")
    assert score_figures(rows) == figures
    assert len(rows) == 4 * 3 * len(COLUMNS)
    contexts = {(r.task, r.document): set() for r in rows}
    for r in rows:
        contexts[r.task, r.document].add((r.context_sha256, r.context_tokens))
        assert r.question.startswith("the ")
        assert (r.exact is None) == (r.column != "crammed")
        passages = -(-r.context_tokens // SIZES["tokens"])
        vectors = passages * SIZES["vectors"]
        ends = min(vectors, r.context_tokens)
        slots = {"full": r.context_tokens, "none": 0, "truncated": ends, "crammed": vectors}
        assert r.slots == slots[r.column]
    assert all(len(same) == 1 for same in contexts.values())
    assert command("eval", "--rescore", out / "receipts").code == 0


def test_a_second_evaluation_crams_nothing(evaluated, monkeypatch):
    figures, out = evaluated

    def nothing(self, passages=()):
        assert list(passages) == []
        yield from ()

    monkeypatch.setattr(Engine, "run", nothing)
    what = settings(cache=out / "cache", columns=("crammed",))

    def drawn():
        """Two numbers; none is from `random`, because the type checks of the tests draw from it."""
        return float(np.random.rand()), float(torch.rand(()))

    for begin in (np.random.seed, torch.manual_seed):
        begin(5)
    expected = drawn()
    for begin in (np.random.seed, torch.manual_seed):
        begin(5)
    again = evaluate(copy(reader()), what)
    assert drawn() == expected, "the state of the caller's generators is unchanged"
    first = [f.model_copy(update={"kept": None, "kept_interval": None}) for f in figures]
    assert again == [f for f in first if f.column == "crammed"]


def test_everything_that_can_change_a_number_makes_another_run(harness, tmp_path, monkeypatch):
    runs, asked, questions = [], [], tmp_path / "questions.txt"

    def refused(**options):
        asked.append(options)
        raise ValueError("that is enough")

    monkeypatch.setattr("lm_eval.simple_evaluate", refused)
    monkeypatch.setattr(evaluating, "refuse_another_run", lambda _, run: runs.append(run))

    def run(**changes):
        with pytest.raises(MemvecError, match="that is enough"):
            evaluate(copy(reader()), settings(receipts=tmp_path / "out", **changes))
        return runs[-1]

    first = run()
    assert run(columns=("none",)) == first, "columns of one run are compared"
    changes = [{"tasks": ("choose",)}, {"vectors": 3}, {"tokens": 4}, {"batch_size": 2}]
    changes += [{"split": "\n"}, {"limit": 3}, {"examples": 2}, {"seed": 7}]
    changes += [{"recipe": replace(QUICK, settle=4)}]
    changed = [run(**change) for change in changes]
    for text in ("a", "b"):
        questions.write_text(text, "utf-8")
        changed.append(run(recipe=replace(QUICK, queries=str(questions))))
    edited = shutil.copytree(TASKS, tmp_path / "edited")
    assert run(tasks_folder=edited) == first, "the same tasks, in another place"
    for file, old, new in [
        ("say.yaml", "max_gen_toks: 5", "max_gen_toks: 6"),
        ("local.py", "fox", "ox"),
    ]:
        (edited / file).write_text((TASKS / file).read_text().replace(old, new))
        changed.append(run(tasks_folder=edited))
    assert len({first, *changed}) == 1 + len(changed)
    assert {(o["limit"], o["num_fewshot"]) for o in asked} == {(None, None), (3, None), (None, 2)}
    assert [o["fewshot_random_seed"] for o in asked].count(7) == 1
    for options in asked:
        assert len({value for name, value in options.items() if name.endswith("seed")}) == 1


@pytest.mark.parametrize(
    ("task_settings", "until", "options"),
    [
        ({}, [], {"max_new_tokens": 256, "do_sample": False}),
        ({"until": "x", "max_gen_toks": 5}, ["x"], {"max_new_tokens": 5, "do_sample": False}),
        ({"until": ["x", "y"], "max_new_tokens": 7, "temperature": 0.0}, ["x", "y"], {}),
        ({"do_sample": True, "max_new_tokens": 7}, [], {"do_sample": True, "max_new_tokens": 7}),
        ({"do_sample": True, "temperature": 0.5}, [], {"do_sample": True, "temperature": 0.5}),
    ],
)
def test_a_task_s_own_settings_of_generation_are_kept(harness, task_settings, until, options):
    given = dict(task_settings)
    options = options or {"max_new_tokens": 7, "do_sample": False}
    options = {"max_new_tokens": 256, **options}
    assert harness._generation(task_settings) == (until, options)
    assert task_settings == given


def test_the_full_column_has_the_log_likelihoods_of_the_harness_s_own_model(
    harness, folder, evaluated
):
    """Here the harness's model adds the start token, which this tokenizer does not add."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = copy(reader())
    own = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal")
    encode = own.tok_encode
    own.tok_encode = lambda text, *a, **k: [lm.bos_id, *encode(text, *a, **k)]
    raw = lm_eval.simple_evaluate(
        own,
        tasks=["choose", "finish"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        fewshot_random_seed=0,
    )
    ours = {
        (r.task, r.document): r
        for r in receipts.read(evaluated[1] / "receipts")
        if r.column == "full"
    }
    for task in ("choose", "finish"):
        for row in raw["samples"][task]:
            receipt = ours[task, row["doc_id"]]
            theirs = [float(answers[0][0]) for answers in row["resps"]]
            assert [a.loglikelihood for a in receipt.answers] == pytest.approx(theirs, abs=1e-4)


def test_the_harness_makes_the_model_from_arguments(harness, folder):
    from lm_eval.api.registry import get_model

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    where = project["project"]["entry-points"]["lm_eval.models"]["memvec"]
    assert where == f"{harness.MemvecLM.__module__}:{harness.MemvecLM.__name__}"
    assert get_model("memvec") is harness.MemvecLM
    given = f"pretrained={folder},context=crammed,vectors=2,tokens=3,settle=7,split=\\n\\nQ:"
    model = get_model("memvec").create_from_arg_string(given, {"device": "cpu", "batch_size": None})
    assert (model.column.name, model.column.vectors, model.column.tokens) == ("crammed", 2, 3)
    assert (model.column.recipe.settle, model.split) == (7, "\n\nQ:")
    at_once = {"pretrained": str(folder), "context": "crammed", "crammed_at_once": "5"}
    model = get_model("memvec").create_from_arg_obj(at_once)
    assert model.column.batch_size == model.get_model_info()["crammed_at_once"] == 5
    for name in ("vectors", "tokens", "crammed_at_once"):
        with pytest.raises(MemvecError, match=f"{name} must be a whole number, not 'eight'"):
            get_model("memvec").create_from_arg_obj({"pretrained": str(folder), name: "eight"})
    with pytest.raises(MemvecError, match="there is no column 'crammd'"):
        get_model("memvec").create_from_arg_obj({"pretrained": str(folder), "context": "crammd"})


def test_the_harness_s_own_command_runs_the_model(harness, folder, tmp_path, monkeypatch, capsys):
    words = ["lm_eval", "--model", "memvec", "--model_args", f"pretrained={folder},context=none"]
    words += ["--tasks", "finish", "--include_path", str(TASKS), "--limit", "1"]
    monkeypatch.setattr("sys.argv", list(words))  # a copy, because the harness changes the list
    harness.main()
    assert "finish" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words[:4], f"pretrained={folder},context=nine", *words[5:]])
    with pytest.raises(SystemExit, match="2"):
        harness.main()
    assert "memvec: there is no column 'nine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": ("chose",)}, "the harness has no task 'chose': did you mean 'choose'"),
        ({"tasks": ("whole",)}, "whole scores whole texts, which have no context to replace"),
        ({"split": "\n\n\n"}, "no request of choose has a context in front of"),
        ({"tasks": ("choose", "bare")}, "no request of bare has a context in front of"),
    ],
)
def test_a_task_that_cannot_be_evaluated_is_refused(harness, changes, sentence):
    with pytest.raises(MemvecError, match=sentence):
        evaluate(copy(reader()), settings(columns=("none",), **changes))


def test_cramming_shows_its_progress_and_an_error_of_the_harness_is_one_sentence(harness):
    seen = []
    evaluate(reader("words"), settings(columns=("crammed",), limit=1), on_status=seen.append)
    assert {status.stage for status in seen} >= {"measuring", "cramming"}
    assert seen[-1].done
    with pytest.raises(MemvecError, match="the harness cannot run choose, finish, say: "):
        evaluate(reader("words"), settings(columns=("full",), examples=50))


def test_the_cloze_task_asks_for_words_of_its_passages(harness):
    lines = (ROOT / "examples" / "cloze" / "cloze.jsonl").read_text("utf-8").splitlines()
    assert len(lines) >= 32
    for row in map(json.loads, lines):
        assert row["word"] in row["passage"]
        assert row["word"] not in row["question"]
    figures = evaluate(
        copy(reader()),
        Evaluation(
            tasks=("cloze", "cloze_choice"),
            tasks_folder=ROOT / "examples" / "cloze",
            columns=("none",),
            limit=4,
            split="\n\n",
        ),
    )
    assert {(f.task, f.score) for f in figures} >= {("cloze", "nll"), ("cloze_choice", "acc")}
