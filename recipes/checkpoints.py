"""Train small models and store checkpoints, for the study of capacity during training.

    python recipes/checkpoints.py                          # all runs of checkpoints.toml
    memvec study run studies/checkpoints.toml              # measures every checkpoint afterwards

Notable:
- a run is one of `shapes.py` (same text, same steps). Here nothing is crammed; each run stores its
  model at several steps, as folders that transformers loads;
- memvec.json in each folder has the name of the run, its seed, how much it has read and its loss on
  held-out text. The protocol `checkpoints` reads this file;
- a finished run is not trained again, and the program ends if a run was begun with other options. A
  folder gets its name when it is complete.

Writes --work/RUN-step-00000 and so on. All 22 runs take half an hour on one core.
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
from memvec.cli.program import run_program
from shapes import Plan, Trained, read, save, trained_to, valid_loss


def write_checkpoint(trained: Trained, tokenizer, folder: Path, record: dict) -> None:
    """Write a checkpoint with its record. The folder gets its name when it is complete."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save(trained, tokenizer, unfinished)
    (unfinished / "memvec.json").write_text(json.dumps({"training": record}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def run(name: str, plan: Plan, tokenizer, streams, args) -> None:
    """Train one run and write its checkpoints, unless it is finished."""
    finished_file, begun_file = (args.work / f"{name}.{ending}" for ending in ("finished", "begun"))
    options = {"scale": args.scale, **asdict(plan)}
    if begun_file.exists():
        remedy = f"use another --work, or delete {name}.* and {name}-step-* in {args.work}"
        refuse_others(f"{name} in {args.work}", json.loads(begun_file.read_text()), options, remedy)
    if finished_file.exists():
        return
    args.work.mkdir(parents=True, exist_ok=True)
    write(begun_file, options)
    for trained, reached in trained_to(plan, streams, args.scale):
        record = {"run": name, "family": trained.lm.config.model_type, "seed": plan.seed}
        record |= {key: reached[key] for key in ("step", "of", "tokens", "parameters")}
        record["valid"] = round(valid_loss(trained, streams["valid"]), 4)
        write_checkpoint(
            trained, tokenizer, args.work / f"{name}-step-{reached['step']:05d}", record
        )
        print(json.dumps(record), flush=True)
    finished_file.touch()


def main():
    """Train the chosen runs."""
    parser = arguments(__doc__, Path(__file__))
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the text of each run")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default: all"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()  # one for each checkpoint
    plans = {name: plan for name, plan in read(args.spec).items() if name != "base"}
    names = chosen_names(args, plans)
    tokenizer, streams = prepare(args.corpus, args.work, 2048)
    for name in names:
        run(name, plans[name], tokenizer, streams, args)


if __name__ == "__main__":
    in_environment()
    run_program(main)
