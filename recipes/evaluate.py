"""Measure the numbers of a model's card on held-out texts.

    python recipes/evaluate.py --corpus novels.parquet      # the built-in model
    python recipes/evaluate.py --model .runs/pocket/twin --start noise    # after pocket.py --twin

The texts are the held-out ones of --corpus, or those that `pocket.py` held out in --work.

Parts (--parts):
- loss: the cross-entropy of 128 fixed crops of 512 tokens, half of them after <s>, in float32: nats
  per token and bits per byte;
- context: by how many nats per token 24 tokens of context lower the loss of the 48 tokens after
  them, over 512 places;
- one-pass: 128 passages of several lengths, decoded freely and greedily from the vectors of the
  encoder, without cramming: the share of tokens that are right, and of passages that are exact;
- horizon: --passages passages are crammed by memvec's default recipe with the changes of --set, and
  decoded freely from the stored vectors. They are longer than what vectors hold, so that the end of
  a passage never limits the horizon. Per vector: tokens, text bits (what the model alone needs for
  these tokens) and the information gain over them, in bits.

Every mean has its n and a 95 % interval: a list of mean, lower end and upper end (percentile
bootstrap over crops, places or passages; Wilson for shares of passages).

Prints a JSON line for each measurement and appends it to --log. On one core the horizon of 16
passages takes minutes; the other parts take less.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from corpus import generator, ordinary_batch, read_texts, tokenized, windows
from memvec.cli.program import run_program
from memvec.errors import MemvecError
from memvec.statistics import bootstrap_mean, share_interval


def interval(values) -> tuple[float, float, float]:
    """(mean, ends of its 95 % bootstrap interval), rounded; the ends of one value are NaN."""
    return tuple(round(value, 3) for value in bootstrap_mean([float(value) for value in values]))


def share(hits: int, n: int) -> tuple[float, float, float]:
    """(share of hits, ends of its 95 % Wilson interval), rounded."""
    return tuple(round(value, 3) for value in share_interval(hits, n))


def pieces_of(path: Path) -> dict[str, int] | None:
    """The vocabulary of a tokenizer.json; None without the file."""
    return Tokenizer.from_file(str(path)).get_vocab() if path.exists() else None


def held_out(lm, corpus: Path | None, work: Path) -> torch.Tensor:
    """The token ids (N,) of the held-out texts."""
    if corpus is not None:
        frame = read_texts(corpus)
        texts = frame[frame["split"] == "valid"]["text"]
        ids = tokenized(lm.tokenizer.backend_tokenizer, texts)
    elif (path := work / "valid.npy").exists():
        if lm.tokenizer is None or lm.tokenizer.get_vocab() != pieces_of(work / "tokenizer.json"):
            raise MemvecError(
                f"{path} has ids of another tokenizer than {lm.name}'s: give --corpus, or the "
                "--work where that model was trained."
            )
        ids = np.load(path)
    else:
        raise MemvecError(f"there is no {path}: give --corpus, or run recipes/pocket.py first.")
    return torch.from_numpy(ids.astype(np.int64))


@torch.no_grad()
def losses(lm, stream, crops: int) -> dict:
    """Ordinary text, held out: nats per token and bits per byte, with intervals over crops."""
    ids = ordinary_batch(stream, crops * 512, 512, generator(0, "valid", 0)).to(lm.device)
    nats = []
    for part in ids.split(8):
        logits = lm.model(part).logits[:, :-1].float()
        targets = part[:, 1:]
        nats.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1))
    nats = torch.cat(nats).cpu()
    byte_count = sum(len(lm.text(row[1:].tolist()).encode()) for row in ids)
    return {
        "what": "loss",
        "n": crops,
        "nats_per_token": interval(nats / 511),
        "bits_per_byte": round(nats.sum().item() / math.log(2) / byte_count, 4),
    }


def one_pass(lm, stream, K: int, T: int, n: int) -> dict:
    """Decode n passages of T tokens from K vectors of the encoder, without cramming."""
    from memvec.decoding import decode_ids

    ids = windows(stream, n, T, generator(0, f"one-pass {T}", 0))
    ids = ids.to(lm.device)
    vectors = lm.encoder.encode(lm, ids, K, whole=True)
    right = torch.tensor(decode_ids(lm, vectors, [T] * n)) == ids.cpu()
    return {
        "what": "one-pass",
        "K": K,
        "T": T,
        "n": n,
        "free_running_tokens_right": interval(right.float().mean(1)),
        "passages_exact": share(int(right.all(1).sum()), n),
    }


@torch.no_grad()
def context_gain(lm, stream, T: int, C: int, n: int) -> dict:
    """By how much T tokens of context lower the loss of the C tokens after them, nats per token."""
    ids = windows(stream, n, T + C, generator(0, "context", 0)).to(lm.device)
    all_bos = ids.new_full((n, 1), lm.bos_id)
    gains = []
    for part, bos in zip(ids.split(64), all_bos.split(64), strict=True):
        with_text = lm.model(torch.cat((bos, part[:, :-1]), 1)).logits[:, T:].float()
        without = lm.model(torch.cat((bos, part[:, T:-1]), 1)).logits.float()
        nats = [
            F.cross_entropy(logits.transpose(1, 2), part[:, T:], reduction="none").mean(1)
            for logits in (without, with_text)
        ]
        gains.append((nats[0] - nats[1]).cpu())
    return {
        "what": "context",
        "T": T,
        "C": C,
        "n": n,
        "nats_per_token": interval(torch.cat(gains)),
    }


def longest(lm, K: int) -> int:
    """Tokens of a passage for K vectors: more than they hold, if the context has room for them."""
    return min(200 * K, lm.context - K - 8)


def horizon(lm, stream, K: int, T: int, n: int, recipe) -> dict:
    """Cram n passages of T tokens, and decode them freely from the stored vectors.

    Text bits are what the model alone needs for the tokens of the horizon. The information gain
    over them is less: the bits that the model still needs with the vectors are subtracted.
    """
    from memvec.cramming.engine import Engine
    from memvec.passages.cutting import surprisals
    from memvec.passages.passage import Passage

    began = time.perf_counter()
    # Longer passages begin with the shorter ones, so that different K can be compared.
    starts = torch.randint(len(stream) - 1024, (n, 1), generator=generator(0, "horizon", 0))
    rows = stream[starts.clamp_max(len(stream) - T) + torch.arange(T)]
    passages = [Passage(tuple(row.tolist())) for row in rows]
    engine = Engine(lm, recipe, vectors=K, batch_size=n)
    tokens_per_vector, bits, gains = [], [], []
    for outcome in engine.run(passages):
        tokens = outcome.metrics.horizon
        tokens_per_vector.append(tokens / K)
        bits.append(
            float(surprisals(lm, outcome.passage.ids[:tokens]).sum()) / K if tokens else 0.0
        )
        gains.append(outcome.scores[:tokens].information_gain() / K)
    return {
        "what": "horizon",
        "K": K,
        "T": T,
        "n": n,
        "start": recipe.start,
        "steps": recipe.steps,
        "temperature": recipe.temperature,
        "lr": recipe.lr,
        "tokens_per_vector": interval(tokens_per_vector),
        "bits_per_vector": interval(bits),
        "gain_per_vector": interval(gains),
        "longest": max(tokens_per_vector) * K,
        "shortest": min(tokens_per_vector) * K,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main():
    """Measure the chosen parts, print them and log them."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket", help="'pocket', or a model folder")
    parser.add_argument("--corpus", type=Path, help="parquet of texts, or a folder of .txt files")
    parser.add_argument(
        "--work",
        type=Path,
        default=root / ".runs/pocket",
        help="where pocket.py stores the held-out tokens, for use without --corpus",
    )
    parser.add_argument("--log", type=Path, help="default: evaluate.jsonl in --work")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["loss", "context", "one-pass", "horizon"],
        choices=["loss", "context", "one-pass", "horizon"],
        help="what to measure; default: all",
    )
    parser.add_argument("--passages", type=int, default=16, help="of the horizon; default: 16")
    parser.add_argument(
        "--tokens", type=int, help="of each passage of the horizon; default: more than it holds"
    )
    parser.add_argument(
        "--vectors", type=int, nargs="+", default=[1, 4], help="numbers K; default: 1 4"
    )
    parser.add_argument("--encoder", type=Path, help="file of another one-pass encoder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--start", default="auto", help="encoder, noise or auto; default: auto")
    parser.add_argument(
        "--set",
        nargs="*",
        default=["steps=400"],
        metavar="NAME=VALUE",
        help="changes to the default recipe for the horizon; default: steps=400",
    )
    args = parser.parse_args()

    from memvec import load_lm
    from memvec.cli.common import recipe_of

    recipe = recipe_of("default", args.set, start=args.start)
    lm = load_lm(args.model, device=args.device, encoder=args.encoder)
    stream = held_out(lm, args.corpus, args.work)
    if "one-pass" in args.parts and lm.encoder is None:
        print(f"{lm.name} has no encoder, so the part one-pass is left out", file=sys.stderr)

    def rows():
        if "loss" in args.parts:
            yield losses(lm, stream, 128)
        if "context" in args.parts:
            yield context_gain(lm, stream, 24, 48, 512)
        if "one-pass" in args.parts and lm.encoder is not None:
            for K in args.vectors:
                for T in (8, 12, 16, 24, 32, 48, 64):
                    yield one_pass(lm, stream, K, T, 128)
        if "horizon" in args.parts:
            for K in args.vectors:
                yield horizon(lm, stream, K, args.tokens or longest(lm, K), args.passages, recipe)

    path = args.log or args.work / "evaluate.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        for row in rows():
            line = json.dumps({"model": args.model, **row})
            print(line, flush=True)
            print(line, file=log, flush=True)


if __name__ == "__main__":
    run_program(main)
