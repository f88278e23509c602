"""The benchmarks: their options, errors, formulas, fairness and measures, at small sizes."""

import itertools
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import FrozenLM, build, passages, refusal, tiny
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import view_for

FOLDER = Path(__file__).parent.parent / "benchmarks"
PROGRAMS = [
    "batch",
    "bits",
    "book",
    "exact",
    "gpu",
    "horizon",
    "margins",
    "peak",
    "peers",
    "recipes",
    "step",
    "studies",
    "usable",
    "vectors",
]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_of_each_benchmark_has_the_common_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in ("--quick", "--json", "--out", "RESULT"):
        assert word in said


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        *((name, ["--set", "stepz=1"], "did you mean 'steps'") for name in ("recipes", "usable")),
        ("horizon", ["--set", "lr=fast"], "lr"),
        ("vectors", ["--quick", "--set", "margin=-1"], "margin must be at least"),
        ("usable", ["--quick", "--in-a-row", "0"], "at least 1"),
        ("step", ["--model", "nowhere/at-all"], "nowhere/at-all"),
        ("studies", ["3"], "at least 4"),
        ("book", ["--text", "nowhere.txt"], "name a file of UTF-8 text"),
        ("book", ["--bytes", "10", "1000000"], "name a longer text"),
        ("usable", ["--corpus", "nowhere.parquet"], "is not a parquet file of texts"),
    ],
)
def test_errors_of_benchmarks_are_one_sentence(
    name, words, sentence, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--out", str(tmp_path)])
    assert sentence in refusal(FOLDER / f"{name}.py", capsys)


def test_a_figure_that_is_not_a_number_is_valid_json_and_not_in_result(capsys, tmp_path):
    import argparse
    import json

    from common import report

    rows = [{"ratio": 2.0, "low": float("nan"), "high": float("inf")}]
    for as_json in (False, True):
        options = argparse.Namespace(out=tmp_path, json=as_json)
        report("some", rows, options, ratio=2.0, low=float("nan"))
        printed = capsys.readouterr().out
        assert printed.splitlines()[-1] == "RESULT ratio=2"
        assert "nan" not in printed.lower()
    (row,) = json.loads(printed.rpartition("RESULT")[0])
    assert (row["ratio"], row["low"], row["high"]) == (2, None, None)
    assert ",2.0,,inf," in (tmp_path / "some.csv").read_text()


@pytest.mark.slow
def test_synthetic_rows_are_stored_and_reported():
    program = runpy.run_path(str(FOLDER / "studies.py"))  # `import studies` gives tests/studies.py
    row = program["measure"](8)
    assert (row["rows"], row["cells"]) == (8, 4)
    assert row["page_kB"] > 0


def test_without_matplotlib_a_line_says_that_there_is_no_figure(monkeypatch, capsys, tmp_path):
    from common import save_figure

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save_figure(tmp_path / "some", lambda axes: None, 1)
    assert "needs matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_name_or_figure_of_a_table_is_cut_off(capsys, tmp_path):
    import argparse

    from common import report

    row = {f"a_column_with_a_long_name_{i}": 123.4 for i in range(20)}
    report("some", [row], argparse.Namespace(out=tmp_path, json=False), ratio=1.0)
    printed = capsys.readouterr().out
    assert all(name in printed for name in row)
    assert printed.count("123.4") == len(row)


def test_same_vectors_without_a_file_names_write(monkeypatch, capsys):
    import same_vectors

    for words in ([], ["--against", "nowhere.json"]):
        monkeypatch.setattr(sys, "argv", ["same_vectors.py", *words])
        with pytest.raises(SystemExit) as end:
            same_vectors.main()
        assert end.value.code == 2
        assert "--write" in capsys.readouterr().err


def test_operations_of_a_step_are_those_that_torch_counts(monkeypatch):
    """torch counts the forward pass; the backward pass to the inputs has as many products."""
    from torch.utils.flop_counter import FlopCounterMode

    from gpu import left_out, shares, step_operations

    lm = FrozenLM(build("llama"), name="tiny")
    lm.model.set_attn_implementation("eager")  # products that torch counts
    slots, T = 3, 16
    inputs = torch.randn(slots, T, lm.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.model(inputs_embeds=inputs, use_cache=False)
    counted = counter.get_total_flops()
    # torch counts attention as not causal, memvec as causal with twice as many products backward.
    whole = 4 * T * T * slots * lm.width * lm.config.num_hidden_layers
    ours = step_operations(lm, slots, T) - 3 * whole / 2
    assert ours / 2 == pytest.approx(counted - whole, rel=0.02)
    a = torch.randn(256, 256)
    outside, launch = shares(lambda: a @ a, a.device)
    assert launch is None
    assert outside < 1  # the product counts as one
    assert shares(lambda: (a + 1).exp(), a.device)[0] == 1
    assert left_out(lm, 1, 10_000, 1e30) == f"its context is {lm.context}"
    assert left_out(lm, 1, 4, 1.0) == "a step takes too long"
    assert left_out(lm, 1, 4, 1e30) is None


@pytest.mark.slow
def test_a_row_of_the_gpu_benchmark_has_steps_with_and_without_graphs(monkeypatch):
    """The recorder replaces CUDA graphs on a CPU, so both times are measured and mean nothing."""
    from gpu import captured, cell
    from memvec import graphs
    from recorder import Recorder

    monkeypatch.setitem(graphs.BACKENDS, "cpu", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    lm = FrozenLM(build("llama"), name="tiny")
    engine, seconds = captured(lm, 2, 8)
    assert list(engine.stepper.run_pass.captured) == [((2, 1, lm.width), (2, 8))]
    assert seconds > 0
    plain, both = cell(lm, 2, 8, 1, 1e9), cell(lm, 2, 8, 1, 1e9, graphs=True)
    assert both.keys() - plain.keys() == {"graphs ms", "graphs mfu", "times", "capture s"}
    assert both["times"] == pytest.approx(both["ms"] / both["graphs ms"])
    assert both["graphs mfu"] == pytest.approx(both["mfu"] * both["times"])


@pytest.mark.parametrize("longest", range(12))
def test_the_search_finds_the_longest_length_and_ends(longest):
    from at_costs import Search

    search, tried = Search(), []
    while (length := search.next_length(11)) is not None:
        assert length not in tried
        tried.append(length)
        if length <= longest:
            search.completed = length
        else:
            search.failed = length
    assert search.completed == longest
    assert len(tried) <= 7


@pytest.mark.slow
def test_horizons_at_a_cost_are_those_of_a_run_with_that_budget():
    """For a growing recipe and one passage, because a batch of another shape rounds differently."""
    from at_costs import growing

    lm, recipe, costs = tiny(), Recipe(steps=10**6, patience=10**6), [60, 240]
    recipe = recipe.in_logits(lm.logit_spread)
    (passage,) = passages(24, seed=33)
    found = growing(lm, recipe, [passage], costs, staged=False)[0]
    dearer = growing(lm, recipe, [passage], costs, staged=True)[0]
    assert found == sorted(found)
    assert all(a <= b for a, b in zip(dearer, found, strict=True))
    assert 0 < found[-1] < 24
    for cost, horizon in zip(costs, found, strict=True):
        engine = Engine(lm, Recipe(steps=10**6, patience=10**6, budget=cost), batch_size=1)
        (outcome,) = engine.run([passage])
        # A run may make the step that exceeds its budget; the benchmark does not count that step.
        assert horizon <= outcome.metrics.horizon


def test_a_stage_ends_at_each_token_or_at_each_target():
    from at_costs import _stages_done

    assert _stages_done(3, 6, None) == [4, 5, 6]
    assert _stages_done(6, 6, None) == []
    assert _stages_done(3, 6, 8) == []
    assert _stages_done(3, 9, 8) == [8]
    assert _stages_done(8, 9, 8) == []


@pytest.mark.slow
def test_every_published_arm_runs_at_each_cost():
    """Every arm has horizons of at most 8 tokens that grow with the cost. Those of `geometric` are
    shorter if the ends of stages are paid for."""
    from at_costs import growing
    from horizon import published

    arms = ("progressive", "geometric", "alignment", "alignment low-dim 32")
    recipes = published(dict.fromkeys(arms, (0.5,)), 0.0, layers=2)
    assert list(recipes) == [f"{name}, lr 0.5" for name in arms]
    both = recipes["alignment low-dim 32, lr 0.5"]
    assert (both.term, both.coordinates, both.start) == ("alignment", "low-dim", "linear")
    assert (both.dimensions, both.align_layers, both.term_weight) == (32, 2, 1.0)
    lm = tiny()
    asked = [type(p)(p.ids, i) for i, p in enumerate(passages(4, 8, seed=35))]
    for name, recipe in recipes.items():
        paid = growing(lm, recipe, asked, [20, 60], staged=True)
        assert all(0 <= row[0] <= row[1] <= 8 for row in paid)
        assert any(row[1] > 0 for row in paid)
        if name.startswith("geometric"):
            free = growing(lm, recipe, asked, [20, 60], staged=False)
            pairs = [
                pair for rows in zip(paid, free, strict=True) for pair in zip(*rows, strict=True)
            ]
            assert all(a <= b for a, b in pairs)
            assert any(a < b for a, b in pairs)


@pytest.mark.slow
def test_the_same_words_from_a_file_are_the_same_passages(tmp_path):
    from memvec.lab.sources.random_words import frequent_words
    from memvec.loading import load_lm
    from texts import random_words

    file = tmp_path / "words.txt"
    file.write_text("\n".join(frequent_words()), "utf-8")
    lm = load_lm()
    listed = random_words(lm, 2, 12, words=file)
    assert [p.ids for p in listed] == [p.ids for p in random_words(lm, 2, 12)]


@pytest.mark.slow
def test_horizons_of_the_paper_recipe_grow_with_the_cost():
    from at_costs import fixed

    lm, recipe = tiny(), Recipe.of("paper", lr=0.1)
    asked = passages(9, 9, seed=34)
    asked = [type(p)(p.ids, i) for i, p in enumerate(asked)]
    early, late = 30, 1500
    found = fixed(lm, recipe, asked, [early, late])
    for row in found:
        assert 0 <= row[0] <= row[1] <= 8
    assert any(row[1] > 0 for row in found)
    assert any(row[1] > row[0] for row in found)


def test_ratios_and_intervals():
    from common import summary
    from memvec.statistics import ratio_of_means, ratio_of_separate_means

    ours, theirs = [4.0, 6.0, 5.0, 5.0], [2.0, 3.0, 2.5, 2.5]
    assert ratio_of_means(ours, theirs) == pytest.approx((2, 2, 2))  # passage by passage
    ratio, low, high = ratio_of_separate_means(ours, theirs)
    assert ratio == pytest.approx(2)
    assert 1.6 < low < 2 < high < 2.5
    assert ratio_of_means(ours, [0.0] * 4)[0] == np.inf
    found = summary(ours)
    assert (found["n"], found["mean"], found["median"]) == (4, 5.0, 5.0)
    assert 4 <= found["low"] < 5 < found["high"] <= 6


def test_peak_memory_is_that_of_tensors_held_at_once():
    from memory import peak_memory

    def hold():
        return torch.ones(32, 2**20).sum()  # 128 MiB

    found = [peak_memory(hold), peak_memory(hold)]  # twice, as the allocator keeps freed memory
    for peak in found:
        assert 120 * 2**20 < peak < 170 * 2**20


def test_the_smallest_ratio_over_the_budgets_is_reported_with_its_budget():
    """A ratio is the smallest over the budgets, each with the best rate of the published recipe."""
    from horizon import budget_rows, compare, long_rows

    found = {
        "default, noise": [[4, 6, 9], [4, 6, 9]],
        "default, encoder": [[8, 8, 9], [8, 8, 9]],
        "low-dim 256, lr 0.1": [[3, 3, 3], [3, 3, 3]],
        "low-dim 256, lr 0.5": [[2, 5, 4], [2, 5, 4]],
        "paper, lr 0.1": [[0, 2, 3], [0, 2, 3]],
    }
    rows = budget_rows("pocket-natural", found, [10, 20, 30], T=64)
    assert [row["recipe"] for row in rows] == [
        "low-dim 256, lr 0.1",
        "low-dim 256, lr 0.5",
        "low-dim 256, lr 0.5",
    ]
    result = compare(rows)
    assert result["ratio_published"] == pytest.approx(6 / 5)
    assert result["ratio_published_low"] == result["ratio_published_high"] == pytest.approx(6 / 5)
    assert result["ratio_published_budget"] == 20
    assert (result["ratio"], result["ratio_budget"]) == (3, 20)
    assert result["ratio_published_encoder"] == pytest.approx(8 / 5)
    assert result["apart"] == 1
    starts = {row["recipe"]: row["start"] for row in long_rows("x", found, [10, 20, 30], 64)}
    assert [label for label, start in starts.items() if start == "encoder"] == ["default, encoder"]


def test_there_is_a_published_recipe_for_each_rate_of_the_sweep():
    from horizon import SWEEP, published

    recipes = published(SWEEP, margin=0.0, layers=12)
    assert len(recipes) == sum(len(rates) for rates in SWEEP.values())
    assert recipes["low-dim 32, lr 0.5"].dimensions == 32
    assert {recipe.lr for recipe in recipes.values()} >= {0.01, 0.1, 0.5, 1.0}
    assert (
        published({"progressive": (0.1,)}, margin=0.7, layers=12)["progressive, lr 0.1"].margin
        == 0.7
    )


def test_a_published_run_is_read_at_smaller_step_limits():
    from exact import Trial, per_minute, ratio_of_rates, result_of

    done, lost = Trial(True, 50, 5.0, {40: 4.0}), Trial(False, 160, 16.0, {40: 4.0, 160: 15.9})
    assert done.given_up_after(160) is done
    assert done.given_up_after(40) == Trial(False, 40, 4.0, {})
    assert per_minute([done, lost.given_up_after(40)]) == pytest.approx(60 / 9)
    ratio, low, high = ratio_of_rates([Trial(True, 1, 0.5, {})] * 8, [done, done, done, lost])
    assert ratio == pytest.approx(120 / (60 * 3 / 31))
    assert low <= ratio <= high

    def at(ratio, finished):
        return {"finished": finished, "n": 16, "noise": (ratio, ratio, ratio)}

    # For ratio_hard, a length with one finished passage of sixteen does not count. The smallest
    # ratio of the models counts.
    result = result_of({"a": [at(5.0, 16), at(30.0, 4), at(900.0, 1)], "b": [at(12.0, 2)]})
    assert (result["ratio"], result["ratio_hard"], result["ratio_hard_finished"]) == (5, 12, 2)


SEED_PROGRAM = """
import torch
from nltk import sent_tokenize
from transformers import AutoModelForCausalLM

def run_single_experiment(N, text, max_length, steps, sample, run, name, dtype, flash, device,
                          tokenizer, lr, beta_1, beta_2, decay, early_stopping_patience=2000,
                          shuffled=False):
    print("a line that nobody wants")
    ids = tokenizer(text, max_length=max_length, truncation=True, return_tensors="pt").to(device)
    model = AutoModelForCausalLM.from_pretrained(name, use_flash_attention_2=flash)
    rows = model.get_input_embeddings()(ids["input_ids"])[0]
    return {"best_accuracy": 0.5, "best_memory_params": rows[:1].detach().numpy(),
            "losses": [1.0] * steps}
"""
TRAINERS = """
from sklearn.decomposition import PCA
from torch.utils.tensorboard import SummaryWriter

class FullCrammingTrainer:
    def __init__(self, model, args, train_dataset, data_collator, **others):
        self.model, self.batch = model, data_collator(train_dataset)

    def train(self):
        rows = self.model.get_input_embeddings()(self.batch.input_ids)[:, :1]
        self._save_artifacts([
            {"sample_id": i, "embedding": row.tolist(), "final_convergence": 1.0 - i / 8,
             "num_input_tokens": 8, "convergence_after_steps": 3}
            for i, row in enumerate(rows)
        ], tensor=None)
"""
ARGUMENTS = """
class MyTrainingArguments:
    def __init__(self, **given):
        self.__dict__.update(given)
"""


def test_the_published_programs_get_the_ids_and_model_and_leave_nothing_behind(tmp_path, capsys):
    from peers_programs import by_progressive, by_seed

    (tmp_path / "train.py").write_text(SEED_PROGRAM)
    package = tmp_path / "src/progressive_cramming/train"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(TRAINERS)
    (package / "arguments.py").write_text(ARGUMENTS)
    lm, asked = tiny(), passages(8, 8, seed=35)
    asked = [type(p)(p.ids, i) for i, p in enumerate(asked)]
    before, path = set(sys.modules), list(sys.path)
    seed = by_seed(lm, asked, tmp_path, lr=0.01, steps=7)
    full = by_progressive(lm, asked, tmp_path, "FullCrammingTrainer", 1, learning_rate=0.1)
    assert sys.path == path
    assert not {"train", "nltk", "progressive_cramming"} & (set(sys.modules) - before)
    assert capsys.readouterr().out == ""
    for found in (seed, full):
        for passage, answer in zip(asked, found, strict=True):
            expected = lm.embed(torch.tensor([passage.ids[:1]]))[0]
            torch.testing.assert_close(answer.vectors, expected)
    assert [(answer.reached, answer.steps) for answer in seed] == [(5, 7), (5, 7)]
    assert [(answer.reached, answer.steps) for answer in full] == [(8, 3), (7, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_usable_vectors_are_measured_as_they_were_crammed(monkeypatch, parts):
    """The benchmark's KL is that of a slow computation with the recipe's front, for one passage and
    for the vectors of two passages in a row."""
    from types import SimpleNamespace

    import usable
    from memvec.lab import slow_use
    from memvec.passages.passage import Passage
    from usable import CONTINUATION, crammed, setting

    lm, T = tiny(), 4
    whole = T * parts
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, lm.vocab_size, (2, whole + CONTINUATION), generator=generator).tolist()
    texts = [Passage(tuple(row), i) for i, row in enumerate(ids)]
    recipe = Recipe.of("usable", settle=10, decay=10, query_tokens=4, query_count=2)
    options = SimpleNamespace(recipe=recipe, batch_size=2, in_a_row=parts, keep=None, encoder=None)
    by_recipe = {}

    def watched(lm, passages, recipe, *sizes):
        by_recipe[recipe] = crammed(lm, passages, recipe, *sizes)
        return by_recipe[recipe]

    monkeypatch.setattr(usable, "crammed", watched)
    rows, result = setting(lm, texts, T, 2, options)
    cut = [text.ids[at : at + T] for text in texts for at in range(0, whole, T)]
    outcomes = by_recipe[recipe]
    assert [outcomes[i].passage.ids for i in range(len(outcomes))] == cut
    view, found, last = view_for(lm, recipe), [], []
    for i, text in enumerate(texts):
        before = slow_use.context_ids(lm, text.ids[:whole], 2)["text"]
        vectors = torch.cat([outcomes[i * parts + part].vectors for part in range(parts)])
        words = [text.ids[whole:]]
        for kept, where in ((vectors, found), (vectors[-2:], last)):
            where.append(slow_use.divergence_and_nll(view, kept, [], before, words)[0])
    assert view.front == (lm.bos_id,)
    assert result["exact"] == 1
    assert result["kl"] == pytest.approx(sum(found) / 2, rel=2e-3)
    of_the_last = [row["kl"] for row in rows if row["context"] == "vectors of the last passage"]
    assert of_the_last == pytest.approx([sum(last) / 2] * (parts - 1), rel=2e-3)


@pytest.mark.slow
def test_usable_measures_in_the_folder_are_not_made_again(tmp_path, monkeypatch):
    """The folder has those of one text, then of both; then all come from the folder."""
    from types import SimpleNamespace

    import usable
    from memvec.passages.passage import Passage

    lm = tiny()
    ids = torch.randint(2, lm.vocab_size, (2, 4 + usable.CONTINUATION)).tolist()
    texts = [Passage(tuple(row), i) for i, row in enumerate(ids)]
    recipe = Recipe.of("usable", settle=10, decay=10, query_tokens=4, query_count=2)
    options = SimpleNamespace(recipe=recipe, batch_size=2, in_a_row=1, keep=tmp_path, encoder=None)
    _, second = usable.setting(lm, texts[1:], 4, 2, options)
    assert len(list(tmp_path.iterdir())) == 1
    _, both = usable.setting(lm, texts, 4, 2, options)
    monkeypatch.setattr(usable, "measures", None)  # a new measurement would raise
    assert usable.setting(lm, texts, 4, 2, options)[1] == both
    assert usable.setting(lm, texts[1:], 4, 2, options)[1] == second
    options.recipe = Recipe.of("usable", settle=61, decay=60, query_tokens=4, query_count=2)
    with pytest.raises(TypeError):
        usable.setting(lm, texts, 4, 2, options)


@pytest.mark.slow
def test_passages_of_the_prose_do_not_overlap_if_they_fit(capsys):
    """Only passages that overlap are drawn again. If they do not fit, a warning counts them."""
    import random

    from memvec.errors import MemvecError
    from memvec.loading import load_lm
    from texts import overlapping, passages_of, places

    N = 3343
    for n, T in ((8, 32), (64, 35), (192, 8), (32, 96), (1, N), (2, N // 2)):
        found = places(N, n, T, random.Random(0))
        assert found == places(N, n, T, random.Random(0))
        assert len(found) == n
        assert 0 <= min(found) <= max(found) <= N - T
        inside = sorted(found)
        assert all(b - a >= T for a, b in itertools.pairwise(inside))
        if n * T < N / 4:
            before = random.Random(0).sample(range(N - T), n)
            assert sum(a != b for a, b in zip(found, before, strict=True)) < n / 2
    lm = load_lm()
    passages = passages_of(lm, 64, 35)
    assert [p.document for p in passages] == list(range(64))
    assert overlapping(passages) == 0
    assert capsys.readouterr().err == ""
    assert overlapping(passages_of(lm, 32, 288)) == 32
    assert "32 of 32 passages of 288 tokens overlap" in capsys.readouterr().err
    for n, T in ((4000, 8), (1, 4000)):
        with pytest.raises(MemvecError, match="too few for"):
            passages_of(lm, n, T)


@pytest.mark.slow
def test_passages_of_a_corpus_have_full_length_and_do_not_overlap(tmp_path):
    """No passage is cut short by a short text, and none comes twice from one text."""
    import pandas as pd

    from memvec.errors import MemvecError
    from memvec.loading import load_lm
    from texts import PROSE, passages_of

    lm, prose = load_lm(), PROSE.read_text("utf-8")
    ids = lm.tokenize(prose)
    texts, path = ["Too short.", prose], tmp_path / "texts.parquet"
    pd.DataFrame({"text": texts, "split": "valid"}).to_parquet(path)
    passages = passages_of(lm, 12, 64, corpus=path)
    assert [len(p) for p in passages] == [64] * 12
    grams = [{p.ids[i : i + 12] for i in range(64 - 12)} for p in passages]
    assert not any(a & b for i, a in enumerate(grams) for b in grams[:i])
    assert passages == passages_of(lm, 12, 64, corpus=path)
    with pytest.raises(MemvecError, match=f"passages of {len(ids) + 1} held-out tokens"):
        passages_of(lm, 1, len(ids) + 1, corpus=path)
    with pytest.raises(MemvecError, match="found only"):
        passages_of(lm, 80, 64, corpus=path)


@pytest.mark.slow
def test_bits_compares_storage_formats_and_compressors_on_the_same_passages():
    """RESULT has the compressors' figures for the same passages as the cheapest mix."""
    from bits import measured, result_of
    from memvec.loading import load_lm
    from texts import passages_of

    lm = load_lm()
    texts = {1: passages_of(lm, 2, 8), 4: passages_of(lm, 2, 32)}
    mixes = [("float32", 1, 0), ("int8", 1, 0), ("int4", 1, 0), ("int4", 4, 0)]
    rows = measured(lm, mixes, texts, steps=20)
    of_length = {
        length: {r["storage"]: r["bytes_per_text_byte"] for r in rows[4:] if r["length"] == length}
        for length in (8, 32)
    }
    assert of_length[8]["xz"] > of_length[32]["xz"]
    for cheap, length in ((2, 8), (3, 32)):
        priced = [row | {"bytes_per_text_byte": 100.0 - (i == cheap)} for i, row in enumerate(rows)]
        result = result_of(priced[:4] + rows[4:])
        assert result["cheapest_length"] == length
        for name in ("xz", "zstd", "arithmetic", "corrections-alone"):
            assert result[name.replace("-", "_")] == of_length[length][name]


def test_horizons_of_the_published_programs_are_of_whole_passages(monkeypatch):
    """As for memvec, right tokens beyond those that a program counts as reached count, too."""
    from types import SimpleNamespace

    import peers
    from peers_programs import Answer

    lm, asked = tiny(), passages(8, 8, seed=35)
    answers = [Answer(torch.zeros(1, lm.width), 2, 3, 1.0) for _ in asked]
    decoded = []
    monkeypatch.setattr(peers, "our_rows", lambda *_: [])
    monkeypatch.setattr(peers, "by_progressive", lambda *_, **__: answers)
    monkeypatch.setattr(
        peers, "decode_ids", lambda lm, stack, lengths, **_: decoded.append(lengths) or asked_ids
    )
    asked_ids = [p.ids for p in asked]
    options = SimpleNamespace(steps=9, progressive="folder")
    rows = peers.at_horizon(lm, asked, options)
    assert decoded == [[8, 8]] * len(rows)
    assert all(row.horizon == [8, 8] and row.reached == [2, 2] for row in rows)


def test_the_published_loop_keeps_the_vectors_that_it_measured(monkeypatch):
    """The first vectors decode to the text here, so the trial must keep them, and not those of one
    step later."""
    import exact
    from memvec.decoding import decode_ids

    lm = tiny()
    vectors = torch.randn(1, lm.width, generator=torch.Generator().manual_seed(0))
    (ids,) = decode_ids(lm, vectors[None], [6], start_rule="first-token", first=[5])
    (passage,) = [type(p)(tuple(ids)) for p in passages(6)]
    kept = []
    monkeypatch.setattr(exact, "start_vectors", lambda *_: [vectors.clone()])
    monkeypatch.setattr(
        exact, "decode_ids", lambda lm, stack, lengths, **_: kept.append(stack) or [ids]
    )
    trial = exact.as_published(lm, passage, 0.5, 9)
    assert (trial.exact, trial.steps) == (True, 1)
    assert torch.equal(kept[0], vectors[None])


def test_seconds_are_wall_time_and_those_of_the_paper_at_its_best_rate(monkeypatch):
    from types import SimpleNamespace

    import exact
    from exact import Trial

    lm, asked = tiny(), passages(2, 2, seed=37)
    monkeypatch.setattr(exact, "clock", itertools.count(0, 10).__next__)
    assert sum(t.seconds for t in exact.by_engine(lm, asked, "noise")) == pytest.approx(10)
    ours = [Trial(True, 1.0, 1.0, {})] * 2
    monkeypatch.setattr(exact, "by_engine", lambda *_: ours)
    seconds = {0.01: 8.0, 0.1: 2.0, 0.5: 4.0}
    monkeypatch.setattr(
        exact, "as_published", lambda lm, p, lr, steps: Trial(True, 9.0, seconds[lr], {})
    )
    options = SimpleNamespace(lr=list(seconds), steps=30, theirs=2)
    rows, comparison = exact.at_length(lm, asked, options)
    assert comparison["noise"][0] == pytest.approx(2)
    assert [row["lr"] for row in rows if row["side"] == "paper, best"] == [0.1]


def test_the_default_recipe_has_at_least_its_margin_and_pays_for_no_stage(monkeypatch):
    import horizon

    lm, paid = tiny(), {}
    default = Recipe().in_logits(lm.logit_spread).margin
    for margin in (0.0, 10 * default):
        recipes = horizon.ours(lm, margin)
        assert {r.margin for r in recipes.values()} == {max(margin, default)}
    recipes |= horizon.published({"margin": (0.5,), "paper": (0.1,)}, 0.0, layers=2)
    monkeypatch.setattr(horizon, "fixed", lambda *_: [[0]])
    monkeypatch.setattr(
        horizon,
        "growing",
        lambda lm, recipe, asked, costs, staged: paid.update({recipe.lr: staged}) or [[0]],
    )
    horizon.curves(lm, recipes, passages(3), [1])
    assert paid == {recipes[horizon.OURS].lr: False, 0.5: True}


def test_overlapping_intervals_are_not_reported_as_apart():
    from horizon import budget_rows, compare

    found = {"default, noise": [[4], [9]], "margin, lr 0.5": [[2], [5]]}
    (row,) = rows = budget_rows("pocket-natural", found, [10], T=64)
    assert row["noise"]["low"] < row["published"]["high"] < row["noise"]["mean"]
    assert compare(rows)["apart"] == 0


def test_corrections_after_the_horizon_are_not_counted(monkeypatch):
    from types import SimpleNamespace

    import bits
    from memvec.corrections import size
    from memvec.storage import STORAGES

    monkeypatch.setattr(bits, "surprisals", lambda lm, ids: torch.full((len(ids),), 2.0))
    monkeypatch.setattr(bits, "text_bytes", lambda lm, ids: 5 * len(ids))
    lm, (passage,) = tiny(), passages(8)
    outcome = SimpleNamespace(
        metrics=SimpleNamespace(horizon=4), corrections=[(1, 7), (5, 9)], passage=passage
    )
    row = bits.held(lm, [outcome], "float32", 2)
    assert (row["tokens"], row["bits_held"], row["at_end"]) == (2, (4 - 1) * 2 / 2, 0)
    stored = STORAGES["float32"].size(2, lm.width) + size([[(1, 7)]])
    assert row["bytes_per_text_byte"] == stored / 20


@pytest.fixture
def result(monkeypatch, tmp_path):
    """A function that runs the main of a module with options and returns its RESULT's numbers."""

    def run(module, *words):
        shown = {}
        monkeypatch.setattr(module, "report", lambda *_, **result: shown.update(result))
        monkeypatch.setattr(sys, "argv", [module.__name__, *words, "--out", str(tmp_path)])
        module.main()
        return shown

    return run


def test_a_ratio_is_changed_over_default_at_the_largest_length(result, monkeypatch):
    from types import SimpleNamespace

    import recipes

    def crammed(lm, passages, recipe, K, batch_size):
        changed = recipe.optimizer == "nadam"
        spent = (50.0 if len(passages[0]) == 6 else 75.0) if changed else 100.0
        outcome = SimpleNamespace(spent=spent, exact=True, steps=1)
        return dict.fromkeys(range(len(passages)), outcome)

    monkeypatch.setattr(recipes, "crammed", crammed)
    words = ("--shape", "tiny-llama", "--tokens", "6", "3", "--passages", "4")
    assert result(recipes, *words)["ratio"] == 0.5


def test_ratios_are_relative_to_one_vector_and_to_one_slot(result, monkeypatch):
    import batch
    import vectors

    monkeypatch.setattr(vectors, "save_figure", lambda *_: None)
    monkeypatch.setattr(vectors, "horizons", lambda lm, r, K, asked, _: [4.0 / K] * len(asked))
    words = ("--shape", "tiny-llama", "--tokens", "3", "--vectors", "2", "1", "--passages", "2")
    assert result(vectors, *words)["per_vector"] == 0.5
    monkeypatch.setattr(
        batch, "measure", lambda lm, asked, slots, steps: batch.Measured(float(slots), 1, 1.0, 1)
    )
    monkeypatch.setattr(batch, "load_lm", lambda _: None)
    monkeypatch.setattr(batch, "passages_of", lambda lm, n, T: [()] * n)
    assert result(batch, "--passages", "4", "--rounds", "1")["ratio"] == 4


def test_ratios_are_relative_to_the_best_row_of_each_program():
    from exact import Trial
    from peers import Row, result_of

    def row(program, seconds, horizon):
        return Row(program, "", [Trial(True, 1, seconds, {})] * 2, [horizon] * 2, [9, 9])

    ours = row("memvec", 1.0, 8)
    theirs = [row("hidden_capacity", s, 0) for s in (9.0, 3.0)]
    theirs += [row("progressive_cramming", s, h) for s, h in ((2.0, 4), (5.0, 2))]
    result = result_of([ours, *theirs], [ours, *theirs[2:]])
    assert (result["ratio_seed"], result["ratio_progressive"]) == (3, 2)
    assert (result["ratio_horizon"], result["time_horizon"]) == (2, 2)


def test_a_step_that_exceeds_a_cost_does_not_count_there():
    """Tokens that the first vectors give back by chance are measured by the first step."""
    from at_costs import growing

    asked = [type(p)(p.ids, i) for i, p in enumerate(passages(*[2] * 64, seed=38))]
    recipe = Recipe(start="noise", margin=0.0)
    free, paid = zip(*growing(tiny(), recipe, asked, [1, 8], staged=False), strict=True)
    assert set(free) == {0}
    assert any(paid)


def test_every_attempt_of_a_search_counts_as_cost(monkeypatch):
    """Each attempt costs 10 tokens. Lengths 2 and 4 are exact, 8 and 6 are not, 5 is."""
    from types import SimpleNamespace

    import at_costs

    class Ten:
        given, recipe = 0, SimpleNamespace(margin=0.0)

        def __init__(self, *_, **__):
            self.jobs = []
            self.waiting = SimpleNamespace(push=self.jobs.append)

        def run(self):
            while self.jobs:
                job = self.jobs.pop()
                exact = len(job.passage) <= 5
                yield SimpleNamespace(passage=job.passage, exact=exact, spent=job.spent + 10)

    monkeypatch.setattr(at_costs, "Engine", Ten)
    (row,) = at_costs.fixed(tiny(), Recipe(), passages(8), [5, 10, 29, 49, 50])
    assert row == [0, 2, 4, 4, 5]
