"""One training step: the batches that it draws, their losses, and the record of the step before.

Notable:
- what a step draws depends on the seed and on the step's number;
- the losses of a step are read after the next step has begun, so that a GPU does not wait for them.

`pocket.py` imports this module; it is not run.
"""

import torch

from corpus import generator, ordinary_batch, passage_batch, windows
from losses import memory_loss, text_loss, use_loss
from run import Run, StepRecord


def train_step(run: Run, stream, memory: bool) -> dict:
    """Take one step on the training stream, ids (N,). Returns the log record of the step before.

    Without `memory` the step reads only ordinary text.
    """
    values = {"lr": run.set_rates()}
    record = begin(run, stream, memory)
    values |= settle(run)
    run.unread = record
    return values


def settle(run: Run) -> dict:
    """The log record of the last step, or {} if it was read already."""
    record, run.unread = run.unread, StepRecord()
    return read(run, record)


def begin(run: Run, stream, memory: bool) -> StepRecord:
    """Start a step on the device without waiting for its results."""
    recipe, step = run.recipe, run.step
    in_trunk = run.before(recipe.trunk_steps)
    rng = generator(recipe.seed, "text", step)
    budget = recipe.trunk_tokens if in_trunk else recipe.text_tokens
    # The cost of attention grows with the square of the length, so only every fourth step has long
    # crops.
    length = min(recipe.long_crop, budget) if step % 4 == 3 else 256
    crops = ordinary_batch(stream, budget, length, rng)
    record = StepRecord()
    if memory and not in_trunk:
        rng = generator(recipe.seed, "memory", step)
        use = recipe.use_share > 0 and float(torch.rand((), generator=rng)) < recipe.use_share
        record = (use_step if use else memory_step)(run, stream, rng)
    (record.values["text"],) = run.add_gradients(
        "text", lambda ids: (text_loss(run.model, ids),), run.on_device(crops)
    )
    run.tokens["text"] += crops.numel()
    run.graphs("move", run.move)
    run.step += 1
    return record


def read(run: Run, record: StepRecord) -> dict:
    """Wait for the results of a step and adjust the target length of its K."""
    values = {name: value.item() for name, value in record.values.items()}
    if "right" not in values:
        return values
    K, accuracy = record.K, values.pop("right")
    run.lengths.adjust(K, record.share, accuracy, inner=record.inner)
    return {**values, f"K{K}": accuracy, f"T{K}": record.T}


def noise_of(run: Run, count: int, K: int):
    """Standard normal noise of this step, for `count` passages: (count, K, D)."""
    rng = generator(run.recipe.seed, "noise", run.step, run.device)
    size = (count, K, run.shape.hidden_size)
    return torch.randn(size, generator=rng, device=run.device)


def use_step(run: Run, stream, rng) -> StepRecord:
    """Add the gradients of passages whose vectors are used as context (`losses.use_loss`)."""
    recipe = run.recipe
    K, C = run.lengths.draw_count(rng), recipe.use_tokens
    T = run.lengths.draw_used(K, C, rng)
    count = recipe.memory_tokens // (2 * (T + C))
    crops = run.on_device(windows(stream, count, T + C, rng))
    (loss,) = run.add_gradients(
        "use",
        lambda ids, following, noise: (
            use_loss(run.model, run.encoder, ids, following, noise, recipe),
        ),
        crops[:, :T],
        crops[:, T:],
        noise_of(run, count, K),
    )
    run.tokens["memory"] += crops.numel()
    return StepRecord({"use": loss}, K, T)


def memory_step(run: Run, stream, rng) -> StepRecord:
    """Add the gradients of passages that are given back from their vectors.

    The loss is `losses.memory_loss`. Only passages that are not odd count in the accuracy.
    """
    recipe = run.recipe
    K = run.lengths.draw_count(rng)
    inner, trigger = (
        wanted > 0 and float(torch.rand((), generator=rng)) < wanted
        for wanted in (recipe.inner_share, recipe.trigger_share)
    )
    T, share = run.lengths.draw(K, rng, inner=inner, wide=not run.before(recipe.wide_from))
    passes = 2 + inner * recipe.inner_steps
    count = max(2, recipe.memory_tokens // (passes * (T + K)))
    ids, odd = passage_batch(stream, count, T, recipe.odd_share, run.shape.vocab_size, rng)

    def losses(ids, noise):
        loss, right = memory_loss(
            run.model, run.encoder, ids, noise, recipe, inner=inner, trigger=trigger
        )
        return loss, right[: count - odd].float().mean()

    loss, right = run.add_gradients(
        ("memory", inner, trigger), losses, run.on_device(ids), noise_of(run, count, K)
    )
    run.tokens["memory"] += ids.numel()
    return StepRecord({"memory": loss, "right": right}, K, T, share, inner)
