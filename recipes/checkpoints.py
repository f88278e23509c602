"""Train small models and keep checkpoints, for the study of capacity over training.

    python recipes/checkpoints.py                          # all runs of checkpoints.toml
    memvec study run studies/checkpoints.toml              # then measures every checkpoint

Notable:
- runs are those of `shapes.py` (same text, same steps); here each one keeps what it is on the way,
  as a folder that transformers loads, and nothing is crammed;
- memvec.json in each folder says which run it is of, its seed, how much it has read and its loss on
  held-out text: the protocol `checkpoints` reads that;
- a run whose last checkpoint is there is not trained again, and one that was begun with other
  options is refused. Folders appear whole or not at all.

Writes --work/RUN-step-00000 and so on.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from candidates import arguments, chosen_names
from corpus import prepare
from environment import in_environment
from kept import refuse_others, write
from shapes import Plan, Trained, read, save, trained_to, valid_loss


def keep(trained: Trained, tokenizer, folder: Path, record: dict) -> None:
    """A checkpoint with its record, under its name only once it is complete."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save(trained, tokenizer, aside)
    (aside / "memvec.json").write_text(json.dumps({"training": record}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def run(name: str, plan: Plan, tokenizer, streams, args) -> None:
    """One run with its checkpoints, unless it is finished."""
    last, begun = (args.work / f"{name}.{what}" for what in ("finished", "begun"))
    asked = {"scale": args.scale, **asdict(plan)}
    if begun.exists():
        remedy = f"use another --work, or delete {name}.* and {name}-step-* in {args.work}"
        refuse_others(f"{name} in {args.work}", json.loads(begun.read_text()), asked, remedy)
    if last.exists():
        return
    args.work.mkdir(parents=True, exist_ok=True)
    write(begun, asked)
    for trained, reached in trained_to(plan, streams, args.scale):
        record = {"run": name, "family": trained.lm.config.model_type, "seed": plan.seed}
        record |= {key: reached[key] for key in ("step", "of", "tokens", "parameters")}
        record["valid"] = round(valid_loss(trained, streams["valid"]), 4)
        keep(trained, tokenizer, args.work / f"{name}-step-{reached['step']:05d}", record)
        print(json.dumps(record), flush=True)
    last.touch()


def main():
    """Train what the command line asks for."""
    parser = arguments(__doc__, Path(__file__))
    parser.add_argument("--scale", type=float, default=1.0, help="of the text of each run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()  # one for each checkpoint
    plans = read(args.spec)
    names = chosen_names(args, plans)
    tokenizer, streams = prepare(args.corpus, args.work, 2048)
    for name in names:
        if name != "base":
            run(name, plans[name], tokenizer, streams, args)


if __name__ == "__main__":
    in_environment()
    main()
