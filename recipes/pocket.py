"""Make the built-in model `pocket`: a small OLMo 2 trained to give back what vectors hold.

One command, from the repository root, on any machine with two cores:

    python recipes/pocket.py                          # train and export
    python recipes/pocket.py --corpus my_texts/       # from a folder of .txt files
    python recipes/pocket.py --twin                   # afterwards: the plain twin, for comparison
    python recipes/pocket.py --device cuda --hidden-size 512 ...     # another shape, on a GPU
    python recipes/evaluate.py                        # the numbers of the card

Notable:
- three parts. *Trunk*: ordinary text. *Memory*: each step mixes ordinary text with passages that
  the model encodes into K of its own input vectors and gives back from them alone. *Decay*: as
  memory, the learning rate going linearly to zero. The rate is flat before the decay, so a run can
  be cut short: stop it, and start it again with fewer --steps; it resumes where it was;
- K vectors hold a passage in K equal parts, each encoded alone; the decoder reads them in order;
- passages grow with success: each K has a target length that rises while the model gives such
  passages back and falls while it does not;
- Muon for the matrices of the layers, AdamW for embedding, norms and encoder; float32 weights,
  bfloat16 products (autocast);
- what a step trains on depends on the seed and the step's number alone, so a run is repeatable up
  to the order of float sums;
- lengths lie on a grid of four to the octave, so that few shapes occur, and on a GPU each shape is
  a graph that is captured once (`graphs.py`). A step's losses are read after the next has begun.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT = {
    # threads that spin at barriers stall each other as soon as the machine has other work: a
    # product of two 384 x 384 matrices took 20 times as long beside one busy process
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "1000",
    # glibc gives large blocks back to the kernel after each step and takes them again in the
    # next: half of the time on this kind of work
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def in_environment():
    """Start this program again with ENVIRONMENT, which is read only when a process starts."""
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ENVIRONMENT, **os.environ})


if __name__ == "__main__":
    in_environment()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from corpus import BOS, generator, ordinary_batch, passage_batch, prepare, windows  # noqa: E402
from decoder import Decoder, Shape  # noqa: E402
from export import export  # noqa: E402
from graphs import Graphs  # noqa: E402
from optimizers import optimizers  # noqa: E402

# How many vectors a passage may have, and how many of its tokens each may hold.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
LENGTHS = sorted({2, 3} | {round(4 * 2 ** (i / 4)) for i in range(33)})


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training run; each field is a flag of the command line."""

    trunk_steps: int = 200
    """Steps of ordinary text before the memory task begins."""
    steps: int = 1500
    """Steps in all, trunk and decay included."""
    minutes: float = 0.0
    """Training ends after so long, with all parts of the plan shortened alike; 0: after `steps`."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the learning rate goes to zero."""
    warmup_steps: int = 40
    trunk_tokens: int = 4096
    """Ordinary tokens per step while there is no memory task."""
    text_tokens: int = 2048
    """Ordinary tokens per step beside the memory task."""
    memory_tokens: int = 4096
    """Positions per step of the memory task, encoder and decoder pass together."""
    lr_matrices: float = 2e-3
    lr_rest: float = 3e-3
    lr_encoder: float = 1e-3
    max_vectors: int = 4
    """K is one of COUNTS, up to this."""
    single_share: float = 0.35
    """Share of steps with K = 1; the others are equally often."""
    least_share: float = 0.8
    """The target length of K vectors is at least this much of K times that of one vector."""
    first_target: float = 7.0
    """Target length, in tokens, that each K starts with."""
    rise_above: float = 0.88
    fall_below: float = 0.7
    """Teacher-forced accuracy near the target length that moves the target up or down."""
    shortest: float = 0.5
    longest: float = 1.4
    """Passage lengths are drawn between these multiples of the target ..."""
    short_share: float = 0.0
    """Share of memory steps with shorter passages, down to four tokens, each octave equally often.

    Without them an encoder whose target has become long no longer knows short passages.
    """
    wide_from: int = 500
    longest_wide: float = 3.0
    """... and up to this one from this step on: long passages teach more, once short ones work."""
    noise: float = 0.04
    """Gaussian noise on the vectors, as a share of their RMS, so that near misses decode too."""
    odd_share: float = 0.1
    """Share of passages that are not running text."""
    most_tokens: int = 64
    """No passage has more tokens per vector."""
    trigger_share: float = 0.0
    """Share of memory steps in which <s> stands between the vectors and the passage."""
    use_share: float = 0.0
    """Share of memory steps in which the vectors stand before what follows the passage ..."""
    use_tokens: int = 48
    """... for so many tokens, and the model is to say what it says behind the passage itself."""
    inner_share: float = 0.0
    """Share of memory steps in which the vectors first take `inner_steps` steps of descent."""
    inner_steps: int = 2
    inner_rate: float = 0.4
    """Length of the first of these steps, as a share of the vectors' size; it falls to zero."""
    long_crop: int = 512
    """Every fourth step reads ordinary text in crops of this length, the others of 256."""
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 10
    """Steps between two lines of the log."""


