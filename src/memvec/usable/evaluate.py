"""Run an evaluation: tasks of lm-evaluation-harness, one column after the other.

The harness builds the requests and sends them to the model (memvec.usable.harness). The requests
and answers of each document become a receipt. The table is computed from the receipts alone.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from memvec.cram_job import CramStatus
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, check_minimum, first_line
from memvec.machine import environment, plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.passage import ids_hash
from memvec.usable.columns import COLUMNS, SPLIT, column_named
from memvec.usable.receipts import (
    Answer,
    Figure,
    Kind,
    Receipt,
    earlier_results,
    refuse_another_run,
    score_figures,
    scores_of,
    write,
    write_run,
)
from memvec.writing import make_folder, path_of

KINDS: dict[str, Kind] = {
    "multiple_choice": "choice",
    "loglikelihood": "likelihood",
    "generate_until": "text",
}


@dataclass(frozen=True)
class Evaluation:
    """The settings of an evaluation; sizes, recipe and cache are those of memvec.usable.columns.

    `examples` is the number of worked examples in front of each question (None: the task's own),
    `limit` the maximum number of documents of each task (None: all), `tasks_folder` a folder with
    task files of your own, and `receipts` the folder of receipts (None: they are not written).
    """

    tasks: tuple[str, ...]
    columns: tuple[str, ...] = COLUMNS
    vectors: int = 8
    tokens: int = 48
    recipe: Recipe | None = None
    split: str = SPLIT
    cache: str | os.PathLike[str] | None = None
    receipts: str | os.PathLike[str] | None = None
    tasks_folder: str | os.PathLike[str] | None = None
    limit: int | None = None
    examples: int | None = None
    batch_size: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise MemvecError for settings that are wrong for any model; make the receipts folder."""
        if not self.tasks:
            raise MemvecError("there is no task to evaluate: name at least one.")
        if not self.columns:
            raise MemvecError("there is no column to evaluate: name at least one.")
        for column in self.columns:
            column_named(column)
            if self.columns.count(column) > 1:
                raise MemvecError(f"the column '{column}' is named twice: name each once.")
        check_minimum(1, vectors=self.vectors, tokens=self.tokens)
        check_minimum(1, limit=self.limit, batch_size=self.batch_size)
        check_minimum(0, examples=self.examples)
        if not 0 <= self.seed < 2**32:  # what the harness takes
            raise MemvecError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}.")
        if self.tasks_folder is not None and not (folder := path_of(self.tasks_folder)).is_dir():
            raise MemvecError(f"there is no folder {folder} with task files.")
        if not self.split:
            raise MemvecError("split must be the text at which a question begins, not empty.")
        if importlib.util.find_spec("lm_eval") is None:
            raise MemvecError(
                "evaluation needs lm-evaluation-harness: pip install '.[eval]' in the repository."
            )
        if self.receipts is not None:
            make_folder(self.receipts)


@plain_torch()
def evaluate(
    lm: FrozenLM,
    evaluation: Evaluation,
    on_column: Callable[[str], None] | None = None,
    on_status: Callable[[CramStatus], None] | None = None,
) -> list[Figure]:
    """Run an evaluation, write its receipts, and return the figures of the table.

    `on_column` is called with each column before it starts, `on_status` with the progress of
    cramming. Raises MemvecError for unknown tasks or columns, if the harness is not installed, for
    a task that cannot be loaded or has no context, for requests that do not fit the model's
    context, and for a folder with receipts of another run.
    """
    from memvec.usable.harness import MemvecLM

    evaluation.check()
    with _quiet():
        manager = _task_manager(evaluation)  # made once: it reads thousands of task files
        tasks = _tasks(evaluation, manager)
        contents = {name: _content_hash(task, evaluation.limit) for name, task in tasks.items()}
        receipts: list[Receipt] = []
        results: dict[str, Any] = {}
        run = ""
        for column in evaluation.columns:
            if on_column is not None:
                on_column(column)
            model = MemvecLM(
                lm,
                context=column,
                vectors=evaluation.vectors,
                tokens=evaluation.tokens,
                cache=evaluation.cache,
                split=evaluation.split,
                crammed_at_once=evaluation.batch_size,
                on_status=on_status,
                **_recipe_arguments(evaluation.recipe),
            )
            if not run:  # all columns have the same identity
                run = _identity(_record(evaluation, model, contents, {}))
                if evaluation.receipts is not None:
                    refuse_another_run(evaluation.receipts, run)
                    results |= earlier_results(evaluation.receipts)
            raw = _run(model, list(tasks.values()), manager, evaluation)
            column_receipts = list(_receipts(raw["samples"], tasks, model, run))
            results[column] = raw["results"]
            receipts += column_receipts
            if evaluation.receipts is not None:
                write(evaluation.receipts, column, column_receipts)
                write_run(evaluation.receipts, _record(evaluation, model, contents, results))
    return score_figures(receipts)


def _recipe_arguments(recipe: Recipe | None) -> dict[str, Any]:
    """All fields of a recipe as arguments of the model, where they replace those of its preset."""
    return {} if recipe is None else asdict(recipe)


def _tasks(evaluation: Evaluation, manager: Any) -> dict[str, Any]:
    """The harness's tasks by name, those of groups included. MemvecError for an unknown task."""
    for name in evaluation.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "'lm_eval ls tasks' lists them."
            raise MemvecError(f"the harness has no task '{name}': {hint}")
    try:
        loaded: dict[str, Any] = manager.load(list(evaluation.tasks))["tasks"]
    except Exception as error:  # loading data may raise any error
        raise MemvecError(
            f"the data of {', '.join(evaluation.tasks)} cannot be loaded: {first_line(error)}"
        ) from error
    for name, task in loaded.items():
        if task.OUTPUT_TYPE not in KINDS:
            raise MemvecError(f"{name} scores whole texts, which have no context to replace.")
    return loaded


