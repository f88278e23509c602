"""Train several candidates for the built-in model in one run, and measure them side by side.

    python recipes/candidates.py --device cuda                    # all of candidates.toml
    python recipes/candidates.py --only narrow --scale 0.1        # one, a tenth of the batch
    python recipes/candidates.py --measure-only                   # what is trained so far

Notable:
- each candidate is a run of `pocket.py` with other fields, in a folder of its own under --work; one
  that is finished is not trained again, one that was stopped goes on, and one that was made or
  measured with other options is refused;
- measured on held-out novels: valid loss, and the horizon of cramming with one and four vectors
  under memvec's default recipe at a fixed number of steps (`evaluate.py`), in tokens and text bits
  (those that the model alone needs for what comes back), also per dimension; what 24 tokens tell
  about the next 48; passages that the encoder gives back;
- --minutes ends every candidate's training after so long, with the learning rate decayed by then:
  equal time instead of equal steps. The first step, which compiles, is not counted: on a GPU it
  takes one to two minutes;
- `same_as` in a table takes over the fields of another one.

Writes candidates.jsonl and candidates.md into --work.
"""

import argparse
import dataclasses
import json
import tomllib
from pathlib import Path

import torch

import pocket
from corpus import prepare
from decoder import Shape
from environment import in_environment
from evaluate import context_gain, horizon, longest, one_pass
from export import export
from kept import refuse_others, write

FIELDS = {f.name for kind in (pocket.Recipe, Shape) for f in dataclasses.fields(kind)}
# (K, tokens) at which the one-pass encoder is measured.
ONE_PASS = ((1, 8), (1, 16), (1, 24), (1, 32), (4, 32), (4, 64))
SCALED = ("trunk_tokens", "text_tokens", "memory_tokens")


def read(path: Path, scale: float, minutes: float) -> dict[str, dict]:
    """Every candidate's fields, with those of [base] and of the one that it is the same as."""
    tables = tomllib.loads(path.read_text())
    base = tables.pop("base", {})

    def whole(name: str) -> dict:
        table = tables[name]
        like = whole(table["same_as"]) if "same_as" in table else {}
        return {**like, **{key: value for key, value in table.items() if key != "same_as"}}

    candidates = {}
    for name in tables:
        fields = {**base, **whole(name)}
        unknown = fields.keys() - FIELDS - {"memory"}
        if unknown:
            raise SystemExit(f"{path.name}: [{name}] has no field '{min(unknown)}'")
        if minutes:
            fields["minutes"] = minutes
        for key in SCALED:
            # at least one crop of 512 tokens
            fields[key] = max(512, round(fields.get(key, getattr(pocket.Recipe, key)) * scale))
        candidates[name] = fields
    return candidates


def make(fields: dict, device: str) -> tuple[pocket.Run, bool]:
    """The run of a candidate, and whether it has the memory task."""
    parts = [
        kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})
        for kind in (pocket.Recipe, Shape)
    ]
    return pocket.Run(*parts, device), fields.get("memory", True)


def made_with(fields: dict) -> dict:
    """Every field of a candidate that its model depends on, the defaults among them."""
    whole = {"memory": True}
    for kind in (pocket.Recipe, Shape):
        whole |= {f.name: f.default for f in dataclasses.fields(kind)}
    whole |= fields
    return {name: whole[name] for name in whole if name not in ("checkpoint_every", "log_every")}


def train(name: str, fields: dict, args, streams, tokenizer) -> Path:
    """The folder of the trained candidate; trains it if it is not there yet."""
    work = args.work / name
    out = work / "model"
    record = work / "made_with.json"
    if (out / "model.safetensors").exists():
        made = json.loads(record.read_text()) if record.exists() else {}
        refuse_others(str(work), made, made_with(fields), f"use another --work, or delete {work}")
        return out
    work.mkdir(parents=True, exist_ok=True)
    run, memory = make(fields, args.device)
    if (work / f"{name}.pt").exists():
        run.load(work / f"{name}.pt")
    with run.graphs.own_stream():
        pocket.train(run, streams, work, name, memory)
    export(run, tokenizer, out)
    if not memory:
        (out / "encoder.safetensors").unlink()  # never trained
    write(record, made_with(fields))
    return out


def measure(name: str, folder: Path, fields: dict, args, streams) -> list[dict]:
    """Rows of the table: one per number of vectors."""
    from memvec import load_lm
    from memvec.cramming.recipe import Recipe

    lm = load_lm(str(folder), device=args.device, dtype="float32")
    run, _ = make(fields, args.device)
    run.load(folder.parent / f"{name}.pt")
    loss = pocket.valid_loss(run, streams["valid"])
    recipe = Recipe.of(steps=args.cram_steps, start="auto")
    shared = {
        "candidate": name,
        "valid": round(loss, 4),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "train_seconds": round(run.seconds, 1),
        "steps_trained": run.step,
        "tokens": run.tokens,
        "context_gain": context_gain(lm, streams["valid"], 24, 48, 512)["nats_per_token"],
        "one_pass": [
            one_pass(lm, streams["valid"], K, T, 128)["passages_exact"][0]
            for K, T in ONE_PASS
            if lm.encoder is not None
        ],
    }
    rows = []
    for K in args.vectors:
        row = horizon(lm, streams["valid"], K, longest(lm, K), args.passages, recipe)
        bits = [round(b / lm.width, 3) for b in row["bits_per_vector"]]
        rows.append({**shared, **row, "bits_per_dimension": bits})
    return rows


def refuse_other_rows(path: Path, args) -> None:
    """End the program if rows were measured with other options: the table is of all of them."""
    remedy = f"give these options, or delete {path} to measure again"
    rows = json.loads(path.read_text())
    asked = {"steps": args.cram_steps, "n": args.passages}
    for row in rows:
        refuse_others(str(path), row, asked, remedy)
    made = {"vectors": sorted({row["K"] for row in rows})}
    refuse_others(str(path), made, {"vectors": sorted(set(args.vectors))}, remedy)


def table(rows: list[dict]) -> str:
    """The rows in Markdown, best first."""
    lines = [
        "| candidate | parameters | minutes | text, M | valid loss | context gain "
        f"| one pass exact {ONE_PASS} | K | n | tokens per vector | text bits per dimension |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: -r["bits_per_dimension"][0]):
        tokens, bits = (
            "{} [{}, {}]".format(*row[key]) for key in ("tokens_per_vector", "bits_per_dimension")
        )
        lines.append(
            f"| {row['candidate']} | {row['parameters'] / 1e6:.1f} M "
            f"| {row['train_seconds'] / 60:.1f} | {row['tokens']['text'] / 1e6:.1f} "
            f"| {row['valid']:.3f} | {row['context_gain'][0]} | {row['one_pass']} "
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
    parser.add_argument("--corpus", type=Path, default=Path("novels.parquet"))
    parser.add_argument("--work", type=Path, default=root / ".runs" / program.stem)
    parser.add_argument("--only", nargs="*", help="names of tables in --spec; default: all")
    parser.add_argument("--passages", type=int, default=16)
    return parser


def chosen_names(args, known) -> list[str]:
    """The names in --only, or all known ones; ends the program if --spec lacks one."""
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

    candidates = read(args.spec, args.scale, args.minutes)
    names = chosen_names(args, candidates)
    tokenizer, streams = prepare(args.corpus, args.work, Shape.vocab_size)
    for path in sorted(args.work.glob("*/measured.json")):
        refuse_other_rows(path, args)
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
    in_environment()
    main()
