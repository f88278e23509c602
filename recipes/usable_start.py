"""A start that makes exact and usable vectors cheap: one pass of a trained copy of the model.

    python recipes/usable_start.py --corpus novels.parquet --minutes 25
    python recipes/usable_start.py --corpus novels.parquet --minutes 0 --steps 17 30 100

Notable:
- cramming for use (docs/usable.md) begins as the last K tokens of a text, and has to find both of
  its modes by itself. Here a copy of the model reads the text and K learned summary embeddings;
  its last hidden states there, through a linear map, are added to those tokens. The copy learns
  by the two losses of use: cross-entropy of the passage behind the model's trigger, and the
  divergence from the model that has read the text on the words that truly follow;
- the model and its trigger stay frozen, and only the first vectors come from the copy: passages
  are crammed and certified by memvec's engine as ever;
- measured on held-out texts: exact passages, KL to the text on the 48 tokens that truly follow,
  and forward-backward tokens over those of exact-only vectors from noise (benchmarks/usable.py).
  The pass of the copy is counted as if it had a backward pass, too.

Writes --work/start.pt every few minutes and begins with it if it is there: a run that was stopped
keeps its weights, but begins anew with its optimisers and its rate.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from corpus import generator, prepare, windows

QUERY, BEHIND = 32, 48  # tokens that follow a passage: in training, and when measured
WEIGHT = 8.0  # of the divergence beside the cross-entropy
SAVE_EVERY = 300.0  # seconds
POSITIONS = 1600  # of a step, about


def unit(rows):
    """Rows (..., D) with a root mean square of 1."""
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)


class Start(nn.Module):
    """Passages (B, T) to vectors (B, K, D): the last K tokens, and what a copy adds to them."""

    def __init__(self, lm, K: int) -> None:
        super().__init__()
        self.lm, self.K = [lm], K  # in a list: the frozen model is no part of the network
        self.body = copy.deepcopy(lm.model.base_model).float().requires_grad_(True)
        self.body.get_input_embeddings().requires_grad_(False)
        begun = getattr(lm.encoder, "summary", None)
        begun = lm.embedding.weight.mean(0) if begun is None else begun[0]
        begun = begun.detach().float().repeat(K, 1)
        self.summary = nn.Parameter(begun + 0.1 * begun.std() * torch.randn(K, lm.width))
        self.map = nn.Linear(lm.width, lm.width)
        nn.init.normal_(self.map.weight, std=0.01)
        nn.init.zeros_(self.map.bias)
        self.a = nn.Parameter(torch.ones(K, 1))  # of the last tokens

    def forward(self, ids):
        lm, n = self.lm[0], len(ids)
        embedded = lm.embed(ids).float()
        bos = lm.embed(ids.new_full((n, 1), lm.bos_id)).float()
        read = torch.cat([bos, embedded, self.summary.expand(n, -1, -1)], 1)
        with torch.autocast(lm.device.type, torch.bfloat16):
            hidden = self.body(inputs_embeds=read, use_cache=False).last_hidden_state
        return self.a * unit(embedded[:, -self.K :]) + self.map(hidden[:, -self.K :].float())


def log_p(lm, before, ids):
    """Log-probabilities (B, L, V) of each of ids behind some inputs."""
    from memvec.usable.teacher import states_behind

    return lm.head(states_behind(lm, before, ids)).log_softmax(-1)


def losses(lm, trigger, vectors, ids, query):
    """Cross-entropy (B, T) behind the trigger, and divergence (B) on the query; nats per token."""
    asked = torch.cat([vectors, trigger.expand(len(ids), -1, -1)], 1)
    missed = F.nll_loss(log_p(lm, asked, ids).transpose(1, 2), ids, reduction="none")
    bos = lm.embed(ids.new_full((len(ids), 1), lm.bos_id))
    with torch.no_grad():
        truth = log_p(lm, torch.cat([bos, lm.embed(ids)], 1), query)
    said = log_p(lm, vectors, query)
    return missed, (truth.exp() * (truth - said)).sum(-1).mean(-1)


def train(start, lm, trigger, stream, args) -> None:
    """Train for --minutes."""
    matrices = [p for p in start.body.parameters() if p.requires_grad and p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in start.parameters() if p.requires_grad and id(p) not in known]
    muon = torch.optim.Muon(matrices, lr=6e-4, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    began, saved, step = time.perf_counter(), 0.0, 0
    while (spent := time.perf_counter() - began) < 60 * args.minutes:
        rate = min(1, (step + 1) / 30, 0.02 + 1.2 * (1 - spent / (60 * args.minutes)))
        for optimizer, lr in ((muon, 6e-4), (adam, 2e-3)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
        draw = generator(args.seed, "start", step)
        T = start.K * int(torch.randint(4, 13, (), generator=draw))
        count = max(4, POSITIONS // (2 * T + QUERY + 16))
        both = windows(stream, count, T + QUERY, draw)
        ids, query = both[:, :T], both[:, T:]
        missed, kl = losses(lm, trigger, start(ids), ids, query)
        (missed.mean() + WEIGHT * kl.mean()).backward()
        nn.utils.clip_grad_norm_(start.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            said = f"{missed.mean().item():.3f} nats behind the trigger, KL {kl.mean().item():.4f}"
            print(f"step {step}, {spent:.0f} s, {T} tokens: {said}", flush=True)
        if spent - saved > SAVE_EVERY:
            torch.save(start.state_dict(), args.work / "start.pt")
            saved = spent
    if step:
        torch.save(start.state_dict(), args.work / "start.pt")


def between(interval, digits: int = 2) -> str:
    """An interval as it is printed."""
    low, high = interval
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def measure(start, lm, stream, T: int, steps: int, args) -> str:
    """Cram held-out passages from the start in some steps; a line of what came of it."""
    from memvec.cramming.engine import Engine
    from memvec.cramming.recipe import Recipe
    from memvec.passages.passage import Passage
    from memvec.usable.certificate import VECTORS, behind_each, contexts_of, worth_table

    lengths = {"settle": steps, "decay": steps, "steps": 3 * steps, "patience": 3 * steps}
    recipe = Recipe.of("usable", start="trained", **lengths, **dict(s.split("=") for s in args.set))
    both = windows(stream, args.passages, T + BEHIND, generator(args.seed, "held out", T))
    asked = [Passage(tuple(row[:T].tolist()), i) for i, row in enumerate(both)]

    def crammed(recipe):
        engine = Engine(lm, recipe, vectors=start.K, batch_size=16)
        return {outcome.passage.document: outcome for outcome in engine.run(asked)}

    usable, plain = crammed(recipe), crammed(Recipe(start="noise", start_rule="bos"))
    exact = [i for i in usable if usable[i].exact]
    if not exact:
        return f"{T} tokens, {steps} steps: no passage of {len(asked)} is exact"
    worth = worth_table(
        [
            behind_each(
                lm,
                contexts_of(lm, usable[i].vectors.float(), asked[i].ids, None),
                both[i : i + 1, T:],
            )
            for i in exact
        ],
        1,
        BEHIND,
    )
    own = worth.contexts[VECTORS]
    read = len(asked) * (1 + T + start.K)
    cost = (read + sum(o.spent for o in usable.values())) / sum(o.spent for o in plain.values())
    parts = [
        f"{T} tokens, {steps} steps: exact {len(exact)} of {len(asked)}, cost {cost:.1f}",
        f"KL {own.kl:.4f} {between(own.kl_interval, 4)}",
        f"kept {own.kept:.2f} {between(own.kept_interval)}",
    ]
    for name, other in worth.contexts.items():
        if name != VECTORS:
            parts.append(f"{name} {other.over_vectors:.2f} {between(other.over_vectors_interval)}")
    return "; ".join(parts)


def main(argv=None) -> None:
    """Train the start and measure it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".runs/usable-start"))
    parser.add_argument("--vectors", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=25.0, help="0: only measure start.pt")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[24], help="of a passage, measured"
    )
    parser.add_argument("--steps", type=int, nargs="*", default=[17], help="of cramming, measured")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--set", nargs="*", default=["lr=0.15"], help="fields of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    from memvec import load_lm, register
    from memvec.model.precision import for_steps

    lm = load_lm(args.model, device="cpu")
    if lm.bos_id is None or lm.own_trigger is None:
        raise SystemExit(f"{args.model} needs BOS and a trigger: memvec trigger train makes one")
    args.work.mkdir(parents=True, exist_ok=True)
    streams = streams_of(lm, args)
    torch.manual_seed(args.seed)
    start = Start(lm, args.vectors)
    if (found := args.work / "start.pt").is_file():
        try:
            start.load_state_dict(torch.load(found, weights_only=True))
        except RuntimeError:
            raise SystemExit(
                f"{found} is of another --model or --vectors: use another --work"
            ) from None
    elif not args.minutes:
        raise SystemExit(f"there is no {found} to measure: train it with --minutes 25")
    train(start, for_steps(lm, "bfloat16"), lm.own_trigger.rows, streams["train"], args)

    @register("start", "trained")
    @torch.no_grad()
    def trained(lm, ids, K, recipe):
        return start(torch.tensor([list(ids)]))[0]

    for T in args.tokens:
        for steps in args.steps:
            print(measure(start, lm, streams["valid"], T, steps, args), flush=True)


def streams_of(lm, args):
    """Token ids (N,) of the corpus, {"train", "valid"}, kept in --work."""
    tokenizer = args.work / "tokenizer.json"
    if not tokenizer.exists():
        lm.tokenizer.backend_tokenizer.save(str(tokenizer))
    return prepare(args.corpus, args.work, lm.vocab_size)[1]


if __name__ == "__main__":
    main()
