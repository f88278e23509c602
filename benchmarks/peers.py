"""The two published programs themselves beside ours: same token ids and model, one clock.

    python benchmarks/peers.py --seed hidden_capacity --progressive progressive_cramming

`--seed` is a checkout of github.com/yurakuratov/hidden_capacity (Kuratov et al.), `--progressive`
one of github.com/FusionBrainLab/progressive_cramming (Tarasov et al.); either can be left out.
Their code runs from there. Modules that they import and do not use here (nltk, scikit-learn,
TensorBoard) are replaced by empty ones where they are missing. They get token ids instead of texts,
and a loaded model instead of a name to load (twice for each passage in the first): both in their
favour. Each side runs on its
own defaults with float32 weights on one device, with at most `--steps` steps a passage: theirs at
each learning rate of a sweep, ours from noise and, where the model has one, from its one-pass
encoder. Ours crams all passages in one batch, hidden_capacity takes one at a time,
progressive_cramming both. The clock is the wall's, or with OMP_NUM_THREADS=1 on a CPU the
processor's.

Two measurements. *Fixed length* (`--tokens`): exact passages per minute. Exact is decided by our
free-running decoding from the vectors that each program returns; `complete` counts the passages
that its own teacher-forced measure calls complete. hidden_capacity is given the first token, as in
its code. *Horizon* (`--long`): the leading tokens that decode freely, with what the program itself
calls reached; hidden_capacity has no growing length, so it is not in it.

RESULT compares ours from noise with the best row of each program, seen afterwards: `ratio_seed` and
`ratio_progressive`, ratios of exact passages per minute, and `ratio_horizon`, ours over theirs;
each with its 95 % bootstrap interval (`_low`, `_high`), and `time_horizon`, the seconds a passage
of theirs took there over ours. `--quick` takes 2 short passages and few steps.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from common import arguments, clock, ratio_of_means, report, run, summary
from exact import Trial, per_minute, ratio_of_rates
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids, first_error
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from models import SHAPES, random_model
from texts import passages_of, random_tokens

SEED_RATES = (0.01, 0.1, 0.5)
PROGRESSIVE_RATES = (0.1, 0.5)  # those of its publication


@dataclass(frozen=True)
class Answer:
    """A program's result for one passage: vectors, tokens counted as right, steps, seconds."""

    vectors: torch.Tensor  # (K, D)
    reached: int
    steps: int
    seconds: float


def horizons(lm: FrozenLM, passages: list[Passage], answers: list[Answer], given: int) -> list[int]:
    """Leading tokens that decode freely from each answer; with `given` the first one is given."""
    stack = torch.stack([answer.vectors.to(lm.device) for answer in answers])
    first = [p.ids[0] for p in passages] if given else None
    start = "first-token" if given else "vectors"
    decoded = decode_ids(lm, stack, [len(p) for p in passages], start=start, first=first)
    errors = [first_error(ids, p.ids) for ids, p in zip(decoded, passages, strict=True)]
    return [len(p) if error is None else error for p, error in zip(passages, errors, strict=True)]


