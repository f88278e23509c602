"""Train several candidates for the built-in model, and measure all of them in the same way.

    python recipes/candidates.py --device cuda                    # all of candidates.toml
    python recipes/candidates.py --only narrow --scale 0.1        # one, with a tenth of the tokens
    python recipes/candidates.py --measure-only                   # what is trained so far

Notable:
- a candidate is a training run of `pocket.py` with other fields, in a folder of its own under
  --work. A finished one is not trained again, and a stopped one continues. The program ends if a
  candidate there was trained or measured with other options;
- each candidate is measured on held-out novels (`evaluate.py`): its loss in nats per token (`valid
  loss`); by how many nats per token 24 tokens of context lower the loss of the next 48 (`context
  gain`); the share of passages that the encoder alone gives back exactly; and the horizon of
  cramming with one and with four vectors by memvec's default recipe with a fixed number of steps,
  in tokens per vector and in text bits per dimension (text bits are what the model alone needs for
  these tokens). Brackets hold 95 % intervals over n passages;
- --minutes ends the training of each candidate after so many minutes, with the learning rate
  decayed by then, so that candidates have equal time instead of equal steps. The first step, which
  compiles, is not counted: on a GPU it takes one to two minutes;
- `same_as` in a table of --spec takes the fields of another table.

Writes candidates.jsonl and candidates.md into --work. docs/log.md has the times of earlier runs.
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
from memvec.cli.program import run_program
from memvec.errors import MemvecError

FIELDS = {f.name for kind in (pocket.Recipe, Shape) for f in dataclasses.fields(kind)}
# (K, tokens of a passage) at which the one-pass encoder is measured.
ONE_PASS = ((1, 8), (1, 16), (1, 24), (1, 32), (4, 32), (4, 64))
# Fields that --scale multiplies.
SCALED = ("trunk_tokens", "text_tokens", "memory_tokens")


def tables_of(path: Path) -> dict[str, dict]:
    """The tables of a TOML file. Raises MemvecError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MemvecError(f"--spec {path}: {error}; name a TOML file of training runs.") from None


def read(path: Path, scale: float, minutes: float) -> dict[str, dict]:
    """Name of each candidate → its fields, with those of [base] and of the table in `same_as`.

    `scale` multiplies the tokens of a step, and `minutes` replaces the field if it is not 0.
    """
    tables = tables_of(path)
    base = tables.pop("base", {})

    def fields_of(name: str) -> dict:
        if name not in tables:
            raise MemvecError(f"{path.name}: same_as = '{name}', but there is no [{name}].")
        table = tables[name]
        inherited = fields_of(table["same_as"]) if "same_as" in table else {}
        return {**inherited, **{key: value for key, value in table.items() if key != "same_as"}}

    candidates = {}
    for name in tables:
        fields = {**base, **fields_of(name)}
        unknown = fields.keys() - FIELDS - {"memory"}
        if unknown:
            raise MemvecError(f"{path.name}: [{name}] has no field '{min(unknown)}'.")
        if minutes:
            fields["minutes"] = minutes
        for key in SCALED:
            # at least one crop of 512 tokens
            fields[key] = max(512, round(fields.get(key, getattr(pocket.Recipe, key)) * scale))
        candidates[name] = fields
    return candidates


def make(fields: dict, device: str) -> tuple[pocket.Run, bool]:
    """(the training run of a candidate, whether it has the memory task)."""
    parts = [
        kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})
        for kind in (pocket.Recipe, Shape)
    ]
    return pocket.Run(*parts, device), fields.get("memory", True)


def made_with(fields: dict) -> dict:
    """Every field that the model of a candidate depends on, defaults included."""
    all_fields = {"memory": True}
    for kind in (pocket.Recipe, Shape):
        all_fields |= {f.name: f.default for f in dataclasses.fields(kind)}
    all_fields |= fields
    return {
        name: all_fields[name]
        for name in all_fields
        if name not in ("checkpoint_every", "log_every")
    }


