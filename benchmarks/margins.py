"""How large must a margin be? Arg-max flips against the measured margin, per way to decode.

    python benchmarks/margins.py --quick

Passages are crammed until every margin is just above 0. Then the margin of every position is
computed again in other ways in which the same vectors may be decoded: bfloat16 instead of float32,
one passage at a time instead of 32, with the cache one token at a time instead of all at once. The
change of a margin from one way to another is what a margin must cover. RESULT gives the largest
change for float32 and for bfloat16 in logits, the default recipe's margin, and the largest share of
positions that flip in any way at that margin (`flips`) and at half a logit (`flips_at_half`).
"""

from __future__ import annotations

import torch

from common import arguments, report, run
from memvec import metrics
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.caching import cached_logits
from memvec.model.lm import FrozenLM
from models import SHAPES, random_model
from texts import passages_of


@torch.no_grad()
def margins(
    lm: FrozenLM, vectors: torch.Tensor, ids: torch.Tensor, batch: int, cached: bool
) -> torch.Tensor:
    """Margins (passages, T), logits, of vectors (passages, K, D) and ids (passages, T).

    `batch` passages are computed at once; `cached` computes one token at a time with the cache.
    """
    parts = []
    for at in range(0, len(ids), batch):
        v, t = vectors[at : at + batch].to(lm.device), ids[at : at + batch].to(lm.device)
        logits = (
            cached_logits(lm.model, lm.caching.argument, v.to(lm.dtype), t)
            if cached
            else lm.logits(v, t)
        )
        parts.append(metrics.margins(logits, t).cpu())
    return torch.cat(parts)


def main() -> None:
    """Cram, then compare the ways."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12)
    options = parser.parse_args()
    n = 32 if options.quick else options.passages

    def loaded(dtype: str) -> FrozenLM:
        if options.shape:
            return random_model(options.shape, dtype=getattr(torch, dtype))
        return load_lm(options.model, dtype=dtype)

    lm = loaded("float32")
    recipe = Recipe.of("default", margin=0.0, steps=200 if options.quick else 1000)
    engine = Engine(lm, recipe, batch_size=32)
    done = [o for o in engine.run(passages_of(lm, n, options.tokens)) if o.exact]
    if not done:
        parser.error(f"no passage of {options.tokens} tokens became exact: fewer --tokens")
    vectors = torch.stack([o.vectors for o in done])
    ids = torch.tensor([o.passage.ids for o in done])
    base = margins(lm, vectors, ids, 32, cached=False)
    default = Recipe().in_logits(lm.logit_spread).margin
    rows, largest = [], {}
    for dtype in ("float32", "bfloat16"):
        other = lm if dtype == "float32" else loaded(dtype)
        for batch in (1, 32):
            for cached in (False, True):
                change = (margins(other, vectors, ids, batch, cached) - base).abs().flatten()
                flips = {
                    m: float((change >= base.flatten().clamp_min(m)).float().mean())
                    for m in (0.0, 0.1, 0.25, 0.5, 1.0, default)
                }
                rows.append(
                    {
                        "dtype": dtype,
                        "batch": batch,
                        "cached": cached,
                        "passages": len(done),
                        "positions": len(change),
                        "median_change": float(change.median()),
                        "p99_change": float(change.quantile(0.99)),
                        "largest_change": float(change.max()),
                        **{f"flips_at_{m:g}": flips[m] for m in (0.0, 0.1, 0.25, 0.5, 1.0)},
                        "default_margin": default,
                        "flips_at_default": flips[default],
                    }
                )
                largest[dtype] = max(largest.get(dtype, 0.0), float(change.max()))
    report(
        "margins",
        rows,
        options,
        float32=largest["float32"],
        bfloat16=largest["bfloat16"],
        default_margin=default,
        flips=max(row["flips_at_default"] for row in rows),
        flips_at_half=max(row["flips_at_0.5"] for row in rows),
    )


if __name__ == "__main__":
    run(main)
