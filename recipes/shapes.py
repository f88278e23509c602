"""What does capacity depend on? Small models of equal training compute, crammed during training.

    python recipes/shapes.py                        # all of shapes.toml
    python recipes/shapes.py --only base deep       # some of them
    python recipes/shapes.py --table                # the table of what is measured so far

Notable:
- a model is of any family of transformers, from its configuration. All models get the same number
  of floating-point operations (6 x parameters x tokens), and not the same number of steps;
- each model is crammed before training, at a tenth and at three tenths of it, and at its end, on
  the same held-out passages, so that the table shows how training lowers or raises capacity;
- the memory task is that of `pocket.py` with one vector: the model encodes a passage into an input
  vector and gives it back from there.

The table has for each model the parameters, the width D, the tokens read, the loss at the end (nats
per token), the horizon of one vector in tokens at each measurement, and at the end the text bits
per dimension, the last two with 95 % bootstrap intervals over --passages passages.

Writes shapes.jsonl and shapes.md into --work. A measured model is not trained again. The program
ends if a row there was measured with other options, because the table could not distinguish them.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from candidates import arguments, chosen_names, tables_of
from corpus import generator, ordinary_batch, passage_batch, prepare
from encoder import Encoder
from environment import in_environment
from evaluate import horizon
from kept import refuse_others
from memvec.cli.program import run_program
from memvec.errors import MemvecError

MEASURED_AT = (0.0, 0.1, 0.3, 1.0)  # shares of the training


@dataclass(frozen=True)
class Plan:
    """One model of the table; shapes.toml says what the fields mean."""

    family: str
    flops: float
    tokens_per_step: int
    context: int
    lr: float
    warmup: int
    bos_share: float
    copy_share: float
    memory_from: float
    seed: int
    config: dict = field(default_factory=dict)
    tokens: int = 0  # of ordinary text; 0: as many as `flops` allow
    stops: tuple = MEASURED_AT  # shares of the training at which the model is measured


def read(path: Path) -> dict[str, Plan]:
    """Name of each model → its plan; fields that a table does not have are those of [base]."""
    tables = tables_of(path)
    if "base" not in tables:
        raise MemvecError(f"{path.name} has no table [base].")
    base = tables["base"]
    plans = {}
    for name, table in tables.items():
        table_config = table.get("config", {})
        config = base["config"] | table_config
        # These families have other names for the fields of [base].
        if table.get("family", "").startswith(("GPT2", "OPT")):
            config = {"vocab_size": base["config"]["vocab_size"], **table_config}
        try:
            plans[name] = Plan(**{**base, **table, "config": config})
        except TypeError as error:
            raise MemvecError(f"{path.name}: [{name}]: {error}.") from None
        if plans[name].bos_share not in (0, 0.5):  # `ordinary_batch` gives half of them <s>
            raise MemvecError(f"{path.name}: [{name}]: bos_share must be 0 or 0.5.")
    return plans


class Trained(nn.Module):
    """A model of transformers, and an encoder for the memory task."""

    def __init__(self, plan: Plan):
        super().__init__()
        import transformers

        torch.manual_seed(plan.seed)
        config = getattr(transformers, plan.family)(
            **plan.config, bos_token_id=0, eos_token_id=1, pad_token_id=None
        )
        self.lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        width = self.lm.get_input_embeddings().embedding_dim
        self.encoder = Encoder(width)

    def text_loss(self, ids):
        """Mean cross-entropy in nats of crops ids (B, T)."""
        logits = self.lm(ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def memory_loss(self, ids, noise: float, rng, odd: int = 0):
        """Encode passages ids (B, T) into one vector each and decode them, teacher-forced.

        Returns (mean loss in nats per token, share of tokens that are right). The last `odd`
        passages count only in the loss, as in `steps.py`: they are harder than the others, and the
        share decides how long the passages become.
        """
        embedded = self.lm.get_input_embeddings()(ids)
        vectors = self.encoder(lambda x: self.lm.base_model(inputs_embeds=x)[0], embedded, K=1)
        rms = vectors.detach().float().pow(2).mean().sqrt()
        vectors = vectors + noise * rms * torch.randn(vectors.shape, generator=rng)
        inputs = torch.cat((vectors.to(embedded), embedded[:, :-1]), dim=1)
        logits = self.lm(inputs_embeds=inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        right = logits.detach().argmax(-1) == ids
        return loss, right[: len(ids) - odd].float().mean().item()


def crops_of(stream, plan: Plan, tokens: int, rng) -> torch.Tensor:
    """Crops (B, context) of ordinary text, with <s> and copies as in the plan."""
    crops = ordinary_batch(stream, tokens, plan.context, rng)
    if plan.bos_share == 0:
        with_bos = crops[:, 0] == 0
        crops[with_bos, :-1] = crops[with_bos, 1:].clone()  # the last token is repeated
    copied = torch.rand(len(crops), generator=rng) < plan.copy_share
    half = plan.context // 2
    crops[copied, half : 2 * half] = crops[copied, :half]
    return crops


@torch.no_grad()
def valid_loss(trained: Trained, stream) -> float:
    """Cross-entropy in nats per token on 64 fixed crops of held-out text of 128 tokens."""
    ids = ordinary_batch(stream, 64 * 128, 128, generator(0, "valid", 0))
    # four parts of 16 crops
    return sum(trained.text_loss(part).item() for part in ids.split(16)) / 4


def save(trained: Trained, tokenizer, folder: Path) -> None:
    """The language model and its tokenizer, as transformers loads them."""
    trained.lm.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def measure(trained: Trained, tokenizer, stream, args) -> dict:
    """The present valid loss of the model, and the horizon of one vector."""
    from memvec import load_lm
    from memvec.cramming.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        save(trained, tokenizer, Path(folder))
        lm = load_lm(folder, device="cpu", dtype="float32")
        recipe = Recipe.of(steps=args.cram_steps, start="noise")
        row = horizon(lm, stream, 1, 64, args.passages, recipe)
    return {
        "valid": round(valid_loss(trained, stream), 4),
        "width": lm.width,
        "horizon": row["tokens_per_vector"],
        "bits": row["bits_per_vector"],
        "bits_per_dimension": [round(b / lm.width, 3) for b in row["bits_per_vector"]],
    }


def trained_to(plan: Plan, streams, scale: float = 1.0) -> Iterator[tuple[Trained, dict]]:
    """Train one model. Yields the model at each stop of the plan, with a record of the training.

    Stops at the same step are merged. `scale` multiplies the tokens of the plan.
    """
    trained = Trained(plan)
    parameters = sum(p.numel() for p in trained.lm.parameters())
    planned_tokens = plan.tokens or plan.flops / (6 * parameters)
    steps = max(10, round(planned_tokens * scale / plan.tokens_per_step))
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    # The constants of the memory task below are the defaults of recipe.py.
    tokens, target, accuracy = 0, 7.0, 0.0
    share_at = {round(share * steps): share for share in plan.stops}
    for step in range(steps + 1):
        if step in share_at:
            record = {"step": step, "of": steps, "share": share_at[step], "tokens": tokens}
            record |= {"parameters": parameters, "encoder_length": round(target, 1)}
            yield trained, record | {"encoder_accuracy": round(accuracy, 3)}
        if step == steps:
            break
        rate = plan.lr * min((step + 1) / plan.warmup, 1.0, (steps - step) / (0.2 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        memory = step >= plan.memory_from * steps
        budget = plan.tokens_per_step // (2 if memory else 1)
        crops = crops_of(streams["train"], plan, budget, generator(plan.seed, "text", step))
        with torch.autocast("cpu", torch.bfloat16):
            trained.text_loss(crops).backward()
        tokens += crops.numel()
        if memory:
            rng = generator(plan.seed, "memory", step)
            share = 0.5 + 2.5 * float(torch.rand((), generator=rng))
            T = min(max(round(share * target), 4), 64)
            # The encoder and the decoder each read the passage.
            ids, odd_count = passage_batch(
                streams["train"], max(1, budget // (2 * T + 2)), T, 0.1, 2048, rng
            )
            with torch.autocast("cpu", torch.bfloat16):
                loss, right = trained.memory_loss(ids, 0.04, rng, odd_count)
            loss.backward()
            if share > 0.8 and right > 0.88:
                target = min(target * 1.02, 64.0)
            elif share < 1.2 and right < 0.7:
                target = max(target / 1.02, 4.0)
            if 0.8 < share < 1.2:
                accuracy += 0.2 * (right - accuracy)
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def options_of(args) -> dict:
    """The options that the rows of all models depend on."""
    return {"n": args.passages, "cram_steps": args.cram_steps, "scale": args.scale}


def refuse_other_rows(rows: list[dict], names: list[str], plans: dict[str, Plan], args) -> None:
    """Raise MemvecError if a row of the table was measured with other options."""
    for row in rows:
        what, remedy = f"{row['model']} in shapes.jsonl", "use another --work"
        refuse_others(what, row, options_of(args), remedy)
        if row["model"] in names:
            refuse_others(what, row.get("plan", {}), asdict(plans[row["model"]]), remedy)


def run(name: str, plan: Plan, tokenizer, streams, args) -> list[dict]:
    """Train one model, and measure it at its stops."""
    began, rows = time.monotonic(), []
    for trained, reached in trained_to(plan, streams, args.scale):
        row = {"model": name, **reached, **options_of(args), "plan": asdict(plan)}
        row |= measure(trained, tokenizer, streams["valid"], args)
        rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown, with a line for each model."""
    shares = [f"{share:.0%}" for share in MEASURED_AT]
    lines = [
        "| model | parameters | D | tokens read | valid loss | "
        + " | ".join(f"tokens held at {share}" for share in shares)
        + " | text bits per dimension |",
        "|---|---|---|---|---|" + "---|" * (len(shares) + 1),
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = sorted((r for r in rows if r["model"] == name), key=lambda r: r["share"])
        last = of_model[-1]
        held = " | ".join(f"{r['horizon'][0]:.1f}" for r in of_model[:-1])
        lines.append(
            f"| {name} | {last['parameters'] / 1e6:.1f} M | {last['width']} "
            f"| {last['tokens'] / 1e6:.2f} M | {last['valid']:.2f} | {held} "
            + "| {:.1f} [{:.1f}, {:.1f}] ".format(*last["horizon"])
            + "| {:.2f} [{:.2f}, {:.2f}] |".format(*last["bits_per_dimension"])
        )
    return "\n".join(lines) + "\n"


def main():
    """Train and measure the chosen models, and write the table."""
    parser = arguments(__doc__, Path(__file__))
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the tokens of training")
    parser.add_argument(
        "--cram-steps", type=int, default=200, help="of cramming a passage; default: 200"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default: all"
    )
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    plans = read(args.spec)
    names = chosen_names(args, plans)
    tokenizer, streams = prepare(args.corpus, args.work, 2048)
    rows_file = args.work / "shapes.jsonl"
    rows = (
        [json.loads(line) for line in rows_file.read_text().splitlines()]
        if rows_file.exists()
        else []
    )
    if not args.table:
        refuse_other_rows(rows, names, plans, args)
    measured = {row["model"] for row in rows}
    for name in [] if args.table else names:
        if name not in measured:
            rows += (new_rows := run(name, plans[name], tokenizer, streams, args))
            with rows_file.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new_rows))
    (args.work / "shapes.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    in_environment()
    run_program(main)
