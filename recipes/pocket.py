"""Train the built-in model `pocket`, a small OLMo 2 that gives back passages from input vectors.

From the root of the repository, on a CPU with two cores or on a GPU:

    python recipes/pocket.py                          # train and export
    python recipes/pocket.py --corpus my_texts/       # from a folder of .txt files
    python recipes/pocket.py --twin                   # afterwards: its plain twin, for comparison
    python recipes/pocket.py --device cuda --hidden-size 512 ...     # another shape, on a GPU
    python recipes/evaluate.py                        # the numbers of the model card

The training of `pocket` took 70 minutes on two cores that were shared with other work.

Notable:
- a run has three parts. *Trunk*: each step reads ordinary text. *Memory*: each step also encodes
  passages into K input vectors and decodes them from these vectors alone. *Decay*: as memory, while
  the learning rate falls linearly to zero. Before the decay the rate is constant, so a run can be
  shortened: stop it and start it again with fewer --steps; it resumes from its last checkpoint;
- the *plain twin* has the same shape, the same trunk and the same ordinary text, and no memory
  task;
- each of K vectors holds an equal part of a passage, encoded without the others (`encoder.py`). The
  decoder reads the vectors in order;
- each K has a target length of its passages, which rises while the model gives them back and falls
  while it does not. Lengths lie on a grid, so that only few shapes occur (`lengths.py`);
- Muon trains the matrices of the layers, AdamW trains embedding, norms and encoder
  (`optimizers.py`). Weights are float32, products bfloat16 (autocast);
- what a step draws depends on the seed and on the step's number (`steps.py`), so a run is
  repeatable up to the order of floating-point sums;
- on a GPU each shape has a CUDA graph that is captured once (`graphs.py`).

Writes into --work: the token streams, a checkpoint (pocket.pt, twin.pt, trunk.pt), and a log with a
JSON line for every --log-every steps: the mean losses of these steps in nats per token (`text`,
`memory`, `use`), `K1`, `K2` ... (teacher-forced accuracy of passages of K vectors) and `T1`, `T2`
... (their tokens), and the target lengths in tokens; `valid` is the loss on held-out text.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import math
import os
import time
from pathlib import Path

from environment import in_environment

if __name__ == "__main__":
    in_environment()  # before the slow imports

import torch

from corpus import generator, ordinary_batch, prepare
from decoder import Shape
from export import export
from losses import text_loss
from memvec.cli.program import run_program
from memvec.errors import MemvecError
from recipe import Recipe
from run import Run
from steps import settle, train_step


@torch.no_grad()
def valid_loss(run: Run, stream, crops: int = 32, length: int = 256) -> float:
    """Mean cross-entropy on fixed crops of held-out text ids (N,), in nats per token."""
    ids = ordinary_batch(stream, crops * length, length, generator(0, "valid", 0)).to(run.device)
    with run.half_width():
        return sum(text_loss(run.model, part).item() for part in ids.split(8)) / (len(ids) / 8)


def train(run: Run, streams: dict, work: Path, name: str, memory: bool) -> None:
    """Train to the last step. Writes a log of JSON lines, and checkpoints to resume from.

    `streams`: {"train", "valid"}, ids (N,). `name` is that of both files in `work`. Without
    `memory` the run is the plain twin.
    """
    values_since_log: dict[str, list] = {}
    last_time = time.monotonic()

    def collect(record: dict) -> None:
        for key, value in record.items():
            values_since_log.setdefault(key, []).append(value)

    with (work / f"{name}.jsonl").open("a", buffering=1) as log:
        while run.progress < 1:
            in_trunk = run.before(run.recipe.trunk_steps)
            collect(train_step(run, streams["train"], memory))
            present = time.monotonic()
            # the time of the first step does not count, because it also compiles
            run.seconds, last_time = run.seconds + (present - last_time) * (run.step > 1), present
            if run.step % run.recipe.log_every == 0:
                record = {"step": run.step, "seconds": round(run.seconds, 1), **run.tokens}
                record = {f"tokens_{k}" if k in run.tokens else k: v for k, v in record.items()}
                record |= {key: round(sum(v) / len(v), 4) for key, v in values_since_log.items()}
                record["targets"] = [round(v, 1) for v in run.lengths.targets.values()]
                record["inner_targets"] = [round(v, 1) for v in run.lengths.inner_targets.values()]
                record["accuracy"] = [round(v, 3) for v in run.lengths.accuracy.values()]
                print(json.dumps(record), file=log)
                values_since_log.clear()
            # The trunk is saved before the checkpoint: a run that resumes from that checkpoint is
            # no longer in its trunk and would not save it.
            if memory and in_trunk and not run.before(run.recipe.trunk_steps):
                run.save(work / "trunk.pt")
            if run.step % run.recipe.checkpoint_every == 0 or run.progress >= 1:
                collect(settle(run))
                loss = valid_loss(run, streams["valid"])
                if not math.isfinite(loss):
                    raise MemvecError(
                        f"{name}: the loss is {loss} after step {run.step}; lower the rates."
                    )
                print(json.dumps({"step": run.step, "valid": round(loss, 4)}), file=log)
                run.save(work / f"{name}.pt")


def arguments():
    """Read the command line: paths, what to do, and the fields of recipe and shape."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("novels.parquet"),
        help="parquet file with a text column, or a folder of .txt files; default: novels.parquet",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=root / ".runs/pocket",
        help="folder of token streams, checkpoints and logs; a run resumes from it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the finished model; default: src/memvec/pocket, with --twin --work/twin",
    )
    parser.add_argument(
        "--twin",
        action="store_true",
        help="train the plain twin from the trunk of the model",
    )
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="export the last checkpoint without training",
    )
    parser.add_argument(
        "--begin",
        type=Path,
        metavar="FOLDER",
        help="begin with the weights of an exported model, if --work has no checkpoint",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    meanings = docstrings_of(Recipe) | docstrings_of(Shape)
    for option in (*dataclasses.fields(Recipe), *dataclasses.fields(Shape)):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=option.type,
            default=option.default,
            help=f"{meanings[option.name].replace('%', '%%')} Default: {option.default}.",
        )
    return parser.parse_args()


