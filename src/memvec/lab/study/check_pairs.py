"""What a protocol measured between two restarts of a passage, computed again and compared."""

from __future__ import annotations

from memvec.cramming.starts import view_for
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.study.recompute import start_rule_of
from memvec.lab.study.spec import ModelKey
from memvec.lab.study.store import Store
from memvec.lab.study.stored_model import cell_of
from memvec.model.lm import FrozenLM
from memvec.writing import read_json

MAX_PAIRS = 200  # of restarts that are compared again when rows are sampled


def check_pairs(
    lm: FrozenLM, store: Store, of: ModelKey, limit: int, worst: dict[str, float]
) -> list[str]:
    """Sentences about measurements of pairs of a model's restarts that disagree.

    `limit` pairs are measured again, 0: all.
    """
    wrong = []
    pairs = store.db.execute(
        "SELECT first, second, number, accuracy FROM paths JOIN cells ON cell = first "
        "WHERE planned > 0 ORDER BY position, second, number"
    ).fetchall()
    cells = {key: cell_of(store, key)[1] for key in {key for pair in pairs for key in pair[:2]}}
    # Of cells whose settings were changed nothing can be computed.
    pairs = [p for p in pairs if all(cells[k].key == k for k in p[:2])]
    pairs = [pair for pair in pairs if cells[pair[0]].model_key == of]
    for first, second, number, text in pairs[: limit or None]:
        place = f"cells {first} and {second}, passage {number}"
        try:
            ids = store.passage(first, number).ids
            a, b = (store.tensors(key, number)[0] for key in (first, second))
        except MemvecError as error:
            wrong.append(f"{place}: {error}")
            continue
        cell = cells[first]
        if not (stored := _numbers(text)):
            wrong.append(f"{place}: what is between them is no list of numbers: {text:.100}.")
            continue
        if not all(0 <= i < lm.vocab_size for i in ids):
            wrong.append(f"{place}: a token of the passage is not one of {lm.name}.")
            continue
        view = view_for(lm, cell.to_recipe())
        again, allowed = protocol_of(cell.protocol).recompute_between(
            view, ids, a, b, start_rule_of(view, cell)
        )
        if len(stored) != len(again):
            wrong.append(f"{place}: {len(stored)} numbers are stored of {len(again)} between them.")
            continue
        gaps = [abs(x - y) for x, y in zip(stored, again, strict=True)]
        worst["paths"] = max(worst.get("paths", 0.0), *gaps)
        if any(not gap <= limit_ for gap, limit_ in zip(gaps, allowed, strict=True)):
            wrong.append(
                f"{place}: what is between them is stored as {stored} and recomputed as {again}."
            )
    return wrong


def _numbers(text: str) -> list[float]:
    """The numbers of a JSON list; none if it is another text."""
    try:
        return [float(value) for value in read_json(text)]
    except (TypeError, ValueError):
        return []