@contextlib.contextmanager
def foreign(folder: Path, **stand_ins: dict[str, Any]) -> Iterator[None]:
    """Import from a checkout without output; missing modules are replaced inside the context."""
    kept, path, quiet = dict(sys.modules), list(sys.path), io.StringIO()
    for name, content in stand_ins.items():
        try:
            importlib.import_module(name)
        except ImportError:
            module: Any = types.ModuleType(name)
            module.__dict__.update(content)
            sys.modules[name] = module
    sys.path.insert(0, str(folder))
    try:
        with (
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - set(kept):
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        for name in stand_ins:
            if name not in kept:
                sys.modules.pop(name, None)


def by_seed(
    lm: FrozenLM, passages: list[Passage], folder: Path, lr: float, steps: int
) -> list[Answer]:
    """Each passage by hidden_capacity's own `run_single_experiment`."""
    answers = []
    with foreign(folder, nltk={"sent_tokenize": lambda text: [text]}):
        program: Any = importlib.import_module("train")
        program.sent_tokenize = lambda text: [text]
        # The model is frozen by its code as by ours: one serves both of its loads.
        program.AutoModelForCausalLM = types.SimpleNamespace(
            from_pretrained=lambda *_, **__: lm.model
        )
        for passage in passages:
            ids = torch.tensor([passage.ids], device=lm.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            torch.manual_seed(passage.document)
            began = clock()
            results = program.run_single_experiment(
                1,
                "",
                len(passage),
                steps,
                0,
                0,
                lm.name,
                torch.float32,
                False,
                str(lm.device),
                lambda *_, inputs=inputs, **__: transformers.BatchEncoding(inputs),
                lr,
                0.9,
                0.9,
                0.01,
            )
            seconds = clock() - began
            right = round(results["best_accuracy"] * (len(passage) - 1))
            vectors = torch.tensor(results["best_memory_params"])
            answers.append(Answer(vectors, right + 1, len(results["losses"]), seconds))
    return answers


def by_progressive(
    lm: FrozenLM, passages: list[Passage], folder: Path, trainer: str, batch: int, **changes: Any
) -> list[Answer]:
    """All passages by one of progressive_cramming's trainers, on its defaults with changes."""
    missing = {"sklearn.decomposition": {"PCA": None}, "sklearn": {"__path__": []}}
    missing["torch.utils.tensorboard"] = {"SummaryWriter": None}
    with foreign(folder / "src", **missing), tempfile.TemporaryDirectory() as out:
        program: Any = importlib.import_module("progressive_cramming.train")
        options: Any = importlib.import_module("progressive_cramming.train.arguments")
        settings = options.MyTrainingArguments(
            output_dir=out,
            embedding_init_method="random0.02",
            warmup_steps=100,
            dtype="float32",
            loss_type="cross_entropy",  # without it hidden states are kept that nothing uses
            full_cramming_convergence_threshold=1.0,
            per_device_train_batch_size=batch,
            report_to=[],
            use_cpu=lm.device.type == "cpu",
            **changes,
        )
        settings.logging_dir = None  # transformers 5 has no such field; None writes no log
        ids = [list(passage.ids) for passage in passages]
        rows: list[dict[str, Any]] = []
        run = getattr(program, trainer)(
            lm.model,
            processing_class=types.SimpleNamespace(decode=lambda *_, **__: ""),
            args=settings,
            train_dataset=ids,
            data_collator=_collated,
        )
        run._save_artifacts = lambda found, **_: rows.extend(found)
        began = clock()
        run.train()
        seconds = (clock() - began) / len(passages)
    return [_answer([r for r in rows if r["sample_id"] == i], seconds) for i in range(len(ids))]


def _collated(rows: list[list[int]]) -> transformers.BatchEncoding:
    ids = torch.tensor(rows)
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _answer(rows: list[dict[str, Any]], seconds: float) -> Answer:
    """From the rows of a passage: one, or one a stage, of which the longest complete one counts."""
    staged = "stage_seq_len" in rows[0]
    complete = [row for row in rows if row["final_convergence"] >= 1.0]
    kept = (complete or rows)[-1]
    length = kept["stage_seq_len"] if staged else kept["num_input_tokens"]
    reached = length if complete else int(kept["final_convergence"] * length)
    steps = rows[-1]["steps_taken"] if staged else kept["convergence_after_steps"]
    return Answer(torch.tensor(kept["embedding"]), reached, steps, seconds)


def by_us(
    lm: FrozenLM, passages: list[Passage], start: str, steps: int
) -> tuple[list[Answer], list[int]]:
    """Our default recipe; the answers and the exact horizons, decoded by the engine itself."""
    engine = Engine(lm, Recipe(start=start, steps=steps), batch_size=len(passages))
    began = clock()
    outcomes = sorted(engine.run(passages), key=lambda outcome: outcome.passage.document)
    seconds = (clock() - began) / len(passages)
    answers = [Answer(o.vectors, o.metrics.horizon, o.steps, seconds) for o in outcomes]
    return answers, [outcome.metrics.horizon for outcome in outcomes]


@dataclass(frozen=True)
class Row:
    """One program with its settings, over all passages of a measurement."""

    program: str
    settings: str
    trials: list[Trial]
    horizon: list[int]
    reached: list[int]

    def record(self, passages: list[Passage]) -> dict[str, Any]:
        """As a row of the table."""
        horizon = summary([float(h) for h in self.horizon])
        T = len(passages[0])
        return {
            "tokens": T,
            "program": self.program,
            "settings": self.settings,
            "n": len(passages),
            "complete": sum(reached >= T for reached in self.reached),
            "exact": sum(t.exact for t in self.trials),
            "exact_per_minute": per_minute(self.trials),
            "horizon": horizon["mean"],
            "low": horizon["low"],
            "high": horizon["high"],
            "reached": sum(self.reached) / len(self.reached),
            "s_a_passage": sum(t.seconds for t in self.trials) / len(self.trials),
        }


def row_of(
    program: str, settings: str, passages: list[Passage], answers: list[Answer], decoded: list[int]
) -> Row:
    """Answers and their decoded horizons as a row."""
    trials = [
        Trial(h >= len(p), a.steps, a.seconds, {})
        for p, a, h in zip(passages, answers, decoded, strict=True)
    ]
    row = Row(program, settings, trials, decoded, [answer.reached for answer in answers])
    seconds = [round(t.seconds, 1) for t in trials]
    print(f"{program}, {settings}: {decoded} tokens, {seconds} s", file=sys.stderr, flush=True)
    return row


def our_rows(lm: FrozenLM, passages: list[Passage], steps: int) -> list[Row]:
    """Our rows, the one from noise first."""
    starts = ["noise"] + (["encoder"] if lm.encoder is not None else [])
    return [
        row_of("memvec", start, passages, *by_us(lm, passages, start, steps)) for start in starts
    ]


def at_fixed_length(
    lm: FrozenLM, passages: list[Passage], options: argparse.Namespace
) -> list[Row]:
    """Rows of all programs over the same passages of one length."""
    rows = our_rows(lm, passages, min(Recipe().steps, options.steps))
    for lr in SEED_RATES if options.seed else ():
        answers = by_seed(lm, passages, options.seed, lr, min(5000, options.steps))
        decoded = horizons(lm, passages, answers, given=1)
        rows.append(row_of("hidden_capacity", f"lr {lr:g}", passages, answers, decoded))
    for lr in PROGRESSIVE_RATES if options.progressive else ():
        for batch in (1, len(passages)):
            answers = by_progressive(
                lm,
                passages,
                options.progressive,
                "FullCrammingTrainer",
                batch,
                learning_rate=lr,
                max_optimization_steps_per_sample=options.steps,
            )
            decoded = horizons(lm, passages, answers, given=0)
            settings = f"full, lr {lr:g}, batch {batch}"
            rows.append(row_of("progressive_cramming", settings, passages, answers, decoded))
    return rows


def at_horizon(lm: FrozenLM, passages: list[Passage], options: argparse.Namespace) -> list[Row]:
    """Rows of the programs whose length grows, over passages longer than any program reaches."""
    rows = our_rows(lm, passages, min(Recipe().steps, options.steps))
    low_dim = {"low_dim_projection": True, "low_dim_size": 256}
    arms: tuple[tuple[str, dict[str, Any]], ...] = (("", {}), (", low-dim 256", low_dim))
    for lr in PROGRESSIVE_RATES if options.progressive else ():
        for name, changes in arms:
            answers = by_progressive(
                lm,
                passages,
                options.progressive,
                "ProgressiveCrammingTrainer",
                1,
                learning_rate=lr,
                progressive_train=True,
                max_optimization_steps_per_sample=options.steps,
                **changes,
            )
            # Only the tokens that the program counts as reached are decoded.
            reached = [
                Passage(p.ids[: max(1, a.reached)]) for p, a in zip(passages, answers, strict=True)
            ]
            decoded = horizons(lm, reached, answers, given=0)
            settings = f"progressive, lr {lr:g}{name}"
            rows.append(row_of("progressive_cramming", settings, passages, answers, decoded))
    return rows


def result_of(fixed: list[Row], long: list[Row]) -> dict[str, float]:
    """The RESULT line: ours from noise against the best row of each program."""
    ratios: dict[str, tuple[float, float, float]] = {}
    for name, program in (("seed", "hidden_capacity"), ("progressive", "progressive_cramming")):
        rows = [row for row in fixed if row.program == program]
        if any(per_minute(row.trials) for row in rows):
            best = max(rows, key=lambda row: per_minute(row.trials))
            ratios[f"ratio_{name}"] = ratio_of_rates(fixed[0].trials, best.trials)
    result: dict[str, float] = {}
    grown = [row for row in long if row.program != "memvec"]
    if grown:
        best = max(grown, key=lambda row: sum(row.horizon))
        ratios["ratio_horizon"] = ratio_of_means(
            *([float(h) for h in row.horizon] for row in (long[0], best))
        )
        seconds = [sum(t.seconds for t in row.trials) for row in (best, long[0])]
        result["time_horizon"] = seconds[0] / seconds[1]
    for name, value in ratios.items():
        result |= dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))
    return result


