"""Do inference engines give back what was crammed? Each is run for real; writes docs/engines.md.

python benchmarks/engines.py --work DIR [--engine transformers=PYTHON --engine mlx=PYTHON ...]

A cell is one model, dtype, K, start rule and way of asking (batches of 1 and 16; for vLLM also the
prefix cache on). Its passages are random tokens and one of them holds the model's EOS. A cell
passes if the engine's greedy tokens of every passage hash to what was crammed. Vectors are crammed
once and kept in DIR. PYTHON is the interpreter of the engine's own environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.engines import decode_with
from memvec.environment import environment
from memvec.errors import MemvecError
from memvec.header import DocumentRecord, Header, PassageRecord
from memvec.loading import POCKET, load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage, ids_hash
from memvec.storage import STORAGES
from memvec.vectors import MemVectors

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
V, EOS = 64, 1
LENGTHS = {1: 3, 2: 5, 8: 10}  # tokens of a passage, by K
PASSAGES = 16
RULES = ("vectors", "bos", "first-token")
# Heads of 32: vLLM's CPU kernels know none that are smaller.
SHAPE = {
    "vocab_size": V,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
FAMILIES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
FAMILIES |= {"smollm3": "SmolLM3Config"}
NOTES = """
## What makes decoding exact

- mlx-lm 0.32: transformers 5 writes the base of the rotary embedding inside `rope_parameters`, and
  mlx-lm's code for Qwen 2 and SmolLM 3 reads `rope_theta` beside it; without that name it takes its
  own default silently. So 79 of 96 passages came back with Qwen 2 and 74 of 95 with SmolLM 3 here
  before memvec's runner passed the base on, and all of them since. In your own code:
  `load_model(folder, model_config={"rope_theta": ...})`.
- mlx-lm takes `input_embeddings` for some model types only; others (OLMo 2, GPT-2, GPT-NeoX) are
  refused before it starts.
- vLLM loads every `.safetensors` file of a model's folder: one that also holds
  `encoder.safetensors`, as the built-in model does, fails to load there.

## What the table is of

- Only passages that memvec itself certified are asked for: those that were not exact after 400
  steps (800 for llama) are left out: two of 144 for llama, one of 96 for smollm3, no other.
- The table joins one run of each model; the cells of mlx-lm for qwen2 and smollm3 are a second run,
  with the base passed on. K = 8 was run for llama only, in float32.

## Not run

- bfloat16, the built-in model, batches mixed with plain prompts, and vectors for use.

- vLLM: its runner is written (`--engine vllm`), and no cell of it has been decoded yet.
- llama.cpp: its Python package has to be built from source, and was not built yet.
- SGLang: no CPU build was tried; its request format follows its sources ([Export](interop.md)).
- PEFT runs in the tests and in [Export](interop.md), not in this table.
"""


def folder_of(family: str, work: Path) -> Path:
    """A folder with a tiny random model of a family, or the built-in model's own."""
    if family == "pocket":
        return POCKET
    folder = work / f"tiny-{family}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = getattr(transformers, FAMILIES[family])(**SHAPE)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2:  # large: a vector must move the logits
                    weight.normal_(0, 0.2 if "embed" in name else 0.3)
        model.save_pretrained(folder)
    return folder


