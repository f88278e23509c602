"""Receipts of an evaluation: the requests and answers from which every score is computed.

A folder of receipts has one JSONL file per column, with one line per document, and `run.json` with
the model, the recipe and everything else that can change a number. Scores are functions of the
receipts alone (`scores_of`), so they can be computed again, and tables are made from receipts only.
"""

from __future__ import annotations

import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from memvec import statistics
from memvec.errors import MemvecError
from memvec.results import Record
from memvec.usable.columns import COLUMNS
from memvec.writing import make_folder, path_of, read_json, write_atomically

ALL = "all tasks"
RUN = "run.json"
PERCENT = {"acc", "acc_norm", "exact_match", "f1"}  # scores from 0 to 1
Kind = Literal["choice", "likelihood", "text"]


class Answer(Record):
    """An answer that was scored, or a generated text."""

    text: str
    loglikelihood: float | None = Field(default=None, description="nats; none: it was generated")
    greedy: bool | None = Field(default=None, description="greedy decoding generates it")


class Receipt(Record):
    """One document in one column."""

    run: str = Field(default="", description="hash that identifies the run: model, recipe, tasks")
    task: str
    document: int = Field(description="its number in the task")
    column: str
    kind: Kind
    context_sha256: str = Field(description="hash of the context's token ids")
    context_tokens: int = Field(ge=0)
    slots: int = Field(ge=0, description="inputs that replace the context")
    exact: bool | None = Field(description="the vectors give the context back; none: no vectors")
    question: str
    answers: list[Answer] = Field(min_length=1)
    choices: list[str] = Field(description="the choices as the task has them; none: no choice")
    gold: int | str | list[int] | list[str] = Field(
        description="right choices by number, or right texts"
    )
    scores: dict[str, float]


class Figure(Record):
    """A score of one task in one column: the mean with its 95 % interval over the documents."""

    task: str
    score: str
    column: str
    value: float
    low: float
    high: float
    documents: int = Field(ge=1)
    kept: float | None = Field(
        default=None,
        description="(this - none) / (full - none); none where the context changes nothing",
    )
    kept_interval: tuple[float, float] | None = None
    context_tokens: float = Field(description="mean tokens of a context")
    slots: float = Field(description="mean number of inputs that replace a context")
    exact: int = Field(ge=0, description="documents whose context the vectors give back")


def scores_of(receipt: Receipt) -> dict[str, float]:
    """The scores of one document, from its receipt.

    choice      `acc`: the choice with the largest log-likelihood is right; `acc_norm`: the choice
                with the largest log-likelihood per character is right
    likelihood  `acc`: greedy decoding generates the answer (as in LAMBADA); `nll`: its NLL, nats
    text        `exact_match` and word `f1` with the nearest right text, without articles,
                punctuation and case (as in SQuAD)
    """
    values = [answer.loglikelihood for answer in receipt.answers]
    if receipt.kind == "text":
        golds = [str(g) for g in _as_list(receipt.gold)] or [""]
        text = receipt.answers[0].text
        return {
            "exact_match": max(float(_words(text) == _words(g)) for g in golds),
            "f1": max(_f1(_words(text), _words(g)) for g in golds),
        }
    likelihoods = [math.nan if value is None else value for value in values]
    if receipt.kind == "likelihood":
        return {"acc": float(bool(receipt.answers[0].greedy)), "nll": -likelihoods[0]}
    right = set(_as_list(receipt.gold))
    scores = {"acc": float(_argmax(likelihoods) in right)}
    lengths = [len(choice) for choice in receipt.choices]
    if len(lengths) == len(likelihoods) and min(lengths) > 0:
        by_length = [value / n for value, n in zip(likelihoods, lengths, strict=True)]
        scores["acc_norm"] = float(_argmax(by_length) in right)
    return scores


def _as_list(gold: Any) -> list[Any]:
    return gold if isinstance(gold, list) else [gold]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))


# ---------------------------------------------------------------------- the folder


def write(folder: str | os.PathLike[str], column: str, receipts: Sequence[Receipt]) -> None:
    """Write the receipts of a column.

    Raises MemvecError if the folder cannot be written, or has a column with other documents.
    """
    others = [path for c in COLUMNS if c != column and (path := _file(folder, c)).is_file()]
    _refuse_mixed([*receipts, *(receipt for file in others for receipt in _read_column(file))])
    lines = "".join(receipt.model_dump_json() + "\n" for receipt in receipts)
    make_folder(folder)
    write_atomically(_file(folder, column), lines.encode())


def refuse_another_run(folder: str | os.PathLike[str], run: str) -> None:
    """Raise MemvecError if a folder has receipts of another run."""
    for column in COLUMNS:
        file = _file(folder, column)
        if file.is_file() and any(r.run != run for r in _read_column(file)):
            raise MemvecError(
                f"{file} is of another run (model, recipe, tasks or seed): name another folder "
                "of receipts."
            )


def write_run(folder: str | os.PathLike[str], run: dict[str, Any]) -> None:
    """Write `run.json`. Raises MemvecError if the folder cannot be written."""
    write_atomically(path_of(folder) / RUN, json.dumps(run, indent=2, default=str).encode())


