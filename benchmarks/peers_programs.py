"""Run the two published programs that benchmarks/peers.py compares with, from their checkouts.

The programs import nltk, scikit-learn and TensorBoard, which they do not use here. Where one of
these is missing, an empty module replaces it.
"""

from __future__ import annotations

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

from common import clock
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage


@dataclass(frozen=True)
class Answer:
    """A program's result for one passage, with its optimiser steps and seconds."""

    vectors: torch.Tensor  # (K, D)
    reached: int  # tokens that are right by the program's own measure
    steps: int
    seconds: float


@contextlib.contextmanager
def foreign(folder: Path, **stand_ins: dict[str, Any]) -> Iterator[None]:
    """A context in which modules are imported from a checkout and nothing is printed.

    It removes these modules at the end. `stand_ins`: name of a module → its content, which is used
    if the module is missing.
    """
    modules_before, path_before, output = dict(sys.modules), list(sys.path), io.StringIO()
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
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path_before
        for name in set(sys.modules) - set(modules_before):
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        for name in stand_ins:
            if name not in modules_before:
                sys.modules.pop(name, None)


def by_seed(
    lm: FrozenLM, passages: list[Passage], folder: Path, lr: float, steps: int
) -> list[Answer]:
    """Cram each passage with `run_single_experiment` of hidden_capacity."""
    answers = []
    with foreign(folder, nltk={"sent_tokenize": lambda text: [text]}):
        program: Any = importlib.import_module("train")
        program.sent_tokenize = lambda text: [text]
        # Its code freezes the model as memvec does, so both of its loads may return the same one.
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
    """Cram all passages with a trainer of progressive_cramming: its defaults, with changes."""
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
            loss_type="cross_entropy",  # otherwise it stores hidden states that nothing uses
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
    """The answer from the rows of a passage: one row, or one for each stage.

    The last complete row counts, or the last one if none is complete.
    """
    staged = "stage_seq_len" in rows[0]
    complete = [row for row in rows if row["final_convergence"] >= 1.0]
    last = (complete or rows)[-1]
    length = last["stage_seq_len"] if staged else last["num_input_tokens"]
    reached = length if complete else int(last["final_convergence"] * length)
    steps = rows[-1]["steps_taken"] if staged else last["convergence_after_steps"]
    return Answer(torch.tensor(last["embedding"]), reached, steps, seconds)
