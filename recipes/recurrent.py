"""Train the recurrent encoder of docs/recurrent.md for the built-in model.

    python recipes/recurrent.py --text novels.parquet        # then:
    memvec study run studies/recurrent.toml

Notable:
- the program runs `memvec encoder train --recurrent` with the options below, each of which can be
  changed: `python recipes/recurrent.py --text books --where "" --steps 200`;
- a run that is stopped continues from its last checkpoint;
- the model and its own one-pass encoder do not change. The recurrent encoder begins as a queue of
  that encoder's vectors, and is a file of its own.

Writes --work/encoder.safetensors (9 MB).
"""

import argparse
import sys
from pathlib import Path

from memvec.cli.app import run

OPTIONS = {
    "slots": 4,
    "segments": 8,
    "lags": 6,
    "segment-tokens": 8,
    "layers": 2,
    "hidden": 256,
    "positions": 1024,
    "steps": 1200,
    "lr": 2e-3,
}


def command(argv: list[str]) -> list[str]:
    """The arguments of `memvec` for the arguments of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="file (txt, jsonl, parquet, csv) or folder")
    parser.add_argument(
        "--where", default="split=train", help="rows of a table, default: split=train; '': all"
    )
    parser.add_argument("--model", default="pocket", help="default: pocket")
    work = Path(".runs/recurrent")
    parser.add_argument("--work", type=Path, default=work, help=f"folder; default: {work}")
    for name, value in OPTIONS.items():
        parser.add_argument(
            f"--{name}",
            type=type(value),
            default=value,
            help=f"of 'memvec encoder train'; default: {value}",
        )
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    words = ["encoder", "train", "--recurrent", "--model", args.model, "--text", args.text]
    words += ["--where", args.where] if args.where else []
    for name in OPTIONS:
        words += [f"--{name}", str(getattr(args, name.replace("-", "_")))]
    return [*words, "--out", str(args.work / "encoder.safetensors")]


if __name__ == "__main__":
    sys.argv[1:] = command(sys.argv[1:])
    run()