class Encoder(nn.Module):
    """Reads [mem] vectors off the model's own hidden state behind each part of a passage.

    Every part goes through the model alone, followed by the summary embedding, so that K > 1 builds
    on what K = 1 has learned. (Reading K vectors behind the whole passage, tried for 450 steps on
    passages below 24 tokens: 39 % of 24 tokens right with K = 4, 37 % with K = 1.)
    """

    def __init__(self, width: int):
        super().__init__()
        self.summary = nn.Parameter(0.05 * torch.randn(1, width))
        self.map = nn.Linear(width, width)
        # starts small and close to what an embedding looks like; its size is then learnt
        nn.init.zeros_(self.map.bias)
        with torch.no_grad():
            self.map.weight.copy_(0.1 * torch.eye(width))

    def forward(self, model: Decoder, embedded, K: int):
        """embedded (B, T, D), T a multiple of K → [mem] vectors (B, K, D)."""
        B, T, D = embedded.shape
        parts = embedded.reshape(B * K, T // K, D)
        summary = self.summary.to(embedded.dtype).expand(B * K, 1, D)
        return self.map(model(torch.cat((parts, summary), dim=1))[:, -1]).view(B, K, D)


def embed(model: Decoder, ids):
    """(B, T) → (B, T, D) in the dtype of the residual stream."""
    # not F.embedding, whose backward sorts the ids
    rows = model.embedding.index_select(0, ids.flatten())
    return rows.view(*ids.shape, -1).bfloat16()


def text_loss(model: Decoder, ids):
    """Mean cross-entropy, nats per token, of crops ids (B, T)."""
    hidden = model(embed(model, ids)[:, :-1])
    logits = F.linear(hidden, model.embedding)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def passage_logits(model: Decoder, vectors, embedded, trigger: bool):
    """Logits (B, T, V) of a passage's tokens behind K vectors (B, K, D), and <s> with `trigger`."""
    parts = [vectors.to(embedded.dtype), embedded[:, :-1]]
    if trigger:
        parts.insert(1, embed(model, embedded.new_full((len(embedded), 1), BOS, dtype=torch.long)))
    inputs = torch.cat(parts, dim=1)
    return F.linear(model(inputs)[:, -embedded.shape[1] :], model.embedding)


def descended(model: Decoder, vectors, embedded, ids, recipe: Recipe, trigger: bool):
    """The vectors (B, K, D) after some steps of cramming; the gradient passes the steps by.

    Each step is as long as a share of the vector's own size, whatever the size of its gradient.
    """
    moved = vectors.detach()
    size = moved.float().pow(2).mean(-1, keepdim=True).sqrt()
    for step in range(recipe.inner_steps):
        leaf = moved.requires_grad_()
        logits = passage_logits(model, leaf, embedded.detach(), trigger)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient.float()
        unit = gradient / gradient.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        rate = recipe.inner_rate * (1 - step / recipe.inner_steps)
        moved = (moved - rate * size * unit).detach()
    return vectors + (moved - vectors.detach())


def noisy(vectors, noise, share: float):
    """The vectors (B, K, D) with standard noise (B, K, D), times a share of the vectors' RMS."""
    rms = vectors.detach().float().pow(2).mean().sqrt()
    return vectors + share * rms * noise


def memory_loss(model: Decoder, encoder: Encoder, ids, noise, recipe: Recipe, *, inner, trigger):
    """Passages ids (B, T) through K vectors and back: mean loss, right arg-maxes (B, T).

    noise (B, K, D) is drawn from a standard normal distribution.
    """
    K = noise.shape[1]
    embedded = embed(model, ids)
    vectors = encoder(model, embedded, K)
    if inner:
        vectors = descended(model, vectors, embedded, ids, recipe, trigger)
    logits = passage_logits(model, noisy(vectors, noise, recipe.noise), embedded, trigger)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    return loss, logits.detach().argmax(-1) == ids


def use_loss(model: Decoder, encoder: Encoder, ids, following, noise, recipe: Recipe):
    """KL, nats per token, of what follows (B, C) passages (B, T): behind <s> and text, to vectors.

    The first of the following tokens is not counted: behind the vectors alone comes the passage.
    noise (B, K, D) is drawn from a standard normal distribution.
    """
    K = noise.shape[1]
    embedded, behind = embed(model, ids), embed(model, following)
    vectors = noisy(encoder(model, embedded, K), noise, recipe.noise)
    seen = torch.cat((vectors.to(embedded.dtype), behind[:, :-1]), dim=1)
    logits = F.linear(model(seen)[:, K:], model.embedding)
    with torch.no_grad():
        start = embed(model, ids.new_full((len(ids), 1), BOS))
        text = torch.cat((start, embedded, behind[:, :-1]), dim=1)
        behind_text = F.linear(model(text)[:, 1 + ids.shape[1] :], model.embedding)
    return F.kl_div(
        logits.float().log_softmax(-1).flatten(0, 1),
        behind_text.float().log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )


@dataclass
class StepRecord:
    """The losses of a step, still on the device, and the sizes of its passages."""

    values: dict = field(default_factory=dict)
    """Name → tensor."""
    K: int = 0
    T: int = 0
    share: float = 0.0
    """T over the target length."""
    inner: bool = False


@dataclass
class Run:
    """All that a checkpoint holds: model, encoder, optimisers, step, target lengths."""

    recipe: Recipe
    shape: Shape
    device: str = "cpu"

    def __post_init__(self):
        torch.manual_seed(self.recipe.seed)
        # made on the CPU, so that a seed means the same weights everywhere
        self.model = Decoder(self.shape).to(self.device)
        self.encoder = Encoder(self.shape.hidden_size).to(self.device)
        matrices = [p for p in self.model.model.layers.parameters() if p.dim() == 2]
        inside = {id(p) for p in matrices}
        other_parameters = [p for p in self.model.parameters() if id(p) not in inside]
        recipe = self.recipe
        self.optimizers = optimizers(
            matrices,
            recipe.lr_matrices,
            [
                (other_parameters, recipe.lr_rest),
                ([self.encoder.summary], recipe.lr_rest),
                (self.encoder.map.parameters(), recipe.lr_encoder),
            ],
            self.device,
        )
        self.base_rates = [[float(g["lr"]) for g in opt.param_groups] for opt in self.optimizers]
        self.parameters = [*self.model.parameters(), *self.encoder.parameters()]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.graphs = Graphs(self.device)
        self.step = 0
        self.tokens = {"text": 0, "memory": 0}
        counts = [K for K in COUNTS if self.recipe.max_vectors >= K]
        self.targets = {K: self.recipe.first_target * K for K in counts}
        # passages whose vectors are crammed a little may be longer: targets of their own
        self.inner_targets = dict(self.targets)
        self.accuracy = dict.fromkeys(self.targets, 0.0)
        self.seconds = 0.0
        self.unread = StepRecord()

    def save(self, path: Path):
        state = {
            "model": self.model.state_dict(),
            "encoder": self.encoder.state_dict(),
            "optimizers": [opt.state_dict() for opt in self.optimizers],
            "progress": (self.step, self.tokens, self.targets, self.accuracy, self.seconds),
            "inner_targets": self.inner_targets,
            "shape": dataclasses.asdict(self.shape),
            "recipe": dataclasses.asdict(self.recipe),
        }
        aside = path.with_suffix(".part")
        torch.save(state, aside)
        aside.replace(path)

    def load(self, path: Path):
        state = torch.load(path, weights_only=True, map_location=self.device)
        try:
            self.model.load_state_dict(state["model"])
            self.encoder.load_state_dict(state["encoder"])
            for opt, saved in zip(self.optimizers, state["optimizers"], strict=True):
                opt.load_state_dict(saved)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(
                f"{path} is of another shape or recipe: use another --work."
            ) from error
        self.step, self.tokens, self.targets, self.accuracy, self.seconds = state["progress"]
        self.inner_targets = state["inner_targets"]

    def begin_with(self, folder: Path):
        """Take over the weights of an exported folder; the optimisers begin anew."""
        try:
            weights, encoder = (
                load_file(folder / f"{name}.safetensors", device=self.device)
                for name in ("model", "encoder")
            )
            weights.pop("lm_head.weight", None)  # tied
            self.model.load_state_dict(weights)
            self.encoder.load_state_dict(encoder)
        except FileNotFoundError as error:
            raise SystemExit(f"--begin {folder}: it has no model and encoder.") from error
        except RuntimeError as error:
            raise SystemExit(f"--begin {folder}: that model has another shape.") from error

    def half_width(self):
        """bfloat16 products, float32 weights."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    @property
    def progress(self) -> float:
        """Share of the plan that is done, by steps or by time, whichever is more."""
        recipe = self.recipe
        timed = self.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
        return max(self.step / recipe.steps, timed)

    def before(self, planned: int) -> bool:
        """True until the step `planned` of a plan of `steps` steps."""
        return self.progress < planned / self.recipe.steps

    def set_rates(self):
        """Warm up, stay, then decay linearly to zero at the last step."""
        recipe = self.recipe
        left = max(0.0, 1 - self.progress) / recipe.decay_share
        factor = min((self.step + 1) / recipe.warmup_steps, 1.0, left)
        for opt, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"].fill_(rate * factor)
        return factor

    def on_device(self, ids):
        """Token ids, copied without waiting for the device."""
        return ids.pin_memory().to(self.device, non_blocking=True) if self.graphs.on_gpu else ids

    def add_gradients(self, name, losses, *inputs):
        """Add the gradients of the first value of losses(*inputs); returns all its values.

        `name` distinguishes graphs for inputs of the same shapes.
        """

        def work(*inputs):
            with self.half_width():
                loss, *others = losses(*inputs)
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            pairs = [
                (p.grad, g)
                for p, g in zip(self.parameters, gradients, strict=True)
                if g is not None
            ]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
            return loss.detach(), *others

        return self.graphs(name, work, *inputs)

    def move(self):
        """A step of both optimisers; the gradients are zero afterwards."""
        for opt in self.optimizers:
            opt.step()
        torch._foreach_zero_([p.grad for p in self.parameters])
        return ()

    def train_step(self, stream, memory: bool) -> dict:
        """One step on the training stream (tokens,); returns the log record of the step before."""
        seen = {"lr": self.set_rates()}
        record = self.begin(stream, memory)
        seen |= self.settle()
        self.unread = record
        return seen

    def settle(self) -> dict:
        """The log record of the last step, or {} if it was read already."""
        record, self.unread = self.unread, StepRecord()
        return self.read(record)

    def begin(self, stream, memory: bool) -> StepRecord:
        """Start a step on the device without waiting for its results."""
        recipe, step = self.recipe, self.step
        in_trunk = self.before(recipe.trunk_steps)
        rng = generator(recipe.seed, "text", step)
        budget = recipe.trunk_tokens if in_trunk else recipe.text_tokens
        # attention costs as the square of the length: long crops in every fourth step only
        length = min(recipe.long_crop, budget) if step % 4 == 3 else 256
        crops = ordinary_batch(stream, budget, length, rng)
        record = StepRecord()
        if memory and not in_trunk:
            rng = generator(recipe.seed, "memory", step)
            use = recipe.use_share > 0 and float(torch.rand((), generator=rng)) < recipe.use_share
            record = (self.use_step if use else self.memory_step)(stream, rng)
        (record.values["text"],) = self.add_gradients(
            "text", lambda ids: (text_loss(self.model, ids),), self.on_device(crops)
        )
        self.tokens["text"] += crops.numel()
        self.graphs("move", self.move)
        self.step += 1
        return record

    def read(self, record: StepRecord) -> dict:
        """Wait for the results of a step and adjust the target length of its K."""
        recipe = self.recipe
        values = {name: value.item() for name, value in record.values.items()}
        if "right" not in values:
            return values
        K, accuracy = record.K, values.pop("right")
        targets = self.inner_targets if record.inner else self.targets
        # K > 1 come up less often, so they take larger steps
        factor = 1.02 if K == 1 else 1.04
        if record.share > 0.8 and accuracy > recipe.rise_above:
            targets[K] = min(self.target(targets, K) * factor, float(recipe.most_tokens) * K)
        elif record.share < 1.2 and accuracy < recipe.fall_below:
            targets[K] = max(self.target(targets, K) / factor, 4.0)
        if 0.8 < record.share < 1.2 and not record.inner:
            self.accuracy[K] += 0.2 * (accuracy - self.accuracy[K])
        return {**values, f"K{K}": accuracy, f"T{K}": record.T}

    def draw_vectors(self, rng) -> int:
        """How many vectors hold the passages of a step."""
        several = torch.rand((), generator=rng) >= self.recipe.single_share
        more = [K for K in self.targets if K > 1]
        return more[int(torch.randint(len(more), (), generator=rng))] if several and more else 1

    def target(self, targets, K: int) -> float:
        """Target length of K vectors, which are of use only for what one cannot hold."""
        return max(targets[K], self.recipe.least_share * K * targets[1])

    def length(self, tokens: float, K: int, room: int = 2) -> int:
        """Tokens of a passage: K times one of LENGTHS, near `tokens`; `room` stays free."""
        min_tokens = 2 if K > 1 else 4
        max_tokens = (self.shape.max_position_embeddings - K - room) // K
        max_tokens = min(max_tokens, self.recipe.most_tokens)
        allowed = [n for n in LENGTHS if min_tokens <= n <= max_tokens] or [max_tokens]
        return K * min(allowed, key=lambda n: abs(math.log(n * K / tokens)))

    def noise_of(self, count: int, K: int):
        """Standard noise (B, K, D) of this step."""
        rng = generator(self.recipe.seed, "noise", self.step, self.device)
        size = (count, K, self.shape.hidden_size)
        return torch.randn(size, generator=rng, device=self.device)

    def use_step(self, stream, rng) -> StepRecord:
        """Adds the gradients of passages whose vectors stand before what follows them."""
        recipe = self.recipe
        K = self.draw_vectors(rng)
        # from a few tokens a vector up: what is usable is seldom near what is possible
        share, C = 0.05 + 1.15 * float(torch.rand((), generator=rng)), recipe.use_tokens
        T = self.length(share * self.targets[K], K, C + 1)
        count = recipe.memory_tokens // (2 * (T + C))
        both = self.on_device(windows(stream, count, T + C, rng))
        (loss,) = self.add_gradients(
            "use",
            lambda ids, following, noise: (
                use_loss(self.model, self.encoder, ids, following, noise, recipe),
            ),
            both[:, :T],
            both[:, T:],
            self.noise_of(count, K),
        )
        self.tokens["memory"] += both.numel()
        return StepRecord({"use": loss}, K, T)

    def memory_step(self, stream, rng) -> StepRecord:
        """Adds the gradients of one batch of passages."""
        recipe = self.recipe
        K = self.draw_vectors(rng)
        inner, trigger = (
            wanted > 0 and float(torch.rand((), generator=rng)) < wanted
            for wanted in (recipe.inner_share, recipe.trigger_share)
        )
        target = self.target(self.inner_targets if inner else self.targets, K)
        longest = recipe.longest if self.before(recipe.wide_from) else recipe.longest_wide
        span = longest - recipe.shortest
        share = recipe.shortest + span * float(torch.rand((), generator=rng))
        if float(torch.rand((), generator=rng)) < recipe.short_share:
            octaves = math.log2(max(recipe.shortest * target / 4, 1.0))
            share = 4 / target * 2 ** (octaves * float(torch.rand((), generator=rng)))
        T = self.length(share * target, K)
        passes = 2 + inner * recipe.inner_steps
        count = max(2, recipe.memory_tokens // (passes * (T + K)))
        ids, odd = passage_batch(stream, count, T, recipe.odd_share, self.shape.vocab_size, rng)

        def losses(ids, noise):
            loss, right = memory_loss(
                self.model, self.encoder, ids, noise, recipe, inner=inner, trigger=trigger
            )
            return loss, right[: count - odd].float().mean()

        loss, right = self.add_gradients(
            ("memory", inner, trigger), losses, self.on_device(ids), self.noise_of(count, K)
        )
        self.tokens["memory"] += ids.numel()
        return StepRecord({"memory": loss, "right": right}, K, T, T / target, inner)


@torch.no_grad()
def valid_loss(run: Run, stream, crops: int = 32, length: int = 256) -> float:
    """Nats per token on fixed crops of held-out text."""
    ids = ordinary_batch(stream, crops * length, length, generator(0, "valid", 0)).to(run.device)
    with run.half_width():
        return sum(text_loss(run.model, part).item() for part in ids.split(8)) / (len(ids) / 8)


def train(run: Run, streams: dict, work: Path, name: str, memory: bool) -> None:
    """Train to the last step; a JSON line every few steps, checkpoints that a next call resumes."""
    log = (work / f"{name}.jsonl").open("a", buffering=1)
    sums: dict[str, list] = {}
    last = time.monotonic()
    while run.progress < 1:
        for key, value in run.train_step(streams["train"], memory).items():
            sums.setdefault(key, []).append(value)
        now = time.monotonic()
        # the first step also compiles
        run.seconds, last = run.seconds + (now - last) * (run.step > 1), now
        if run.step % run.recipe.log_every == 0:
            record = {"step": run.step, "seconds": round(run.seconds, 1), **run.tokens}
            record = {f"tokens_{k}" if k in run.tokens else k: v for k, v in record.items()}
            record |= {key: round(sum(v) / len(v), 4) for key, v in sums.items()}
            record["targets"] = [round(v, 1) for v in run.targets.values()]
            record["inner_targets"] = [round(v, 1) for v in run.inner_targets.values()]
            record["accuracy"] = [round(v, 3) for v in run.accuracy.values()]
            print(json.dumps(record), file=log)
            sums = {}
        if run.step % run.recipe.checkpoint_every == 0 or run.progress >= 1:
            run.settle()
            loss = valid_loss(run, streams["valid"])
            if not math.isfinite(loss):
                raise SystemExit(
                    f"{name}: the loss is {loss} after step {run.step}; lower the rates"
                )
            print(json.dumps({"step": run.step, "valid": round(loss, 4)}), file=log)
            run.save(work / f"{name}.pt")
        if run.step == run.recipe.trunk_steps and memory:
            run.save(work / "trunk.pt")


def arguments():
    """The command line: paths, what to do, and every field of the recipe."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=root.parent / "shared/corpus/novels.parquet",
        help="parquet file with a text column, or a folder of .txt files",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=root / ".runs/pocket",
        help="token streams, checkpoints and logs; a run resumes from here",
    )
    parser.add_argument(
        "--out", type=Path, default=root / "src/memvec/pocket", help="where the finished model goes"
    )
    parser.add_argument(
        "--twin",
        action="store_true",
        help="train the plain twin from the trunk: same text, no memory task",
    )
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="export the last checkpoint as it stands, without training",
    )
    parser.add_argument(
        "--begin", type=Path, metavar="FOLDER", help="an exported model whose weights to begin with"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    for option in (*dataclasses.fields(Recipe), *dataclasses.fields(Shape)):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}", type=option.type, default=option.default
        )
    return parser.parse_args()


def main():
    """Prepare the corpus, train from the last checkpoint on, export."""
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
        run.load(args.work / "trunk.pt")
    elif args.begin:
        run.begin_with(args.begin)
    print(
        f"{name}: {sum(p.numel() for p in run.model.parameters()):,} parameters, "
        f"step {run.step} of {recipe.steps}, {len(streams['train']):,} training tokens"
    )
    if not args.export_only:
        with run.graphs.own_stream():
            train(run, streams, args.work, name, memory=not args.twin)
    if not args.twin or args.export_only:
        export(run, tokenizer, args.out)


if __name__ == "__main__":
    main()
