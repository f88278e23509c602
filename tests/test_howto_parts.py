"""Every example of docs/howto/add-part.md runs, and its part does what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import memvec
from conftest import reader, tiny
from memvec import registry
from memvec.cramming.optimizers import NAdam
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.export import export, target
from memvec.export.target import Target, prompt
from memvec.model.reading import in_space
from memvec.usable.queries import queries_of

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "add-part.md"
TEXTS = ["the cat sat on the mat", "a dog ran"]


@pytest.fixture
def part(monkeypatch):
    """Runs the example below a heading of the page and returns the names that it defines."""
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})

    def run(heading: str) -> dict[str, object]:
        section = PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
        code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
        defined: dict[str, object] = {"__name__": "of_the_page"}
        exec(compile(code, f"{PAGE.name}: {heading}", "exec", dont_inherit=True), defined)
        return defined

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "changes"),
    [
        ("Start", {"start": "mean-state"}),
        ("Optimizer", {"optimizer": "momentum", "lr": 0.3, "lr_large": 0.0}),
        ("Coordinates", {"coordinates": "rotated"}),
        ("Space", {"space": "twice"}),
    ],
)
def test_vectors_crammed_with_an_example_decode(part, tmp_path, heading, changes):
    part(heading)
    lm = reader()
    recipe = Recipe.of(steps=600, patience=600, **changes)
    mem = memvec.cram(lm, TEXTS, recipe=recipe, vectors=2)
    mem.save(tmp_path / "a.mem")
    mem = memvec.MemVectors.load(tmp_path / "a.mem")
    assert memvec.decode(lm, mem) == TEXTS
    assert memvec.verify(lm, mem)[1] == [True] * len(mem.documents(lm))
    assert mem.vectors.shape[2] == (lm.width // 2 if heading == "Space" else lm.width)


def test_the_queries_of_the_page_are_endings_of_several_lengths(part):
    part("Queries")
    recipe = Recipe.of(queries="endings", query_count=5, query_tokens=3)
    queries = queries_of(tiny(), (5, 6, 7, 8), recipe)
    assert queries.ids.tolist() == [[8, 0, 0], [7, 8, 0], [6, 7, 8], [8, 0, 0], [7, 8, 0]]
    assert queries.length.tolist() == [1, 2, 3, 1, 2]


@pytest.fixture
def independence(monkeypatch):
    """Runs the check of docs/howto/add-objective.md for a recipe with the given fields."""
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})
    page = PAGE.with_name("add-objective.md").read_text("utf-8")
    section = page.split("\n## Check that passages stay independent\n")[1]
    hinge, check = (re.search(r"```python\n(.*?)```", t, re.DOTALL)[1] for t in (page, section))

    def run(fields: str) -> None:
        code = check.replace('objective="hinge"', fields)
        assert fields in code
        exec(
            compile(hinge + code, "add-objective.md", "exec", dont_inherit=True),
            {"__name__": "of_the_page"},
        )

    return run


@pytest.mark.slow
def test_the_check_of_independence_accepts_the_objective_of_the_page(independence):
    independence('objective="hinge"')


@pytest.mark.slow
def test_the_check_of_independence_fails_for_an_optimizer_that_mixes_passages(independence):
    @memvec.register("optimizer", "mixed")
    class Mixed(NAdam):
        def step(self, parameters, gradient, state, moving, lr_scale=None):
            super().step(parameters, gradient - gradient.mean(0), state, moving, lr_scale)

    with pytest.raises(AssertionError):
        independence('optimizer="mixed"')


ROW, TWO = torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 3])


@pytest.mark.parametrize(
    "given",
    [
        None,
        ROW,
        [[1, 2, 3], [1, 2, 3]],
        (ROW.float(), TWO),
        (ROW, TWO.float()),
        (ROW, [3, 3]),
        (ROW, TWO + 1),
        (ROW, TWO - 3),
        (ROW[:1], TWO[:1]),
        (ROW - 1, TWO),
        (ROW + 9999, TWO),
        (torch.zeros(2, 5, dtype=torch.long), TWO),
    ],
)
def test_queries_of_a_wrong_form_are_refused_with_their_name(part, given):
    memvec.register("queries", "mine")(lambda lm, ids, recipe: given)
    recipe = Recipe.of(queries="mine", query_count=2, query_tokens=4)
    with pytest.raises(MemvecError, match=r"^the queries 'mine' have to be query_count \(2\) rows"):
        queries_of(tiny(), (5, 6, 7), recipe)


def test_a_query_of_the_given_token_alone_is_refused(part):
    """After keys and values the first token is given, so such a query would predict nothing."""
    memvec.register("queries", "mine")(lambda lm, ids, recipe: (ROW, TWO - 2))
    recipe = Recipe.of(queries="mine", query_count=2, query_tokens=4)
    assert queries_of(tiny(), (5, 6, 7), recipe).length.tolist() == [1, 1]
    with pytest.raises(MemvecError, match="rows of 2 to 4 token ids"):
        queries_of(in_space(tiny(), "prefix", {}), (5, 6, 7), recipe)


def test_short_queries_are_padded_to_the_length_of_the_recipe(part):
    memvec.register("queries", "mine")(lambda lm, ids, recipe: (ROW, TWO))
    recipe = Recipe.of(queries="mine", query_count=2, query_tokens=4)
    queries = queries_of(tiny(), (5, 6, 7), recipe)
    assert queries.ids.shape == (2, 4)
    assert queries.length.tolist() == [3, 3]


def test_the_source_of_the_page_gives_passages_of_the_requested_length(part):
    source = part("Source")["Counting"](first=7)
    lm = memvec.load_lm("pocket")
    (first, second) = source.passages(lm, 2, 6)
    assert [first.number, second.number] == [0, 1]
    assert lm.text(first.passage.ids).startswith("7 8 ")
    assert len(second.passage.ids) == 6
    assert next(source.passages(lm, 1, 6)) == first
    assert source.settings()["first"] == 7


def test_the_export_of_the_page_is_certified_from_its_files(part, tmp_path):
    part("Export")
    lm = reader()
    mem = memvec.cram(lm, TEXTS[1:], recipe=Recipe.of(steps=600, patience=600), vectors=2)
    manifest = export(lm, mem, target("json"), tmp_path / "out")
    assert manifest["certificate"]["exact"]
    written = json.loads((tmp_path / "out" / "passage-0000.json").read_text())
    assert torch.equal(torch.tensor(written["inputs"]), mem.vectors[0])


class Wrong(Target):
    description, suffix = "a target with a fault", ".bin"

    def write(self, path, item, lm):
        path.write_bytes(b"")

    def read(self, path, item, lm):
        return prompt(item, lm)


WRONG = {
    "writes no passage-0000.bin: its method write gets the whole path, with its suffix.": (
        "write",
        lambda self, path, item, lm: path.with_suffix(".npz").write_bytes(b""),
    ),
    "has to return a list of token ids from decode.": ("decode", lambda *_: None),
    "gives NoneType, not a tensor of shape (2, 64).": ("read", lambda *_: None),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_an_export_with_an_error_is_refused_with_its_name(part, tmp_path, sentence):
    faulty = type("Faulty", (Wrong,), dict([WRONG[sentence]]))
    memvec.register("export", "faulty")(faulty)
    lm = reader()
    mem = memvec.cram(lm, TEXTS[1:], recipe=Recipe.of(steps=600, patience=600), vectors=2)
    with pytest.raises(MemvecError, match=re.escape(f"the export 'faulty' {sentence}")):
        export(lm, mem, "faulty", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_encoder_of_the_page_is_read_from_its_file(part, tmp_path):
    from memvec.companions.encoder_files import load_encoder, save_encoder

    lm = reader()
    encoder = part("Encoder")["Average"](lm.width)
    save_encoder(tmp_path / "average.safetensors", encoder, lm)
    again = load_encoder(tmp_path / "average.safetensors", lm)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again.encode(lm, ids, 2), encoder.encode(lm, ids, 2))


def test_the_page_has_every_kind_without_a_page_of_its_own():
    own = {"objective", "term", "schedule", "protocol", "preset"}
    headings = {name.lower() for name in re.findall(r"^## (.*)$", PAGE.read_text("utf-8"), re.M)}
    assert headings == set(registry.KINDS) - own


@pytest.mark.slow
def test_the_example_records_every_step_of_a_passage_up_to_its_outcome():
    page = PAGE.with_name("record-steps.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    defined: dict[str, Any] = {"__name__": "of_the_page"}
    exec(compile(code, "record-steps.md", "exec", dont_inherit=True), defined)
    assert len(defined["outcomes"]) == 2
    for outcome in defined["outcomes"]:
        number = outcome.passage.document
        rows = [row for row in defined["engine"].rows if row["passage"] == number]
        # The pass in which vectors meet their margin moves nothing, and does not count as a step.
        steps = [row["step"] for row in rows]
        assert steps == sorted(steps)
        assert set(steps) == set(range(1, outcome.steps + 1))
        assert rows[-1]["spent"] == outcome.spent
        assert rows[-1]["right"] == outcome.metrics.horizon == len(outcome.passage)
        assert torch.equal(rows[-1]["vectors"], outcome.vectors)
        assert [row["right"] for row in rows] == sorted(row["right"] for row in rows)
