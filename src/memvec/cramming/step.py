"""One step for all slots: measure, decide, move.

    measure   vectors -> states -> loss and margin of each position; gradients reach vectors only
    decide    keep vectors that are better than the best so far, choose the tokens that count and
              their weights, and find passages that are done, failed or out of budget
    move      the optimiser moves the vectors of all other passages

Vectors are measured before they are moved, so the vectors that are kept are the measured ones,
already rounded to the storage dtype. `arms/reference.py` is the same loop for one passage with the
paper's choices.

The objective gives the loss, the schedule chooses the tokens that count, and the optimizer moves
the vectors; each is registered by name. Two design rules depend on this file: vectors are measured
before they are saved, and passages are independent. So no value of one row may reach another row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec import part_checks, registry
from memvec.cramming.batch import BatchState
from memvec.cramming.coordinates import Coordinates, as_stored
from memvec.cramming.objectives import objective_named, score
from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import with_padding
from memvec.cramming.schedules import Schedule
from memvec.cramming.terms import Term, TermLoss
from memvec.graphs import Graphs, Pass, whole_columns
from memvec.metrics import LN2
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.results import Score
from memvec.storage import Storage

TERM_MEAN = 0.9  # decay of the running mean of the second loss, which varies between queries


@dataclass(frozen=True)
class Measurement:
    """The results of one forward pass for B slots; N is B plus the padding rows."""

    decoding: Bool[Tensor, " B"]  # rows read in decoding mode; no token of the others is right
    within: Bool[Tensor, "B T"]  # columns that the passage uses; longer passages use the others
    states: Float[Tensor, "N T H"]  # attached to the parameters
    gradient: Float[Tensor, "N T H"]  # gradient of each position's loss at its state
    vectors: Float[Tensor, "B K D"]  # as stored
    loss: Float[Tensor, "B T"]
    margin: Float[Tensor, "B T"]
    term: TermLoss


class Step:
    """A callable that does one step of a batch with the parts that a recipe names.

    `module` computes the steps: the model itself, or a copy of its weights in a faster dtype. With
    a copy, passages that seem done are confirmed in the model's own dtype. `fixed_shapes` confirms
    all rows at once, so that rounding does not depend on how many seem done. `graphs` replays
    forward and backward passes (memvec.graphs).
    """

    def __init__(
        self,
        lm: FrozenLM,
        module: FrozenLM,
        recipe: Recipe,
        K: int,
        *,
        start_rule: StartRule,
        storage: Storage,
        fixed_shapes: bool = False,
        graphs: bool = False,
    ) -> None:
        self.fixed_shapes, self.keeps_shape = fixed_shapes, fixed_shapes or graphs
        self.lm, self.module, self.recipe, self.K = lm, module, recipe, K
        self.start_rule, self.storage = start_rule, storage
        self.given = int(start_rule == "first-token")  # leading tokens that are not predicted
        made = registry.made
        self.coordinates: Coordinates = made("coordinates", recipe.coordinates, recipe, K, lm)
        self.optimizer: Any = made("optimizer", recipe.optimizer, recipe)
        self.schedule: Schedule = made("schedule", recipe.schedule, recipe, K)
        self.objective = objective_named(recipe.objective)
        self.term: Term = made("term", recipe.term, lm, module, recipe, K, start_rule)
        self.run_pass: Pass = Graphs(self.forward, module, self.term) if graphs else self.forward
        # True if the losses of a step sum to -ln p(passage | vectors), in the model's own dtype.
        plain = (recipe.objective, recipe.schedule, recipe.temperature, recipe.stuck_after)
        measures_all = module is lm and recipe.objective_every == 1
        self.measures_passage = measures_all and plain == ("cross-entropy", "whole", 1.0, 0)

    def __call__(self, batch: BatchState, columns: int, padding_rows: int = 0) -> None:
        """One step of all slots, over `columns` predicted columns; changes `batch` in place.

        `padding_rows` empty rows are computed too, so that the batch keeps its shape.
        """
        measured = self.measure(batch, columns, padding_rows)
        newly_enlarged = self._update_progress(batch, measured, padding_rows)
        room = measured.within.sum(-1)  # columns beyond these were not measured in this step
        counted = self.schedule.counted(batch.schedule, batch.length).minimum(room).clamp_min(0)
        column = torch.arange(columns, device=counted.device)
        weight = self.objective.weights(
            column < counted[:, None], measured.margin, batch.target_margin
        ).masked_fill(~measured.decoding[:, None], 0)
        self._stop(batch, measured, weight)
        self._move(batch, measured, weight, counted, newly_enlarged, padding_rows=padding_rows)

    # ------------------------------------------------------------------ measure

    def measure(self, batch: BatchState, columns: int, padding_rows: int = 0) -> Measurement:
        """Losses, margins and gradients at the states, from one forward pass.

        The model reads the vectors as they will be stored.
        """
        B, decoding = len(batch), self.in_decoding_mode(batch)
        # A batch has as many columns as its longest passage needs. A passage uses only the columns
        # that it would have alone: otherwise its vectors would depend on the other slots.
        counted = self.schedule.counted(batch.schedule, batch.length)
        room = whole_columns(counted).minimum(batch.room).minimum(batch.length)
        within = torch.arange(columns, device=room.device) < room[:, None]
        parameters = batch.parameters.requires_grad_()
        with torch.enable_grad():
            vectors = as_stored(self.vectors_of(parameters), self.storage)
            ids = with_padding(batch.ids[:, : columns + self.given], padding_rows)
            rows = with_padding(vectors, padding_rows)
            temperature = self.schedule.temperature(batch.schedule, batch.target_margin)
            temperature = with_padding(temperature, padding_rows, self.recipe.temperature)
            with self.term.watching():
                states, scores = self.score_of(rows, ids, temperature, decoding)
            term = self.term.measure(rows, batch, columns, padding_rows)
        margin = scores.margin[:B].masked_fill(~decoding[:, None], -torch.inf)
        stored, loss = vectors.detach(), scores.loss[:B]
        return Measurement(decoding, within, states, scores.gradient, stored, loss, margin, term)

    def vectors_of(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The vectors of parameters, before they are rounded."""
        shape = (len(parameters), self.K, self.lm.numbers)
        vectors: Tensor = self.coordinates.vectors(parameters)
        part_checks.check_tensor("coordinates", self.recipe.coordinates, vectors, shape)
        return vectors

    def in_decoding_mode(self, batch: BatchState) -> Bool[Tensor, " B"]:
        """Rows that this step measures in decoding mode: all rows, unless a subclass differs."""
        return torch.ones_like(batch.stopped)

    def score_of(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "N n"],
        temperature: Float[Tensor, " N"],
        decoding: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "N T H"], Score]:
        """The forward pass in decoding mode; a subclass may leave out rows not in that mode."""
        return self.run_pass(vectors, ids, temperature)

    def forward(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "N n"],
        temperature: Float[Tensor, " N"] | None = None,
        lm: FrozenLM | None = None,
    ) -> tuple[Float[Tensor, "N T H"], Score]:
        """The states that predict the tokens, and their losses, margins and gradients.

        n is T, or T + 1 if the first token is given. `lm` computes the pass (None: `module`).
        Raises MemvecError as `FrozenLM.states` does.
        """
        lm = lm or self.module
        states, truth = lm.states(vectors, ids, self.start_rule), ids[:, self.given :]
        V = self.lm.vocab_size
        return states, score(lm.head, states, truth, self.recipe, temperature=temperature, V=V)

    def rehearse(self, tokens: int, batch_size: int) -> None:
        """Run one forward and backward pass of `batch_size` passages of `tokens` tokens."""
        device = self.lm.device
        vectors = torch.zeros(batch_size, self.K, self.lm.numbers, device=device).requires_grad_()
        ids = torch.zeros(batch_size, tokens, dtype=torch.long, device=device)
        with torch.enable_grad():
            states, scores = self.forward(vectors, ids)
        # .item() waits for the device.
        torch.autograd.grad(states, vectors, scores.gradient)[0].sum().item()

    # ------------------------------------------------------------------ decide

    def _update_progress(
        self, batch: BatchState, measured: Measurement, padding_rows: int
    ) -> Bool[Tensor, " B"]:
        """Keep better vectors, mark passages that are done, and advance the schedule.

        Returns the rows whose vectors must be enlarged now.
        """
        right = (measured.margin >= batch.target_margin[:, None]) & (measured.margin > 0)
        missed = (~right & measured.within).cumsum(-1)
        leading = ((missed <= batch.corrections[:, None]) & measured.within).sum(-1)
        all_right = leading >= batch.length
        reached = self.schedule.reached(leading, (right & measured.within).sum(-1))
        reached = torch.where(all_right, batch.length, reached)  # corrections count as right
        better, gained = self.schedule.record(batch.schedule, reached)
        better = self._better_by_term(batch, measured.term.loss, better, all_right)
        batch.vectors = torch.where(better[:, None, None], measured.vectors, batch.vectors)
        if self.measures_passage:
            bits = measured.loss.double().where(measured.within, 0).sum(-1) / LN2
            batch.min_mem_bits = torch.fmin(batch.min_mem_bits, bits.to(batch.min_mem_bits))
        # With `settle`, a passage is done from that step on if all its tokens were right once.
        settled = (batch.schedule.best >= batch.length) & (batch.steps >= self.recipe.settle)
        seem_done = settled if self.recipe.settle else all_right
        if self.module.model is not self.lm.model:
            seem_done = self.confirmed(batch, seem_done, padding_rows)
        batch.done = batch.done | seem_done
        return self.schedule.advance(batch.schedule, gained)

    def _better_by_term(
        self,
        batch: BatchState,
        loss: Float[Tensor, " B"],
        better: Bool[Tensor, " B"],
        all_right: Bool[Tensor, " B"],
    ) -> Bool[Tensor, " B"]:
        """Rows whose vectors are the best so far; updates the running mean of the second loss.

        These have more right tokens than before (`better`), or all tokens right and a smaller mean.
        """
        mean = TERM_MEAN * batch.term_mean + (1 - TERM_MEAN) * loss
        batch.term_mean = torch.where(torch.isfinite(batch.term_mean), mean, loss)
        better = better | (all_right & (batch.term_mean < batch.term_mean_of_best))
        batch.term_mean_of_best = torch.where(better, batch.term_mean, batch.term_mean_of_best)
        return better

    @torch.no_grad()
    def confirmed(
        self, batch: BatchState, seem_done: Bool[Tensor, " B"], padding_rows: int = 0
    ) -> Bool[Tensor, " B"]:
        """Of the rows that seem done, those that reach their margins in the model's own dtype.

        The target margin of the others is raised by a little more than what they lack.
        """
        rows = seem_done.nonzero()[:, 0]
        if not len(rows):
            return seem_done
        if self.fixed_shapes:
            rows = torch.arange(len(seem_done), device=seem_done.device)
        ids, length = with_padding(batch.ids[rows], padding_rows), batch.length[rows]
        vectors = with_padding(batch.vectors[rows], padding_rows)
        margin = self.forward(vectors, ids, lm=self.lm)[1].margin[: len(rows)]
        within = torch.arange(margin.shape[1], device=margin.device) < length[:, None]
        ranked = margin.masked_fill(~within, torch.inf).sort(-1).values
        smallest = ranked.gather(1, batch.corrections[rows][:, None])[:, 0]
        required = batch.margin_asked[rows]
        short = seem_done[rows] & ~((smallest >= required) & (smallest > 0))
        lacking = 1.25 * (required - smallest) + 0.01 * self.lm.logit_spread
        batch.target_margin[rows] += torch.where(short, lacking, 0.0)
        batch.schedule.best[rows] -= short.long()
        return seem_done.index_fill(0, rows[short], False)

    def _stop(self, batch: BatchState, measured: Measurement, weight: Float[Tensor, "B T"]) -> None:
        """Mark the rows whose loss is not finite, and all rows whose slot can be freed."""
        # The loss of a position without weight may be infinite, since its token may be padding.
        loss = (measured.loss * weight).where(weight != 0, 0).sum(-1) + measured.term.loss
        batch.failed = batch.failed | ~torch.isfinite(loss)
        over = (batch.steps >= self.recipe.steps) | self.schedule.out_of_patience(batch.schedule)
        if self.recipe.budget:
            over = over | (batch.spent >= self.recipe.budget)
        batch.stopped = batch.stopped | batch.done | batch.failed | over

    # ------------------------------------------------------------------ move

    def _move(
        self,
        batch: BatchState,
        measured: Measurement,
        weight: Float[Tensor, "B T"],
        counted: Int[Tensor, " B"],
        newly_enlarged: Bool[Tensor, " B"],
        *,
        padding_rows: int,
    ) -> None:
        """Move the passages that have not stopped, and charge them for the counted tokens."""
        moving = ~batch.stopped
        slope = measured.gradient.mul_(with_padding(weight, padding_rows)[..., None])
        outputs, slopes = [measured.states], [slope]  # slopes: gradients of the loss at outputs
        factor = with_padding(self.term.weight(batch), padding_rows)
        term_slopes = self.term.slopes(measured.term, counted, padding_rows)
        for output, grad in zip(measured.term.outputs, term_slopes, strict=True):
            outputs.append(output)
            slopes.append(grad * factor.reshape(-1, *(1 for _ in grad.shape[1:])).to(grad.dtype))
        gradient = self.gradient(outputs, batch, slopes)
        batch.parameters = self.enlarged(batch.parameters.detach(), newly_enlarged)
        arguments = (batch.optimizer, moving, batch.schedule.lr_scale)
        self.optimizer.step(batch.parameters, gradient, *arguments)
        # A passage is charged for its own counted tokens, not for the columns of longer passages.
        batch.steps = batch.steps + moving
        before = self.module.inputs_before(self.K, self.start_rule)
        spent = (counted + before) * measured.decoding + self.term.inputs(counted)
        batch.spent = batch.spent + spent * moving

    def gradient(
        self, outputs: Sequence[Tensor], batch: BatchState, slopes: Sequence[Tensor]
    ) -> Tensor:
        """The gradient (B, ...) at the parameters, from the gradients at `outputs` (`slopes`)."""
        (gradient,) = torch.autograd.grad(outputs, batch.parameters, slopes)
        return gradient

    @torch.no_grad()
    def enlarged(self, parameters: Tensor, rows: Bool[Tensor, " B"]) -> Tensor:
        """Parameters (B, ...) in which the vectors of `rows` have at least the size `lr_large`.

        Only their length changes, and they still give back the same tokens (docs/log.md). Without
        `lr_large` in the recipe, the parameters are returned unchanged.
        """
        if not self.recipe.lr_large:
            return parameters
        vectors = self.vectors_of(parameters)
        size = vectors.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)
        large = self.coordinates.parameters(vectors * (self.recipe.lr_large / size).clamp_min(1))
        rows = rows.reshape(-1, *(1 for _ in parameters.shape[1:]))
        return torch.where(rows, large, parameters)
