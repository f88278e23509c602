"""Vectors of another model, carried over by a linear map: how many steps do they save?

A linear map from the vectors of the origin model to those of this model is fitted on `pairs`
passages that the origin samples and both models cram (memvec.encoders.transfer). Each passage of
the study is crammed into the origin, and its vectors are mapped. The mapped vectors are decoded
directly, and cramming is continued from them; the row has the results of cramming from the recipe's
own start for comparison.

Each process that works on a cell fits the map once. The map depends on the cell alone, so rows do
not depend on the process that makes them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from pydantic import Field

from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.encoders.transfer import MIN_PAIRS, Transfer, check_same_tokens, fit_transfer
from memvec.lab import slow
from memvec.lab.protocols import protocol
from memvec.lab.protocols.protocol import Compared, Protocol, extra_of
from memvec.lab.report.data import Data, short
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.lab.sources.sampled import sampled_passages
from memvec.lab.study.spec import RunSpec
from memvec.loading import load_lm
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.model.mixed import BFLOAT16_AUTOCAST
from memvec.model.reading import StartRule
from memvec.statistics import mean_interval, ratio_of_means, share_interval

FIT_SEED = 77  # seed of the passages that the map is fitted on, which no source yields


class TransferProtocol(Protocol):
    """Steps from mapped vectors beside steps from the recipe's start."""

    preset = "default"
    changes = {"start": "noise"}  # noqa: RUF012
    extras = {  # noqa: RUF012
        "mapped": "K x D numbers of the vectors that the map made, number",
        "at_once": "leading tokens that decode freely from the mapped vectors, before any step",
        "steps_mapped": "steps from the mapped vectors until the passage is exact or given up",
        "exact_mapped": "1 if the passage is exact from there, else 0, number",
        "cosine": "cosine between the mapped vectors and those of the row, number",
        "explained": "share of the squared deviation of this model's vectors that the map explains "
        "(leave-one-out over the pairs)",
        "pairs": "passages that the map was fitted on, exact in both models, number",
        "origin_weights": "SHA-256 of the embeddings of the model that the map is from, text",
    }
    not_recomputed = (
        "mapped",
        "steps_mapped",
        "exact_mapped",
        "explained",
        "pairs",
        "origin_weights",
    )

    class Options(protocol.Options):
        """The origin model and the pairs of the fit."""

        origin: str = Field(description="model that the passages are crammed into first")
        pairs: int = Field(
            default=512, ge=MIN_PAIRS, description="passages that the map is fitted on"
        )
        origin_seed: int = Field(default=0, ge=0, description="seed of the starts in the origin")

    def problem(self, run: RunSpec) -> str | None:
        if run.recipe.get("start", "noise") in ("encoder", "auto"):
            return "compares mapped vectors with another start, so start cannot be an encoder's"
        if run.recipe.get("start_rule", "vectors") != "vectors":
            return "decodes mapped vectors with nothing after them, so start_rule is 'vectors'"
        if len(run.seeds) > 1:
            return "maps the vectors of one start: leave one of seeds"
        return None

    def crammed_besides(
        self, passages: int, tokens: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        # The pairs in both models; each passage twice in the origin, and once from its mapped
        # vectors. The origin counts as large as this model: nothing of it is loaded here.
        return 2 * int(options["pairs"]) + 3 * passages, tokens

    def extra_of_cell(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        recipe: Recipe,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        passage, K = sourced.passage, len(outcome.vectors)
        origin, seed, pairs = options["origin"], options["origin_seed"], options["pairs"]
        transfer = _fitted(lm, recipe, K, len(passage), origin, seed, pairs)
        truth = torch.tensor([passage.ids])
        mapped = transfer.encode(lm, truth, K)
        decoded = torch.tensor(decode_ids(lm, mapped, [len(passage)]))
        began = mapped_start(lm, transfer)
        recipe, storage = replace(recipe, start="encoder"), outcome.vectors.dtype
        (again,) = Engine(began, recipe, vectors=K, storage=storage).run([passage])
        flat = mapped.cpu().flatten().double()
        cosine = torch.cosine_similarity(flat, outcome.vectors.flatten().double(), dim=0)
        return {
            "mapped": mapped[0].tolist(),
            "at_once": int(horizon(decoded == truth)),
            "steps_mapped": again.steps,
            "exact_mapped": int(again.exact),
            "cosine": float(cosine),
            "explained": transfer.mapping.explained,
            "pairs": transfer.mapping.pairs,
            "origin_weights": transfer.origin.fingerprint.weights,
        }

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        """Recompute what the mapped vectors decode to; fit and cramming are not repeated."""
        mapped, truth = torch.tensor(stored["mapped"], dtype=torch.float32), passage.ids
        decoded = slow.greedy(passage.lm, mapped, [], len(truth))
        right = slow.leading(decoded, truth)
        _, margin = slow.teacher_forced(passage.lm, mapped, truth, "vectors")
        tied = bool((abs(margin) < slow.TIE).any())
        a, b = (v.flatten().double() for v in (mapped, passage.vectors))
        cosine = float(torch.cosine_similarity(a, b, dim=0))
        pairs = float(stored["pairs"])
        return [
            Compared(
                "at_once", [float(stored["at_once"])], [float(right)], [len(truth) if tied else 0.0]
            ),
            Compared("cosine", [float(stored["cosine"])], [cosine], [1e-5]),
            Compared("pairs", [pairs], [min(pairs, float(passage.options["pairs"]))], [0.0]),
        ]

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for (model, origin, series), part in _pairs(data, self.name):
            steps, mapped = (part[c].astype(float).tolist() for c in ("steps", "_steps_mapped"))
            whole = part["_at_once"] >= part["predicted"]
            at_once = share_interval(int(whole.sum()), len(part))
            lines.append(
                [
                    ("from", origin),
                    ("to", model),
                    ("source", series),
                    ("tokens", int(part["length"].iloc[0])),
                    ("K", int(part["vectors"].iloc[0])),
                    ("explained", float(part["_explained"].mean())),
                    ("cosine", float(part["_cosine"].mean())),
                    ("exact at once", str(at_once)),
                    ("tokens at once", mean_interval(part["_at_once"].tolist()).mean),
                    ("steps", float(part["steps"].mean())),
                    ("steps from the map", float(part["_steps_mapped"].mean())),
                    *interval("ratio", ratio_of_means(mapped, steps)),
                    ("pairs", int(part["_pairs"].iloc[0])),
                    ("n", len(part)),
                ]
            )
        return [
            Table.of(
                "transfer",
                "Vectors of another model through a linear map",
                "Explained: share of the vectors' squared deviation from their mean that the map "
                "explains, leave-one-out over the pairs. Exact at once: share of the n passages "
                "that decode whole from the mapped vectors. Steps: means until the passage is "
                "exact or given up, and their ratio with its 95 % interval (paired bootstrap over "
                "passages). Steps in the origin and those of the pairs are not counted.",
                lines,
            )
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels = []
        for (model, origin, series), part in _pairs(data, self.name):
            steps = part["steps"].astype(float).tolist()
            mapped = part["_steps_mapped"].astype(float).tolist()
            ends = [0.0, max(*steps, *mapped)]
            panels.append(
                Panel(
                    f"{origin} to {model}, {series}",
                    "steps from the recipe's start",
                    "steps from mapped vectors",
                    [Series("a passage", steps, mapped), Series("y = x", ends, ends, "dashed")],
                )
            )
        if not panels:
            return []
        return [
            Plot(
                "transfer",
                "Steps until exact from another model's vectors",
                "One point per passage. Below the dashed line the mapped start needs fewer steps.",
                panels,
            )
        ]


def mapped_start(lm: FrozenLM, transfer: Transfer) -> FrozenLM:
    """The model with the map as its encoder, so that an engine can start from mapped vectors."""
    view = copy.copy(lm)
    view.encoder = transfer
    return view


@functools.lru_cache(maxsize=4)
def _fitted(
    lm: FrozenLM, recipe: Recipe, K: int, length: int, origin: str, seed: int, pairs: int
) -> Transfer:
    """The map of a cell, from passages that the origin samples."""
    dtype = BFLOAT16_AUTOCAST if lm.autocast else str(lm.dtype).removeprefix("torch.")
    origin_lm = load_lm(origin, device=str(lm.device), dtype=dtype)
    check_same_tokens(origin_lm, lm)
    sampled = sampled_passages(origin_lm, pairs, length, seed=FIT_SEED)
    passages = [sourced.passage.ids for sourced in sampled]
    return fit_transfer(origin_lm, lm, passages, K, recipe, replace(recipe, seed=seed))


def _pairs(data: Data, name: str) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """((target, origin, series), rows) with the extra measurements as columns `_name`.

    The origin has its seed in its name unless that is 0, and a hash of its weights if models with
    other weights had the same name.
    """
    rows = data.restarts(name)
    for key in ("at_once", "steps_mapped", "cosine", "explained", "pairs", "origin_weights"):
        rows = rows.assign(**{f"_{key}": extra_of(rows, name, key)})
    for key in ("origin", "origin_seed"):
        rows = rows.assign(**{f"_{key}": data.option(rows, key)})
    several = rows.groupby("_origin")["_origin_weights"].transform("nunique") > 1
    rows = rows.assign(_weights=rows["_origin_weights"].astype(str).str[:8].where(several, ""))
    keys = ["model", "_origin", "_origin_seed", "_weights", "series", "length", "vectors"]
    for (model, origin, seed, weights, series, *_), part in rows.groupby(keys, sort=False):
        origin = short(str(origin)) + (f", seed {seed}" if seed else "")
        origin += f", weights {weights}" if weights else ""
        yield (str(model), origin, str(series)), part
