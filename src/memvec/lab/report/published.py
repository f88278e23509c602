"""The paper's values, shipped as data with their source, in the units of the rest: bits."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

from memvec.metrics import LN2


@functools.cache
def published() -> dict[str, Any]:
    """Everything published, as printed (nats where the paper prints nats)."""
    text = files("memvec.lab.report").joinpath("published.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def bits(nats: float) -> float:
    """Nats to bits; the published 'bits' are nats."""
    return nats / LN2


def table1(model: str, source: str) -> dict[str, Any] | None:
    """Table 1 for a model and source: longest, token_gain (mean, sd), gain_bits (mean, sd)."""
    entry = published()["table1"]["values"].get(model, {}).get(source)
    if entry is None:
        return None
    mean, sd = entry["gain_nats"]
    return {
        "longest": entry["longest"],
        "token_gain": tuple(entry["token_gain"]),
        "gain_nats": (mean, sd),
        "gain_bits": (bits(mean), bits(sd)),
    }