def lm_of(family: str, dtype: str, folder: Path) -> FrozenLM:
    """The model in a dtype."""
    if family == "pocket":
        return load_lm("pocket", dtype=dtype, device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return FrozenLM(model.eval(), name=f"tiny-{family}")


def passages_of(K: int) -> list[Passage]:
    """Random passages; the first holds the model's EOS."""
    generator = torch.Generator().manual_seed(K)
    asked = []
    for i in range(PASSAGES):
        ids = torch.randint(2, V, (LENGTHS[K],), generator=generator).tolist()
        if i == 0:
            ids[len(ids) // 2] = EOS
        asked.append(Passage(tuple(ids), i))
    return asked


def crammed(lm: FrozenLM, K: int, rule: str, path: Path) -> MemVectors:
    """Exact vectors of random passages, one with an EOS; those that stay inexact are left out."""
    if path.is_file():
        return MemVectors.load(path)
    dtype = str(lm.dtype).removeprefix("torch.")
    recipe = Recipe.of(start_rule=rule, steps=400, patience=400)
    made = Engine(lm, recipe, vectors=K, storage=STORAGES[dtype], batch_size=PASSAGES)
    outcomes = sorted(made.run(passages_of(K)), key=lambda o: o.passage.document)
    kept = [o for o in outcomes if o.exact]
    records = [
        PassageRecord(
            **o.result.model_dump(),
            sha256=ids_hash(o.passage.ids),
            first=o.passage.ids[0] if rule == "first-token" else None,
        )
        for o in kept
    ]
    header = Header(
        model=lm.description(),
        start_rule=rule,
        recipe=recipe.record(),
        environment=environment(),
        documents=[
            DocumentRecord(
                name="ids", sha256=hashlib.sha256(b"").hexdigest(), size=1, passages=len(records)
            )
        ],
        passages=records,
    )
    mem = MemVectors(torch.stack([o.vectors for o in kept]), header)
    mem.save(path)
    return mem


def ways(engine: str) -> list[tuple[str, int, dict[str, Any]]]:
    """How an engine is asked: (name, batch, settings)."""
    found: list[tuple[str, int, dict[str, Any]]] = [("batch 1", 1, {})]
    if engine != "mlx":  # generate_step takes one prompt
        found.append(("batch 16", 16, {}))
    if engine == "vllm":
        found.append(("batch 16, prefix cache", 16, {"prefix_caching": True}))
    return found


def run(engine: str, python: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of one engine."""
    rows: list[dict[str, Any]] = []
    for family in arguments.families:
        folder = folder_of(family, arguments.work)
        for dtype in arguments.dtypes:
            lm = lm_of(family, dtype, folder)
            for K in arguments.vectors:
                for rule in RULES:
                    mem = crammed(lm, K, rule, arguments.work / f"{family}-{dtype}-{K}-{rule}.mem")
                    for way, batch, settings in ways(engine):
                        cell = {"engine": engine, "model": family, "dtype": dtype, "K": K}
                        cell |= {"rule": rule, "way": way, "passages": len(mem.passages)}
                        with_eos = ids_hash(passages_of(K)[0].ids)
                        cell |= {"eos": with_eos in [p.sha256 for p in mem.passages]}
                        try:
                            version, ids = decode_with(
                                engine,
                                mem,
                                lm,
                                model=folder,
                                python=python,
                                batch=batch,
                                settings=settings,
                            )
                            good = [
                                ids_hash(row) == p.sha256
                                for row, p in zip(ids, mem.passages, strict=True)
                            ]
                            cell |= {"version": version, "exact": sum(good), "why": ""}
                        except MemvecError as error:
                            cell |= {"version": "", "exact": 0, "why": str(error)}
                        rows.append(cell)
                        print(json.dumps(cell), file=sys.stderr, flush=True)
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """docs/engines.md from the cells."""
    lines = [
        "# Engines",
        "",
        "Written by `python benchmarks/engines.py`: each engine ran in its own environment, on the",
        "CPU, greedily, and its token ids were compared with the hashes of what was crammed. A",
        "cell is one model, dtype, number of vectors (1, 2, 8), start rule and way of asking.",
        "*Refused or failed*: the engine generated nothing, and the reason is below.",
        f"A passage with the model's EOS is in {sum(r['eos'] for r in rows)} of {len(rows)} cells.",
        "",
        "| engine | model | dtype | way | cells | exact | refused or failed | passages exact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    named = {row["engine"]: row["version"] for row in rows if row["version"]}
    for row in rows:
        key = (named.get(row["engine"], row["engine"]), row["model"], row["dtype"], row["way"])
        groups.setdefault(key, []).append(row)
    for key, own in groups.items():
        ran = [row for row in own if not row["why"]]
        exact = sum(row["exact"] == row["passages"] for row in ran)
        passages = f"{sum(r['exact'] for r in ran)} of {sum(r['passages'] for r in ran)}"
        lines.append(
            f"| {' | '.join(key)} | {len(own)} | {exact} | {len(own) - len(ran)} | {passages} |"
        )
    wrong = [row for row in rows if row["why"] or row["exact"] < row["passages"]]
    if wrong:
        lines += ["", "## Cells that are not exact", ""]
        seen: dict[str, int] = {}
        for row in wrong:
            what = f"{row['engine']}, {row['model']}, {row['dtype']}, {row['way']}: "
            what += row["why"] or (
                f"K = {row['K']}, start rule {row['rule']}: "
                f"{row['exact']} of {row['passages']} passages"
            )
            seen[what] = seen.get(what, 0) + 1
        lines += [f"- {what}" + (f" ({n} cells)" if n > 1 else "") for what, n in seen.items()]
    return "\n".join(lines) + "\n" + NOTES


def main() -> None:
    """Run the engines that were named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, "pocket"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--vectors", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "cells.json"
    rows = json.loads(kept.read_text()) if kept.is_file() else []
    for one in arguments.engine or [f"transformers={sys.executable}"]:
        engine, _, python = one.partition("=")
        rows = [row for row in rows if row["engine"] != engine]
        rows += run(engine, python or sys.executable, arguments)
        kept.write_text(json.dumps(rows, indent=1))
    arguments.page.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
