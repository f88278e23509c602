"""Do inference engines give back what was crammed? Each is run for real; writes docs/engines.md.

python benchmarks/engines.py --work DIR --environments DIR [--engines vllm mlx ...]

A cell is one engine, model, dtype, K, start rule and way of asking: one prompt at a time, sixteen
together, those with plain prompts among them, and for vLLM the cache of prefixes on, the server,
and its chat. The passages are random tokens, and one of them holds the model's EOS. A cell of rule
'use' has questions behind vectors for use, and memvec's own answers. A cell passes if the engine's
greedy tokens of every passage hash to what was crammed. `--environments` is a folder of virtual
environments named after the engines; an engine without one is listed as not run. Vectors are
crammed once and kept in `--work`, and so are the cells.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
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
from engines_page import page
from memvec.decoding import decode_ids
from memvec.engines import Prompt, run_engine
from memvec.engines.run import refuse_model
from memvec.errors import MemvecError
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
ALONE, TOGETHER, MIXED = "batch 1", "batch 16", "batch 16 and plain prompts"
CACHED, CHAT = "prefix cache on, asked twice", "chat"
CACHE = {"prefix_caching": True, "block_size": 32}
# engine -> settings of one start of it, and the ways that it is asked in then.
WAYS: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "transformers": [({}, [ALONE, TOGETHER, MIXED])],
    "peft": [({}, [ALONE])],  # an adapter holds the vectors of one passage
    "vllm": [({}, [ALONE, TOGETHER, MIXED]), (CACHE, [CACHED])],
    "vllm-server": [({}, [MIXED]), ({"chat": True}, [CHAT])],
    "llama.cpp": [({}, [ALONE, TOGETHER, MIXED])],
    "mlx": [({}, [ALONE])],  # generate_step takes one prompt
}


def batches_of(way: str, own: list[int], plain: list[int]) -> list[list[int]]:
    """The batches of prompts of one cell."""
    if way == ALONE:
        return [[i] for i in own]
    if way == MIXED:
        return [[*own[:8], *plain, *own[8:]]]
    return [own, own] if way == CACHED else [own]


def run(engine: str, python: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of one engine."""
    rows: list[dict[str, Any]] = []
    for family in arguments.families:
        folder = folder_of(family, arguments.work)
        for dtype in arguments.dtypes:
            lm = lm_of(family, dtype, folder)
            groups = groups_of(family, lm, arguments.vectors, arguments.work)
            for settings, ways in WAYS[engine]:
                if settings.get("chat") and family != "pocket":
                    continue  # the tiny models have no tokenizer
                about = {"engine": engine, "model": family, "dtype": dtype}
                started = time.perf_counter()
                cells = ask(engine, python, lm, folder, dtype, groups, settings, ways)
                rows += [about | cell for cell in cells]
                exact = sum(cell["exact"] == cell["passages"] for cell in cells)
                print(
                    f"{engine}, {family}, {dtype}, {', '.join(ways)}: {exact} of {len(cells)} "
                    f"cells exact ({time.perf_counter() - started:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
                for why in {cell["why"] for cell in cells if cell["why"]}:
                    print(f"  {why}", file=sys.stderr, flush=True)
    return rows


def ask(
    engine: str,
    python: str,
    lm: Any,
    folder: Path,
    dtype: str,
    groups: list[Group],
    settings: dict[str, Any],
    ways: list[str],
) -> list[dict[str, Any]]:
    """The cells of one start of an engine."""
    own = [g for g in groups if g.rule == "use" or not settings.get("chat")]
    prompts: list[Prompt] = [p for group in own for p in group.prompts]
    at = 0
    ranges = []
    for group in own:
        ranges.append(list(range(at, at := at + len(group.prompts))))
    plain = plain_prompts(lm, {group.K for group in own})
    prompts += plain
    extra = list(range(at, len(prompts)))
    cells, batches = [], []
    for group, indices in zip(own, ranges, strict=True):
        for way in ways:
            asked = batches_of(way, indices, extra)
            cells.append((group, way, indices, len(batches), len(batches) + len(asked)))
            batches += asked
    version, why, ids = "", "", []
    try:
        refuse_model(engine, lm)
        answer = run_engine(
            engine, python, folder, dtype, prompts, batches=batches, settings=settings
        )
        version, ids = answer.version, answer.ids
    except MemvecError as error:
        why = str(error)
    out = []
    for group, way, indices, first, last in cells:
        row = {"K": group.K, "rule": group.rule, "way": way, "passages": len(indices)}
        row |= {"eos": group.eos, "version": version, "exact": 0, "why": why, "errors": []}
        row |= {"leads": [round(one, 3) for one in group.leads]}
        if not why:
            right, row["errors"] = compared(
                lm, group, indices, batches[first:last], ids[first:last]
            )
            row["exact"] = right
        out.append(row)
    return out


def compared(
    lm: Any, group: Group, indices: list[int], batches: list[list[int]], ids: list[list[list[int]]]
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


def difference(lm: Any, group: Group, at: int, row: list[int]) -> str:
    """Where an answer goes wrong, and by how much the right token leads in memvec's own pass."""
    prompt = group.prompts[at]
    parts = [prompt.vectors, prompt.embedded]
    inputs = torch.cat([p for p in parts if p is not None]).to(lm.dtype)[None]
    right = decode_ids(lm, inputs, [prompt.new_tokens])[0]
    first = next((j for j, pair in enumerate(zip(row, right, strict=True)) if len({*pair}) > 1), 0)
    by = lead(lm, prompt, right[: first + 1], row[first])
    return f"passage {at}, token {first}: the right token leads by {by:.3f}"


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
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "cells.json"
    rows = json.loads(kept.read_text()) if kept.is_file() else []
    for engine in arguments.engines:
        name = ENVIRONMENT[engine]
        python = sys.executable
        if name is not None:
            python = str((arguments.environments or Path()) / name / "bin" / "python")
            if not Path(python).is_file():
                print(f"{engine}: not run, there is no {python}", file=sys.stderr)
                continue
        new = run(engine, python, arguments)
        asked = {(r["engine"], r["model"], r["dtype"]) for r in new}
        rows = [r for r in rows if (r["engine"], r["model"], r["dtype"]) not in asked] + new
        rows.sort(
            key=lambda r: (list(WAYS).index(r["engine"]), r["model"], r["dtype"] != "float32")
        )
        kept.write_text(json.dumps(rows, indent=1))
    arguments.page.write_text(page(rows, list(WAYS)), encoding="utf-8")


if __name__ == "__main__":
    main()
