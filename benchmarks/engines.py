"""Do inference engines decode vectors exactly? Runs each engine, and writes docs/engines.md.

    python benchmarks/engines.py --work DIR --environments DIR [--engines vllm mlx ...]

A cell (the page calls it a combination) is one engine, model, dtype, K, start rule and way of
asking. The ways are one prompt at a time, sixteen together, and sixteen with plain prompts among
them; for vLLM also with its cache of prefixes, through its server, and as a chat with that server.
Passages are random tokens, and one of them contains the model's EOS. In cells of the rule 'use',
questions follow usable vectors, and the expected answers are those of memvec. A cell is exact if
the engine's greedy tokens of every passage have the hash of the expected ones.

`--environments` is a folder of virtual environments, each with the name of its engine. An engine
without an environment is listed as not run.

Vectors are crammed once and are kept in `--work`, together with requests, answers and cells. The
page has all cells that are in `--work`: engines and models may be run by several commands, one
after another or at the same time. With `--resume` only requests without an answer are sent, and
`--engines` without a name sends none: it only writes the page. The exit code is 1 if fewer than 98
% of the cells are exact. Everything takes hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines_models import (
    FAMILIES,
    LENGTHS,
    Group,
    folder_of,
    groups_of,
    lead,
    lm_of,
    plain_prompts,
)
from engines_page import is_exact, page
from memvec.decoding import decode_ids, first_error
from memvec.engines.folder import model_alone
from memvec.engines.request import write_request
from memvec.engines.run import Answer, answer_in, refuse_model
from memvec.engines.run import start as start_engine
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.passages.passage import ids_hash

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
# engine → the name of its environment; None is the environment of memvec.
ENVIRONMENT = {
    "transformers": None,
    "peft": None,
    "vllm": "vllm",
    "vllm-server": "vllm",
    "llama.cpp": "llama.cpp",
    "mlx": "mlx",
}
# (family, dtype) → the model and its prompts, which are made once.
PREPARED: dict[tuple[str, str], tuple[FrozenLM, list[Group]]] = {}
MIN_EXACT = 0.98  # share of exact cells below which this program fails
ALONE, TOGETHER, MIXED = "batch 1", "batch 16", "batch 16 and plain prompts"
CACHED, CHAT = "prefix cache on, each question sent twice", "chat"
CACHE = {"prefix_caching": True, "block_size": 32}
# engine → for each start of it: its settings, and the ways in which it is asked then.
WAYS: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "transformers": [({}, [ALONE, TOGETHER, MIXED])],
    "peft": [({}, [ALONE])],  # an adapter holds the vectors of one passage
    "vllm": [({}, [ALONE, TOGETHER, MIXED]), (CACHE, [CACHED])],
    "vllm-server": [({"chat": True}, [CHAT]), ({}, [MIXED])],
    "llama.cpp": [({}, [ALONE, TOGETHER, MIXED])],
    "mlx": [({}, [ALONE])],  # generate_step takes one prompt
}


def batches_of(way: str, prompts: list[int], plain: list[int]) -> list[list[int]]:
    """The batches of one cell: numbers of its prompts, and of plain prompts if it mixes them."""
    if way == ALONE:
        return [[i] for i in prompts]
    if way == MIXED:
        return [[*prompts[:8], *plain, *prompts[8:]]]
    return [prompts, prompts] if way == CACHED else [prompts]


@dataclass(frozen=True)
class Start:
    """One start of an engine with a model: cells, prompts, batches and the request's folder."""

    family: str
    dtype: str
    lm: FrozenLM
    groups: list[Group]
    cells: list[tuple[Group, str, list[int], slice]]  # group, way, its prompts, its batches
    batches: list[list[int]]
    folder: Path