def _content_hash(task: Any, limit: int | None) -> str:
    """A hash of a task's configuration, and of its documents up to the limit."""
    config = task.dump_config()
    config.get("metadata", {}).pop("config_source", None)  # the path of the file
    text = json.dumps([config, *islice(task.eval_docs, limit)], sort_keys=True, default=str)
    without_addresses = re.sub(r" at 0x[0-9a-f]+", "", text)  # these differ between processes
    return hashlib.sha256(without_addresses.encode()).hexdigest()[:16]


def _task_manager(evaluation: Evaluation) -> Any:
    """A task manager; of `tasks_folder` alone if that is enough, since reading all takes long."""
    from lm_eval.tasks import TaskManager

    if evaluation.tasks_folder is None:
        return TaskManager()
    folder = str(path_of(evaluation.tasks_folder))
    folder_only = TaskManager(include_path=folder, include_defaults=False)
    if all(name in folder_only.all_tasks for name in evaluation.tasks):
        return folder_only
    return TaskManager(include_path=folder)


def _run(model: Any, tasks: Sequence[Any], manager: Any, evaluation: Evaluation) -> dict[str, Any]:
    import lm_eval

    try:
        raw: dict[str, Any] | None = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=evaluation.examples,
            limit=evaluation.limit,
            bootstrap_iters=0,  # intervals come from the receipts
            log_samples=True,
            random_seed=evaluation.seed,
            numpy_random_seed=evaluation.seed,
            torch_random_seed=evaluation.seed,
            fewshot_random_seed=evaluation.seed,
        )
    except ValueError as error:  # e.g. more examples than a task has, or a missing field
        raise MemvecError(
            f"the harness cannot run {', '.join(evaluation.tasks)}: {error}"
        ) from error
    if raw is None:
        raise MemvecError("the harness gave no results: run it in one process.")
    return raw


def _receipts(
    samples: dict[str, list[dict[str, Any]]], tasks: dict[str, Any], model: Any, run: str
) -> Iterator[Receipt]:
    """A receipt for each document of each task."""
    traces = defaultdict(list)
    for trace in model.traces:
        traces[trace.task, trace.document].append(trace)
    for name, rows in samples.items():
        task = tasks[name]
        kind = KINDS[task.OUTPUT_TYPE]
        for row in {row["doc_id"]: row for row in rows}.values():  # each filter logs a document
            of_document = traces[task.config.task, row["doc_id"]]
            trace, exact = of_document[0], [t.exact for t in of_document if t.exact is not None]
            choices = _choices(task, row["doc"]) if kind == "choice" else []
            answers = [
                _answer(arguments, answers[0])
                for arguments, answers in zip(_arguments(row), row["resps"], strict=True)
            ]
            receipt = Receipt(
                run=run,
                task=name,
                document=row["doc_id"],
                column=model.column.name,
                kind=kind,
                context_sha256=ids_hash(trace.context),
                context_tokens=len(trace.context),
                slots=trace.slots,
                exact=all(exact) if exact else None,  # a document may have several contexts
                question=trace.question,
                # With `acc_mutual_info`, further requests score each choice without a context.
                answers=answers[: len(choices) or None],
                choices=choices,
                gold=_gold(task, row["doc"], kind),
                scores={},
            )
            yield receipt.model_copy(update={"scores": scores_of(receipt)})


def _arguments(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The arguments of a document's requests; the harness logs them as a dictionary or a list."""
    arguments = row["arguments"]
    if isinstance(arguments, dict):
        return [tuple(request.values()) for request in arguments.values()]
    return [tuple(request) for request in arguments]


def _answer(arguments: tuple[Any, ...], answer: Any) -> Answer:
    if isinstance(answer, str):
        return Answer(text=answer)
    value, greedy = answer
    return Answer(text=str(arguments[1]), loglikelihood=float(value), greedy=bool(greedy))


def _choices(task: Any, doc: Any) -> list[str]:
    return [str(choice) for choice in task.doc_to_choice(doc)]


def _gold(task: Any, doc: Any, kind: Kind) -> Any:
    """The right choices by number (-1 for a text that is not a choice), or the right texts."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if kind != "choice":
        if kind == "text" and task.config.doc_to_choice is not None:
            gold = task.doc_to_choice(doc)[gold]  # the right text is given by its choice's number
        return [str(g) for g in gold] if isinstance(gold, list) else str(gold)
    choices = task.doc_to_choice(doc)
    several = [
        (choices.index(choice) if choice in choices else -1)
        if isinstance(choice, str)
        else int(choice)
        for choice in (gold if isinstance(gold, list) else [gold])
    ]
    return several if isinstance(gold, list) else several[0]


def _record(
    evaluation: Evaluation, model: Any, contents: dict[str, str], results: dict[str, Any]
) -> dict[str, Any]:
    """Everything that can change a number of this run, and the harness's figures for comparison."""
    import lm_eval

    info = model.get_model_info()
    del info["context"]
    return {
        "tasks": list(evaluation.tasks),
        "task_contents": contents,
        "limit": evaluation.limit,
        "examples": evaluation.examples,
        "seed": evaluation.seed,
        "model": info,
        "harness": lm_eval.__version__,
        "environment": environment(model.lm.device),
        "harness_results": results,
    }


def _identity(record: dict[str, Any]) -> str:
    """A hash that identifies a run: of everything that can change its numbers, but the machine."""
    deciding = {k: v for k, v in record.items() if k not in ("environment", "harness_results")}
    text = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: no log messages of the harness below errors, random states are restored."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    state, of_numpy = random.getstate(), np.random.get_state()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
