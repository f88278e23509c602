"""The papers' values from published.json, with conversion to bits."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
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


def table1(model: str, source: str, K: int = 1) -> dict[str, Any] | None:
    """Table 1 for a model and source: longest, token_gain (mean, sd), gain_bits (mean, sd).

    For K > 1 the values of Figure 4, which has PG-19 only and no sd (None); a gain that is not
    published is None.
    """
    if K > 1:
        return _figure4(model, K) if source == "pg19" else None
    entry = published()["table1"]["values"].get(model, {}).get(source)
    if entry is None:
        return None
    return _with_bits(entry["longest"], tuple(entry["token_gain"]), tuple(entry["gain_nats"]))


def progressive(model: str, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Progressive cramming of a model by Tarasov et al.: tokens and gain_bits (mean, spread), n.

    `arm` names the preset whose values they are. It is the method that `recipe` (fields of a
    Recipe) has too, or plain progressive cramming if theirs has no result with it.
    """
    arms = published()["progressive"]["values"].get(model)
    if arms is None:
        return None
    own = ("alignment", recipe.get("term")), ("low-dim", recipe.get("coordinates"))
    arm = " ".join(name for name, value in own if value == name)
    arm = arm if arm in arms else "progressive"
    return {"arm": arm, **arms[arm]}


def _figure4(model: str, K: int) -> dict[str, Any] | None:
    entry = published()["vectors"]["values"].get(model)
    if entry is None or K not in entry["K"]:
        return None
    i = entry["K"].index(K)
    gains = [
        (entry[name][i], None) if i < len(entry[name]) else None
        for name in ("token_gain", "gain_nats")
    ]
    return _with_bits(entry["longest"][i], *gains)


def _with_bits(longest: int, token_gain: Any, nats: Any) -> dict[str, Any]:
    as_bits = None if nats is None else tuple(None if v is None else bits(v) for v in nats)
    return {
        "longest": longest,
        "token_gain": token_gain,
        "gain_nats": nats,
        "gain_bits": as_bits,
    }