def run(engine: str, python: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of one engine. It runs in one process, and in a new one after a failure."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        requests = arguments.work / "requests" / engine
        requests.mkdir(parents=True, exist_ok=True)
        starts, refusals = [], []
        for family in arguments.families:
            folder = folder_of(family, arguments.work)
            alone = stack.enter_context(model_alone(folder))
            for dtype in arguments.dtypes:
                lm, groups = prepared(family, dtype, folder, arguments)
                for settings, ways in WAYS[engine]:
                    if settings.get("chat") and family != "pocket":
                        continue  # the tiny models have no tokenizer
                    name = "-".join([family, dtype, *settings])
                    start = planned_start(
                        family, dtype, lm, groups, settings, ways, requests / name
                    )
                    try:
                        refuse_model(engine, lm)
                    except MemvecError as error:
                        refusals.append(cells_of(engine, start, None, str(error)))
                        continue
                    write(start, alone, settings, arguments.resume)
                    starts.append(start)
        for start, answer, failure in answers(engine, python, starts):
            cells = cells_of(engine, start, answer, failure)
            rows += cells
            exact = sum(is_exact(cell) for cell in cells)
            ways = ", ".join(dict.fromkeys(cell["way"] for cell in cells))
            what = f"{engine}, {start.family}, {start.dtype}, {ways}"
            say(f"{what}: {exact} of {len(cells)} cells exact {failure}")
    return rows + [row for refused in refusals for row in refused]


def say(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def prepared(
    family: str, dtype: str, folder: Path, arguments: argparse.Namespace
) -> tuple[FrozenLM, list[Group]]:
    """The model and its prompts; they are made once and used for all engines."""
    if (family, dtype) not in PREPARED:
        lm = lm_of(family, dtype, folder)
        PREPARED[family, dtype] = lm, groups_of(family, lm, arguments.vectors, arguments.work)
    return PREPARED[family, dtype]


def planned_start(
    family: str,
    dtype: str,
    lm: FrozenLM,
    groups: list[Group],
    settings: dict[str, Any],
    ways: list[str],
    folder: Path,
) -> Start:
    """The cells, prompts and batches of one start of an engine."""
    chosen = [g for g in groups if g.rule == "use" or not settings.get("chat")]
    sizes = [len(group.prompts) for group in chosen]
    plain_numbers = list(
        range(sum(sizes), sum(sizes) + len(plain_prompts(lm, {g.K for g in chosen})))
    )
    cells, batches, first = [], [], 0
    for group, size in zip(chosen, sizes, strict=True):
        indices = list(range(first, first := first + size))
        for way in ways:
            new_batches = batches_of(way, indices, plain_numbers)
            cells.append(
                (group, way, indices, slice(len(batches), len(batches) + len(new_batches)))
            )
            batches += new_batches
    return Start(family, dtype, lm, chosen, cells, batches, folder)


def write(start: Start, model: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write the request of one start; with `resume`, an answer to an equal request is kept."""
    path = start.folder / "request.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    prompts = [prompt for group in start.groups for prompt in group.prompts]
    prompts += plain_prompts(start.lm, {group.K for group in start.groups})
    start.folder.mkdir(exist_ok=True)
    write_request(start.folder, model, start.dtype, prompts, start.batches, settings=settings)
    if not resume or before | {"model": ""} != json.loads(path.read_text()) | {"model": ""}:
        (start.folder / "answer.json").unlink(missing_ok=True)


def answers(
    engine: str, python: str, starts: list[Start]
) -> Iterator[tuple[Start, Answer | None, str]]:
    """Each start with its answer, or with the reason of its failure.

    After a failure the engine is started again for the starts that are left.
    """
    answered_before = [start for start in starts if (start.folder / "answer.json").is_file()]
    yield from ((start, answer_in(start.folder), "") for start in answered_before)
    unanswered = [start for start in starts if start not in answered_before]
    while unanswered:
        failure = ""
        try:
            start_engine(engine, python, *(start.folder for start in unanswered))
        except MemvecError as error:
            failure = str(error)
        answered = [start for start in unanswered if (start.folder / "answer.json").is_file()]
        yield from ((start, answer_in(start.folder), "") for start in answered)
        if failure:
            yield unanswered[len(answered)], None, failure
        unanswered = unanswered[len(answered) + bool(failure) :]


def cells_of(engine: str, start: Start, answer: Answer | None, why: str) -> list[dict[str, Any]]:
    """The cells of one start of an engine."""
    cells = []
    for group, way, indices, batch_slice in start.cells:
        row = {"engine": engine, "model": start.family, "dtype": start.dtype}
        row |= {"K": group.K, "rule": group.rule, "way": way, "passages": len(indices)}
        row |= {"eos": group.eos, "exact": 0, "why": why, "errors": []}
        row |= {"version": answer.version if answer else "", "leads": group.leads}
        if answer is not None:
            ids, batches = answer.ids[batch_slice], start.batches[batch_slice]
            row["exact"], row["errors"] = compared(start.lm, group, indices, batches, ids)
        cells.append(row)
    return cells


def compared(
    lm: FrozenLM,
    group: Group,
    indices: list[int],
    batches: list[list[int]],
    ids: list[list[list[int]]],
) -> tuple[int, list[str]]:
    """(number of passages that are exact every time, a sentence on each of the others)."""
    answers_of: dict[int, list[list[int]]] = {}
    for batch, rows in zip(batches, ids, strict=True):
        for i, row in zip(batch, rows, strict=True):
            answers_of.setdefault(i, []).append(row)
    sentences = []
    for number, i in enumerate(indices):
        first_ids = group.begins[number]
        wrong_answers = [
            row for row in answers_of[i] if ids_hash(first_ids + row) != group.hashes[number]
        ]
        if wrong_answers:
            sentences.append(difference(lm, group, number, wrong_answers[0]))
    return len(indices) - len(sentences), sentences


def difference(lm: FrozenLM, group: Group, number: int, row: list[int]) -> str:
    """At which token an answer is wrong, and the lead of the right token in memvec's own pass."""
    prompt = group.prompts[number]
    parts = [prompt.vectors, prompt.embedded]
    inputs = torch.cat([p for p in parts if p is not None]).to(lm.dtype)[None]
    right = decode_ids(lm, inputs, [prompt.new_tokens])[0]
    position = first_error(row, right) or 0
    lead_of_right = lead(lm, prompt, right[: position + 1], row[position])
    return f"passage {number}, token {position}: the right token leads by {lead_of_right:.3f}"


def keep(new: list[dict[str, Any]], path: Path) -> None:
    """Write cells to the file; they replace those of the same engine, model, dtype and K."""

    def start_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
        return row["engine"], row["model"], row["dtype"], row["K"]

    replaced_starts, models = {start_of(row) for row in new}, [*FAMILIES, "pocket"]
    rows = [row for row in kept_in(path) if start_of(row) not in replaced_starts] + new
    rows.sort(
        key=lambda row: (
            list(WAYS).index(row["engine"]),
            models.index(row["model"]),
            row["dtype"] != "float32",
        )
    )
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(rows, indent=1))
    unfinished.replace(path)


def kept_in(path: Path) -> list[dict[str, Any]]:
    """The cells in the file of all starts so far."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def main() -> None:
    """Run the named engines, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of vectors, answers and cells"
    )
    parser.add_argument("--environments", type=Path, help="folder of the engines' environments")
    parser.add_argument(
        "--engines", nargs="*", default=list(WAYS), choices=list(WAYS), help="default: all"
    )
    families, dtypes = [*FAMILIES, "pocket"], ["float32", "bfloat16"]
    parser.add_argument(
        "--families", nargs="+", default=families, choices=families, help="models; default: all"
    )
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes, help="default: both")
    parser.add_argument(
        "--vectors",
        nargs="+",
        type=int,
        default=list(LENGTHS),
        choices=list(LENGTHS),
        help="numbers K; default: all",
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="file to write; default: docs/engines.md"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the answers to earlier requests"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "cells.json"
    for engine in arguments.engines:
        name = ENVIRONMENT[engine]
        python = sys.executable
        if name is not None:
            python = str((arguments.environments or Path()) / name / "bin" / "python")
            if not Path(python).is_file():
                print(f"{engine}: not run, there is no {python}", file=sys.stderr)
                continue
        keep(run(engine, python, arguments), kept)
    rows = kept_in(kept)
    planned = {name: [way for _, ways in starts for way in ways] for name, starts in WAYS.items()}
    arguments.page.write_text(page(rows, planned), encoding="utf-8")
    exact = sum(is_exact(row) for row in rows)
    print(f"{arguments.page}: {exact} of {len(rows)} cells exact", file=sys.stderr)
    if exact < MIN_EXACT * len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
