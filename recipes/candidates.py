"""Train several candidates for the built-in model in one run, and measure them side by side.

    python recipes/candidates.py --device cuda                    # all of candidates.toml
    python recipes/candidates.py --only narrow --scale 0.1        # one, a tenth of the batch
    python recipes/candidates.py --measure-only                   # what is trained so far

Notable:
- each candidate is a run of `pocket.py` with other fields, in a folder of its own under --work; one
  that is finished is not trained again, one that was stopped goes on;
- measured on held-out novels: valid loss, and the horizon of cramming with one and four vectors
  under memvec's default recipe at a fixed number of steps (`evaluate.py`), in tokens, bits, and
  bits per dimension;
- --minutes stops every candidate's training after so long, with the learning rate decayed by then:
  equal compute instead of equal steps.

Writes candidates.jsonl and candidates.md into --work.
"""

import argparse
import dataclasses
import json
import time
import tomllib
from pathlib import Path

import torch

import pocket  # first: it sets the environment that libraries read when they load
from corpus import prepare
from decoder import Shape
from evaluate import horizon
from export import export

FIELDS = {f.name for kind in (pocket.Recipe, Shape) for f in dataclasses.fields(kind)}
SCALED = ("trunk_tokens", "text_tokens", "memory_tokens")


def read(path: Path, scale: float) -> dict[str, dict]:
    """Every candidate's fields, with those of [base] and of the candidate it is a twin of."""
    tables = tomllib.loads(path.read_text())
    base = tables.pop("base", {})
    found = {}
    for name, table in tables.items():
        model = tables[table["twin_of"]] | {"memory": False} if "twin_of" in table else {}
        fields = {**base, **model, **table}
        fields.pop("twin_of", None)
        unknown = fields.keys() - FIELDS - {"memory"}
        if unknown:
            raise SystemExit(f"{path.name}: [{name}] has no field '{min(unknown)}'")
        for key in SCALED:
            # at least one crop of 512 tokens
            fields[key] = max(512, round(fields.get(key, getattr(pocket.Recipe, key)) * scale))
        found[name] = fields
    return found


def make(fields: dict, device: str) -> tuple[pocket.Run, bool]:
    """The run of a candidate, and whether it has the memory task."""
    parts = [
        kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})
        for kind in (pocket.Recipe, Shape)
    ]
    return pocket.Run(*parts, device), fields.get("memory", True)


def train(name: str, fields: dict, args, streams, tokenizer) -> Path:
    """The folder of the trained candidate; trains it if it is not there yet."""
    work = args.work / name
    out = work / "model"
    if (out / "model.safetensors").exists():
        return out
    work.mkdir(parents=True, exist_ok=True)
    run, memory = make(fields, args.device)
    if (work / f"{name}.pt").exists():
        run.load(work / f"{name}.pt")
    elif args.minutes:
        run = fitted(run, memory, args, fields, streams)
    pocket.train(run, streams, work, name, memory)
    export(run, tokenizer, out)
    if not memory:
        (out / "encoder.safetensors").unlink()  # never trained
    return out


def fitted(run: pocket.Run, memory: bool, args, fields: dict, streams) -> pocket.Run:
    """A run with as many steps as --minutes allow, the decay included, timed on a few of them."""
    for step in (0, run.recipe.trunk_steps):  # both kinds of step; the first ones also compile
        run.step = step
        for _ in range(3):
            run.train_step(streams["train"], memory)
    began, n = time.monotonic(), 5
    for _ in range(n):
        run.train_step(streams["train"], memory)
    steps = max(50, round(60 * args.minutes / ((time.monotonic() - began) / n)))
    shrink = steps / run.recipe.steps
    planned = {
        "steps": steps,
        "trunk_steps": round(run.recipe.trunk_steps * shrink),
        "wide_from": round(run.recipe.wide_from * shrink),
    }
    return make(fields | planned, args.device)[0]


def measure(name: str, folder: Path, fields: dict, args, streams) -> list[dict]:
    """Rows of the table: one per number of vectors."""
    from memvec import load_lm
    from memvec.cramming.recipe import Recipe

    lm = load_lm(str(folder), device=args.device, dtype="float32")
    run, _ = make(fields, args.device)
    run.load(folder.parent / f"{name}.pt")
    loss = pocket.valid_loss(run, streams["valid"])
    recipe = Recipe.of(steps=args.cram_steps, start="noise")
    rows = []
    for K in args.vectors:
        row = horizon(lm, streams["valid"], K, min(160 * K, 448), args.passages, recipe)
        rows.append(
            {
                "candidate": name,
                "valid": round(loss, 4),
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "train_seconds": round(run.seconds, 1),
                "tokens": run.tokens,
                **row,
                "bits_per_dimension": [round(b / lm.width, 3) for b in row["bits_per_vector"]],
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows in Markdown, best first."""
    lines = [
        "| candidate | parameters | minutes | valid loss | K | n | tokens per vector "
        "| bits per dimension |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: -r["bits_per_dimension"][0]):
        tokens, bits = (
            "{} [{}, {}]".format(*row[key]) for key in ("tokens_per_vector", "bits_per_dimension")
        )
        lines.append(
            f"| {row['candidate']} | {row['parameters'] / 1e6:.1f} M "
            f"| {row['train_seconds'] / 60:.0f} | {row['valid']:.3f} "
            f"| {row['K']} | {row['n']} | {tokens} | {bits} |"
        )
    return "\n".join(lines) + "\n"


def arguments(description: str, program: Path) -> argparse.ArgumentParser:
    """A parser with the flags of every program that trains the models of a .toml beside it."""
    root = program.resolve().parents[1]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec", type=Path, default=program.with_suffix(".toml"))
    parser.add_argument("--corpus", type=Path, default=root.parent / "shared/corpus/novels.parquet")
    parser.add_argument("--work", type=Path, default=root / ".runs" / program.stem)
    parser.add_argument("--only", nargs="*", help="names of tables in --spec; default: all")
    parser.add_argument("--passages", type=int, default=16)
    return parser


def asked(args, known) -> list[str]:
    """The names that --only gives, or all; ends the program at one that --spec does not have."""
    if unknown := set(args.only or ()) - set(known):
        raise SystemExit(f"--only {min(unknown)}: {args.spec.name} has {', '.join(known)}")
    return args.only or list(known)


def main():
    """Train and measure what the command line asks for."""
    parser = arguments(__doc__, Path(__file__))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of a step")
    parser.add_argument("--minutes", type=float, default=0.0, help="of training, each; 0: [base]")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--cram-steps", type=int, default=400)
    args = parser.parse_args()

    candidates = read(args.spec, args.scale)
    names = asked(args, candidates)
    tokenizer, streams = prepare(args.corpus, args.work, Shape.vocab_size)
    for name in names:
        folder = args.work / name / "model"
        if not args.measure_only:
            folder = train(name, candidates[name], args, streams, tokenizer)
        done = args.work / name / "measured.json"
        if (folder / "model.safetensors").exists() and not done.exists():
            rows = measure(name, folder, candidates[name], args, streams)
            done.write_text(json.dumps(rows, indent=1))
            print(table(rows), flush=True)
    rows = [
        row
        for path in sorted(args.work.glob("*/measured.json"))
        for row in json.loads(path.read_text())
    ]
    (args.work / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.work / "candidates.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    pocket.in_environment()
    main()