def docstrings_of(kind) -> dict[str, str]:
    """Name of each field of a class → the string below it."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
    }


def main():
    """Prepare the corpus, train from the last checkpoint on, and export the model."""
    args = arguments()
    torch.set_num_threads(args.threads)
    recipe, shape = (
        kind(**{f.name: getattr(args, f.name) for f in dataclasses.fields(kind)})
        for kind in (Recipe, Shape)
    )
    tokenizer, streams = prepare(args.corpus, args.work, shape.vocab_size)
    run = Run(recipe, shape, args.device)
    name = "twin" if args.twin else "pocket"
    if (args.work / f"{name}.pt").exists():
        run.load(args.work / f"{name}.pt")
    elif args.twin:
        trunk = args.work / "trunk.pt"
        if not trunk.exists():
            raise MemvecError(
                f"--twin: there is no {trunk}: train the model first, without --twin."
            )
        run.load(trunk, trunk=True)
    elif args.begin:
        run.begin_with(args.begin)
    elif args.export_only:
        raise MemvecError(f"--export-only: there is no checkpoint {args.work / name}.pt.")
    print(
        f"{name}: {sum(p.numel() for p in run.model.parameters()):,} parameters, "
        f"step {run.step} of {recipe.steps}, {len(streams['train']):,} training tokens"
    )
    if not args.export_only:
        with run.graphs.own_stream():
            train(run, streams, args.work, name, memory=not args.twin)
    root = Path(__file__).resolve().parents[1]
    out = args.out or (args.work / "twin" if args.twin else root / "src/memvec/pocket")
    export(run, tokenizer, out)
    if args.twin:
        (out / "encoder.safetensors").unlink()  # it was not trained


if __name__ == "__main__":
    run_program(main)