def main() -> None:
    """Both measurements, with the programs that are given."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=Path, help="checkout of hidden_capacity")
    parser.add_argument("--progressive", type=Path, help="checkout of progressive_cramming")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="the fixed length")
    parser.add_argument("--long", type=int, default=96, help="longer than anybody gets")
    parser.add_argument("--steps", type=int, default=10_000, help="most steps a passage")
    options = parser.parse_args()
    for name, path in (("seed", "train.py"), ("progressive", "src/progressive_cramming")):
        folder = getattr(options, name)
        if folder is not None and not (folder / path).exists():
            parser.error(f"--{name} {folder} has no {path}: give a checkout of that program")
    if options.quick:
        options.passages, options.tokens, options.long, options.steps = 2, 8, 16, 60
    lm = random_model(options.shape) if options.shape else load_lm(options.model, dtype="float32")
    texts = random_tokens if lm.tokenizer is None else passages_of
    both = []
    for measure, T in ((at_fixed_length, options.tokens), (at_horizon, options.long)):
        selected = texts(lm, options.passages, T)
        passages = [Passage(passage.ids, i) for i, passage in enumerate(selected)]
        list(Engine(lm, Recipe(steps=2), batch_size=len(passages)).run(passages))  # first-use costs
        both.append((measure(lm, passages, options), passages))
    rows = [row.record(passages) for measured, passages in both for row in measured]
    report("peers", rows, options, **result_of(both[0][0], both[1][0]))


if __name__ == "__main__":
    run(main)