def earlier_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The harness's figures in `run.json` by column, for the columns with receipts."""
    try:
        results = read_json((path_of(folder) / RUN).read_text("utf-8"))["harness_results"]
        return {c: results[c] for c in COLUMNS if c in results and _file(folder, c).is_file()}
    except (OSError, ValueError, KeyError, TypeError):  # run.json is missing or damaged
        return {}


def _file(folder: str | os.PathLike[str], column: str) -> Path:
    return path_of(folder) / f"{column}.jsonl"


def read(folder: str | os.PathLike[str]) -> list[Receipt]:
    """Read all receipts of a folder, and check their scores by computing them again.

    Raises MemvecError for a folder without receipts, a damaged receipt, columns of several runs or
    of other documents, and a score that differs from that of the answers.
    """
    folder = path_of(folder)
    files = [path for column in COLUMNS if (path := _file(folder, column)).is_file()]
    receipts = [receipt for file in files for receipt in _read_column(file)]
    if not receipts:
        raise MemvecError(f"there are no receipts in {folder}.")
    if len({receipt.run for receipt in receipts}) > 1:
        raise MemvecError(f"the receipts in {folder} are of several runs: no table compares them.")
    _refuse_mixed(receipts)
    return receipts


def _refuse_mixed(receipts: Sequence[Receipt]) -> None:
    """Raise MemvecError if a document has another context or question in another column."""
    known: dict[tuple[str, int], Receipt] = {}
    for receipt in receipts:
        first = known.setdefault((receipt.task, receipt.document), receipt)
        if (first.context_sha256, first.question) != (receipt.context_sha256, receipt.question):
            raise MemvecError(
                f"document {receipt.document} of {receipt.task} is another one in the column "
                f"'{receipt.column}' than in '{first.column}': the task's data have changed, so "
                "name another folder of receipts."
            )


def _read_column(file: Path) -> list[Receipt]:
    """Read and check the receipts of a column. Raises MemvecError as `read` does."""
    receipts = []
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError:
        raise MemvecError(f"{file} is damaged: it is not UTF-8.") from None
    # Only a line feed ends a line: answers may contain other line separators of Unicode.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            receipt = Receipt.model_validate_json(line)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise MemvecError(f"{file}, line {number}, is no receipt: {reason}.") from None
        for name, score in scores_of(receipt).items():
            if not math.isclose(score, receipt.scores.get(name, math.nan), abs_tol=1e-9):
                raise MemvecError(
                    f"{file}, line {number}, claims {name} {receipt.scores.get(name)} and its "
                    f"answers give {score}: it was changed."
                )
        receipts.append(receipt)
    return receipts


# ---------------------------------------------------------------------- the table


def score_figures(receipts: Sequence[Receipt]) -> list[Figure]:
    """The figures of every task, score and column.

    If there are several tasks of one kind, figures over all their documents follow (`ALL`).
    """
    tasks = list(dict.fromkeys(r.task for r in receipts))
    by_task = {task: [r for r in receipts if r.task == task] for task in tasks}
    if len(tasks) > 1 and len({r.kind for r in receipts}) == 1:
        by_task[ALL] = list(receipts)
    return [figure for task, rows in by_task.items() for figure in _task_figures(task, rows)]


def _task_figures(task: str, receipts: Sequence[Receipt]) -> list[Figure]:
    names = list(dict.fromkeys(name for r in receipts for name in r.scores))
    columns = [c for c in COLUMNS if any(r.column == c for r in receipts)]
    return [
        figure
        for name in names
        for column in columns
        if (figure := _figure(task, name, column, receipts)) is not None
    ]


def _figure(task: str, name: str, column: str, receipts: Sequence[Receipt]) -> Figure | None:
    of_column = [r for r in receipts if r.column == column and name in r.scores]
    if not of_column:
        return None
    values = [r.scores[name] for r in of_column]
    if name in PERCENT and all(value in (0.0, 1.0) for value in values):
        share = statistics.share_interval(int(sum(values)), len(values))
        low, high = share.low, share.high
    else:
        mean = statistics.bootstrap_mean(values)
        low, high = mean.low, mean.high
    kept = _kept(name, column, of_column, receipts)
    return Figure(
        task=task,
        score=name,
        column=column,
        value=sum(values) / len(values),
        low=low,
        high=high,
        documents=len(values),
        kept=None if kept is None else kept.value,
        kept_interval=None if kept is None else (kept.low, kept.high),
        context_tokens=sum(r.context_tokens for r in of_column) / len(of_column),
        slots=sum(r.slots for r in of_column) / len(of_column),
        exact=sum(bool(r.exact) for r in of_column),
    )


def _kept(
    name: str, column: str, of_column: Sequence[Receipt], receipts: Sequence[Receipt]
) -> statistics.Interval | None:
    """The share of the context's gain that a column keeps, paired over the documents.

    None for the columns 'full' and 'none', and if they are missing or have equal scores.
    """
    full, none = (
        {(r.task, r.document): r.scores.get(name) for r in receipts if r.column == reference}
        for reference in ("full", "none")
    )
    gained, gains = [], []
    for receipt in of_column:
        key = (receipt.task, receipt.document)
        with_all, without = full.get(key), none.get(key)
        if with_all is not None and without is not None:
            gained.append(receipt.scores[name] - without)
            gains.append(with_all - without)
    if column in ("full", "none") or not gains or abs(sum(gains)) < 1e-9:
        return None
    return statistics.ratio_of_means(gained, gains)