def train(name: str, fields: dict, args, streams, tokenizer) -> Path:
    """The folder with the model of a candidate, which is trained if it is not finished."""
    work = args.work / name
    model_folder = work / "model"
    record_file = work / "made_with.json"
    if (model_folder / "model.safetensors").exists():
        recorded = json.loads(record_file.read_text()) if record_file.exists() else {}
        refuse_others(
            str(work), recorded, made_with(fields), f"use another --work, or delete {work}"
        )
        return model_folder
    work.mkdir(parents=True, exist_ok=True)
    run, memory = make(fields, args.device)
    if (work / f"{name}.pt").exists():
        run.load(work / f"{name}.pt")
    with run.graphs.own_stream():
        pocket.train(run, streams, work, name, memory)
    export(run, tokenizer, model_folder)
    if not memory:
        (model_folder / "encoder.safetensors").unlink()  # it was not trained
    write(record_file, made_with(fields))
    return model_folder


def measure(name: str, folder: Path, fields: dict, args, streams) -> list[dict]:
    """The rows of a candidate, one for each K."""
    from memvec import load_lm
    from memvec.cramming.recipe import Recipe

    lm = load_lm(str(folder), device=args.device, dtype="float32")
    run, _ = make(fields, args.device)
    run.load(folder.parent / f"{name}.pt")
    loss = pocket.valid_loss(run, streams["valid"])
    recipe = Recipe.of(steps=args.cram_steps, start="auto")
    of_candidate = {
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
        rows.append({**of_candidate, **row, "bits_per_dimension": bits})
    return rows


def refuse_other_rows(path: Path, args) -> None:
    """Raise MemvecError if rows of the table were measured with other options."""
    remedy = f"give these options, or delete {path} to measure again"
    rows = json.loads(path.read_text())
    asked = {"steps": args.cram_steps, "n": args.passages}
    for row in rows:
        refuse_others(str(path), row, asked, remedy)
    measured_vectors = {"vectors": sorted({row["K"] for row in rows})}
    refuse_others(str(path), measured_vectors, {"vectors": sorted(set(args.vectors))}, remedy)


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown, in descending order of text bits per dimension."""
    shapes = ", ".join(f"{K} x {T}" for K, T in ONE_PASS)
    lines = [
        "| candidate | parameters | minutes | text, M | valid loss | context gain "
        f"| exact in one pass at K x tokens {shapes} | K | n | tokens per vector "
        "| text bits per dimension |",
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
    """A parser with the options of all programs that train models of a .toml file.

    The default --spec is the file beside `program` with the same name.
    """
    root = program.resolve().parents[1]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    spec = program.with_suffix(".toml")
    parser.add_argument("--spec", type=Path, default=spec, help=f"default: {spec.name}")
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("novels.parquet"),
        help="parquet file of texts, or a folder of .txt files; default: novels.parquet",
    )
    work = root / ".runs" / program.stem
    parser.add_argument(
        "--work", type=Path, default=work, help=f"folder of the results; default: .runs/{work.name}"
    )
    parser.add_argument("--only", nargs="*", help="names of tables in --spec; default: all")
    parser.add_argument("--passages", type=int, default=16, help="to cram; default: 16")
    return parser


def chosen_names(args, known) -> list[str]:
    """The names in --only, or all names in --spec; raises MemvecError if --spec lacks one."""
    if unknown := set(args.only or ()) - set(known):
        raise MemvecError(f"--only {min(unknown)}: {args.spec.name} has {', '.join(known)}.")
    return args.only or list(known)


def main():
    """Train and measure the candidates, and write the table."""
    parser = arguments(__doc__, Path(__file__))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=device, help="cpu or cuda; default: cuda if there is one"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the tokens of a step")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="of training, each; 0: as --spec says"
    )
    parser.add_argument("--measure-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--vectors", type=int, nargs="+", default=[1, 4], help="numbers K; default: 1 4"
    )
    parser.add_argument(
        "--cram-steps", type=int, default=400, help="of cramming a passage; default: 400"
    )
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
        measured_file = args.work / name / "measured.json"
        if (folder / "model.safetensors").exists() and not measured_file.exists():
            rows = measure(name, folder, candidates[name], args, streams)
            measured_file.write_text(json.dumps(rows, indent=1))
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
    run_program(main)
