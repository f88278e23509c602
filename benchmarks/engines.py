"""Do inference engines give back what was crammed? Each is run for real; writes docs/engines.md.

python benchmarks/engines.py --work DIR --environments DIR [--engines vllm mlx ...]

A cell (a combination on the page) is one engine, model, dtype, K, start rule and way of asking: one
prompt at a time, sixteen together, those with plain prompts among them, and for vLLM the cache of
prefixes on, the server, and its chat. The passages are random tokens, and one of them holds the
model's EOS. A cell of rule 'use' has questions after usable vectors, and memvec's own answers. A
cell passes if the engine's greedy tokens of every passage hash to what was crammed.
`--environments` is a folder of virtual environments named after the engines; an engine without one
is listed as not run.

Vectors are crammed once and kept in `--work`, and so are the answers and the cells. The page is of
all cells that are there: engines and models may be run by several commands, one after the other or
side by side. `--resume` asks only for what has no answer yet, and `--engines` without a name for
nothing: it writes the page.
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
# engine -> the environment it runs in; None is memvec's own.
ENVIRONMENT = {
    "transformers": None,
    "peft": None,
    "vllm": "vllm",
    "vllm-server": "vllm",
    "llama.cpp": "llama.cpp",
    "mlx": "mlx",
}
PREPARED: dict[tuple[str, str], tuple[FrozenLM, list[Group]]] = {}
MIN_EXACT = 0.98  # share of exact cells below which this program fails
ALONE, TOGETHER, MIXED = "batch 1", "batch 16", "batch 16 and plain prompts"
CACHED, CHAT = "prefix cache on, each question sent twice", "chat"
CACHE = {"prefix_caching": True, "block_size": 32}
# engine -> settings of one start of it, and the ways that it is asked in then.
WAYS: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "transformers": [({}, [ALONE, TOGETHER, MIXED])],
    "peft": [({}, [ALONE])],  # an adapter holds the vectors of one passage
    "vllm": [({}, [ALONE, TOGETHER, MIXED]), (CACHE, [CACHED])],
    "vllm-server": [({"chat": True}, [CHAT]), ({}, [MIXED])],
    "llama.cpp": [({}, [ALONE, TOGETHER, MIXED])],
    "mlx": [({}, [ALONE])],  # generate_step takes one prompt
}


def batches_of(way: str, prompts: list[int], plain: list[int]) -> list[list[int]]:
    """The batches of prompts of one cell."""
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
    """Every cell of one engine, which runs in one process unless it fails."""
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
        for start, answer, why in answers(engine, python, starts):
            cells = cells_of(engine, start, answer, why)
            rows += cells
            exact = sum(is_exact(cell) for cell in cells)
            ways = ", ".join(dict.fromkeys(cell["way"] for cell in cells))
            about = f"{engine}, {start.family}, {start.dtype}, {ways}"
            say(f"{about}: {exact} of {len(cells)} cells exact {why}")
    return rows + [row for refused in refusals for row in refused]


def say(line: str) -> None:
    """Print a line for whoever waits."""
    print(line, file=sys.stderr, flush=True)


def prepared(
    family: str, dtype: str, folder: Path, arguments: argparse.Namespace
) -> tuple[FrozenLM, list[Group]]:
    """The model and its prompts, made once for all engines."""
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
    extra = list(range(sum(sizes), sum(sizes) + len(plain_prompts(lm, {g.K for g in chosen}))))
    cells, batches, at = [], [], 0
    for group, size in zip(chosen, sizes, strict=True):
        indices = list(range(at, at := at + size))
        for way in ways:
            more = batches_of(way, indices, extra)
            cells.append((group, way, indices, slice(len(batches), len(batches) + len(more))))
            batches += more
    return Start(family, dtype, lm, chosen, cells, batches, folder)


def write(start: Start, model: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write the request of one start; with `resume`, an answer to the same request stays there."""
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
    """The answer to each request, or why it failed; after a failure the engine starts again."""
    done = [one for one in starts if (one.folder / "answer.json").is_file()]
    yield from ((one, answer_in(one.folder), "") for one in done)
    left = [one for one in starts if one not in done]
    while left:
        why = ""
        try:
            start_engine(engine, python, *(one.folder for one in left))
        except MemvecError as error:
            why = str(error)
        answered = [one for one in left if (one.folder / "answer.json").is_file()]
        yield from ((one, answer_in(one.folder), "") for one in answered)
        if why:
            yield left[len(answered)], None, why
        left = left[len(answered) + bool(why) :]


def cells_of(engine: str, start: Start, answer: Answer | None, why: str) -> list[dict[str, Any]]:
    """The cells of one start of an engine."""
    out = []
    for group, way, indices, which in start.cells:
        row = {"engine": engine, "model": start.family, "dtype": start.dtype}
        row |= {"K": group.K, "rule": group.rule, "way": way, "passages": len(indices)}
        row |= {"eos": group.eos, "exact": 0, "why": why, "errors": []}
        row |= {"version": answer.version if answer else "", "leads": group.leads}
        if answer is not None:
            ids, batches = answer.ids[which], start.batches[which]
            row["exact"], row["errors"] = compared(start.lm, group, indices, batches, ids)
        out.append(row)
    return out


def compared(
    lm: FrozenLM,
    group: Group,
    indices: list[int],
    batches: list[list[int]],
    ids: list[list[list[int]]],
) -> tuple[int, list[str]]:
    """Passages that are exact each time they were asked for, and a sentence on each other one."""
    given: dict[int, list[list[int]]] = {}
    for batch, rows in zip(batches, ids, strict=True):
        for i, row in zip(batch, rows, strict=True):
            given.setdefault(i, []).append(row)
    wrong = []
    for at, i in enumerate(indices):
        begins = group.begins[at]
        bad = [row for row in given[i] if ids_hash(begins + row) != group.hashes[at]]
        if bad:
            wrong.append(difference(lm, group, at, bad[0]))
    return len(indices) - len(wrong), wrong


def difference(lm: FrozenLM, group: Group, at: int, row: list[int]) -> str:
    """Where an answer goes wrong, and by how much the right token leads in memvec's own pass."""
    prompt = group.prompts[at]
    parts = [prompt.vectors, prompt.embedded]
    inputs = torch.cat([p for p in parts if p is not None]).to(lm.dtype)[None]
    right = decode_ids(lm, inputs, [prompt.new_tokens])[0]
    first = first_error(row, right) or 0
    by = lead(lm, prompt, right[: first + 1], row[first])
    return f"passage {at}, token {first}: the right token leads by {by:.3f}"


def keep(new: list[dict[str, Any]], path: Path) -> None:
    """Put cells in the place of those of the same engine, model, dtype and K, beside all others."""

    def start_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
        return row["engine"], row["model"], row["dtype"], row["K"]

    replaced, models = {start_of(row) for row in new}, [*FAMILIES, "pocket"]
    rows = [row for row in kept_in(path) if start_of(row) not in replaced] + new
    rows.sort(
        key=lambda row: (
            list(WAYS).index(row["engine"]),
            models.index(row["model"]),
            row["dtype"] != "float32",
        )
    )
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(rows, indent=1))
    aside.replace(path)


def kept_in(path: Path) -> list[dict[str, Any]]:
    """The cells of every start so far."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def main() -> None:
    """Run the engines that were named, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="vectors and cells, kept")
    parser.add_argument("--environments", type=Path, help="folder of environments")
    parser.add_argument("--engines", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, "pocket"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--vectors", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--resume", action="store_true", help="keep the answers of earlier starts")
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
