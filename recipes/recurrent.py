"""Train the recurrent encoder of docs/recurrent.md beside the built-in model.

    python recipes/recurrent.py --text novels.parquet        # then:
    memvec study run studies/recurrent.toml

Notable:
- it is one command of memvec with the options that are here, and any of them can be changed after
  it: `python recipes/recurrent.py --text books --where "" --steps 200`;
- a run that is stopped goes on from its last checkpoint;
- the model and its own one-pass encoder stay as they are: the recurrent encoder begins as a queue
  of that encoder's vectors, and is a file beside the model.

Writes --work/encoder.safetensors (9 MB).
"""

import argparse
import sys
from pathlib import Path

from memvec.cli.app import app

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
    """The words of `memvec` for what the command line of this recipe asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="txt, jsonl, parquet, csv, or a folder")
    parser.add_argument("--where", default="split=train", help="rows of a table; '': all")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--work", type=Path, default=Path(".runs/recurrent"))
    for name, value in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    words = ["encoder", "train", "--recurrent", "--model", args.model, "--text", args.text]
    words += ["--where", args.where] if args.where else []
    for name in OPTIONS:
        words += [f"--{name}", str(getattr(args, name.replace("-", "_")))]
    return [*words, "--out", str(args.work / "encoder.safetensors")]


if __name__ == "__main__":
    sys.argv[1:] = command(sys.argv[1:])
    app()
