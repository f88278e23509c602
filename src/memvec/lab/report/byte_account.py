"""Table 4: bytes of text over bytes stored, for vectors and for general compressors."""

from __future__ import annotations

import bz2
import heapq
import math
import zlib
from collections import Counter

import pandas as pd

from memvec.lab.compressors import xz_size
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report import published
from memvec.lab.report.data import Data, averaged
from memvec.lab.report.table import Table, TableLine
from memvec.statistics import share_interval

MAX_PASSAGES = 200  # of a group
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NOTE = (
    "Ratios: bytes of text divided by bytes stored, over the joined exact passages of the longest "
    "length (a passage with restarts counts as exact if all of them are). Arithmetic: an "
    "arithmetic coder driven by the same model (H_LM / 8; a first token that is given costs log2 V "
    "bits). A ratio below 1 means that the stored form is larger than the text."
)


def bytes_table(data: Data, *, compare: bool) -> Table:
    """One line for each model, series, protocol and K.

    Passages of different K are not joined, because one is the beginning of another, and a
    compressor would store the repeated part only once.
    """
    lines: list[TableLine] = []
    keys = ["model", "series", "protocol", "vectors"]
    for (model, source, protocol, k), group in averaged(data.rows).groupby(keys, sort=False):
        longest = group[group["length"] == group["length"].max()].drop_duplicates("passage")
        longest = longest.head(MAX_PASSAGES)
        places = zip(longest["cell"], longest["number"], strict=True)
        every = [data.store.passage(cell, number).text for cell, number in places]
        if None in every:
            continue
        came_back = longest["exact"] == 1
        exact = longest[came_back]
        texts = [
            text for text, back in zip(every, came_back, strict=True) if back and text is not None
        ]
        whole, size = b"\n".join(texts), sum(map(len, texts))
        K = int(str(k))
        vector = data.width(longest.iloc[0]) * NUMBER_BYTES[str(longest["storage"].iloc[0])]
        stored = {
            "zlib": len(zlib.compress(whole, 9)),
            "bz2": len(bz2.compress(whole, 9)),
            "lzma": xz_size(whole, preset=9),
            "huffman": _huffman_bits(whole) / 8,
            "arithmetic": _text_bits(exact, int(data.models[str(model)]["vocabulary"])) / 8,
            "vectors": _vectors(data, exact, str(protocol), K) * vector,
        }
        lines.append(
            [
                ("model", str(model)),
                ("source", str(source)),
                ("protocol", str(protocol)),
                ("K", K),
                ("passages", len(longest)),
                ("exact", str(share_interval(len(exact), len(longest)))),
                ("text bytes", size),
                *((way, size / b if size else None) for way, b in stored.items()),
            ]
        )
    note = NOTE
    if compare:
        values = published.published()["compression"]["values"]
        note += " Paper, PG-19: " + ", ".join(f"{k} {v['pg19']}" for k, v in values.items()) + "."
    return Table.of("bytes", "Byte accounting", note, lines)


def _text_bits(rows: pd.DataFrame, V: int) -> float:
    """Bits of all tokens of passages under the model; one that is given is any of V."""
    given = rows["tokens"] - rows["predicted"]
    return float(rows["lm_bits"].sum() + given.sum() * math.log2(V))


def _vectors(data: Data, rows: pd.DataFrame, protocol: str, K: int) -> int:
    """Number of vectors of these passages, where an m that a group shares counts once."""
    sizes = [protocol_of(protocol).group_size(options) for options in data.options(rows)]
    if not any(sizes):
        return len(rows) * K
    groups = {(c, n // s) for c, n, s in zip(rows["cell"], rows["number"], sizes, strict=True)}
    return len(rows) * (K - 1) + len(groups)


def _huffman_bits(data: bytes) -> int:
    """Bits of a static Huffman code over bytes, without its table (as in the paper's Table 4)."""
    heap = list(Counter(data).values())
    heapq.heapify(heap)
    total = len(data) if len(heap) == 1 else 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return max(total, 1)
