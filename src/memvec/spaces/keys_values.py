"""Keys and values in front of the passage: prefix tuning (Li & Liang 2021, arXiv 2101.00190).

A vector holds the entries of a model's cache for one position: a key and a value of each key-value
head, in every layer (`prefix`) or in one layer (`prefix-layer`). K vectors fill the model's own
DynamicCache before its forward pass, so the tokens after them have positions from K on, and the
model decodes with its own cache. The positions of the prefix have no hidden states and predict no
token, so one token is given before the first predicted one: BOS, or the passage's first token.

Keys and values are divided by units: powers of two near the root mean square of the keys, or of the
values, that the model itself computes in each layer. One learning rate then fits all layers, and
one integer scale fits each vector. The file stores the units.

With `prefix-layer`, the other layers hold at these K positions the keys and values of one token
(BOS, or token 0) repeated K times. These are the same for every passage, so all information about a
passage is in the one layer. Masking the positions in the other layers instead would need a mask per
layer, which few models accept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.errors import MemvecError, first_line
from memvec.model.agreement import agree, spread_ids
from memvec.model.lm import FrozenLM
from memvec.model.reading import Reading, StartRule

# Keys and values (1, heads, K, width) of each layer.
Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Entries:
    """The layout of a vector of W numbers: the keys and values of some layers in a cache."""

    layers: list[int]
    shapes: list[tuple[int, int]]  # (heads, width) of the keys, then of the values, of each layer
    unit: Float[Tensor, " W"]  # factor of each number in the cache

    @classmethod
    def of(cls, layers: list[int], tables: Sequence[Tensor], units: Sequence[int]) -> Entries:
        """The entries of `layers`, from sample keys and values (`tables`, in turn).

        `units` are exponents of two, one for each table.
        """
        shapes = [(int(t.shape[1]), int(t.shape[3])) for t in tables]
        sizes = [heads * width for heads, width in shapes]
        scales = [torch.full((n,), 2.0**unit) for n, unit in zip(sizes, units, strict=True)]
        # The units are on the device, because a copy at each step would make a GPU wait.
        return cls(layers, shapes, torch.cat(scales).to(tables[0].device))

    def vectors_of(self, cached: Layers) -> Float[Tensor, "K W"]:
        """The vectors of K cached positions, in units."""
        tables = [t[0] for layer in self.layers for t in cached[layer]]
        rows = torch.cat([t.transpose(0, 1).flatten(1).float() for t in tables], dim=-1)
        return rows / self.unit.to(rows.device)

    def cache(
        self, vectors: Float[Tensor, "B K W"], dtype: torch.dtype, constants: Layers | None = None
    ) -> Any:
        """A DynamicCache with the keys and values of `vectors`, differentiable.

        Other layers get `constants`, if given.
        """
        from transformers import DynamicCache  # here, since this import takes two seconds

        scaled = (vectors * self.unit.to(vectors.device)).to(dtype)
        sizes = [heads * width for heads, width in self.shapes]
        parts = iter(torch.split(scaled, sizes, dim=-1))
        shapes = iter(self.shapes)

        def table() -> Tensor:
            flat: Tensor = next(parts)
            return flat.reshape(*flat.shape[:2], *next(shapes)).transpose(1, 2)

        cache = DynamicCache()
        for layer in range(len(constants or self.layers)):
            if layer in self.layers:
                cache.update(table(), table(), layer)
            elif constants:
                keys, values = (t.to(vectors.device, dtype) for t in constants[layer])
                rows = (len(vectors), -1, -1, -1)
                cache.update(keys.expand(rows), values.expand(rows), layer)
        return cache


class KeysValues(Reading):
    """A key and a value of each key-value head in every layer.

    `options` may hold `units`: for each layer in turn, the exponents of two of the units of its
    keys and of its values. Without them, the units are measured. Raises MemvecError for a model
    whose cache holds no keys and values.
    """

    space = "prefix"
    enlarges = False
    predicts = False
    start_rules = ("bos", "first-token")

    def __init__(self, lm: FrozenLM, options: Mapping[str, Any]) -> None:
        self.lm = lm
        probe = _probed(lm, self.space)
        self.layers = self._trained(len(probe), options)
        tables = [table for layer in self.layers for table in probe[layer]]
        units = options.get("units")
        self.units = [_unit(t) for t in tables] if units is None else _checked(units, len(tables))
        self.options = {"units": self.units}
        self.entries = Entries.of(self.layers, tables, self.units)
        self._agrees(probe)

    def _trained(self, layers: int, options: Mapping[str, Any]) -> list[int]:
        """The layers whose keys and values are trained."""
        return list(range(layers))

    def _constants(self, K: int) -> Layers | None:
        """Keys and values of all layers for K positions; None if every layer is trained."""
        return None

    def numbers(self, lm: FrozenLM) -> int:
        """W: the sum over trained layers of the numbers of keys and values at one position."""
        return len(self.entries.unit)

    def inputs_before(self, K: int, start_rule: StartRule) -> int:
        """0: the prefix consists of keys and values, not of inputs."""
        return 0

    @torch.no_grad()
    def begun_at(self, lm: FrozenLM, vectors: Float[Tensor, "K D"]) -> Float[Tensor, "K W"]:
        """The keys and values, in units, that the model computes for these input vectors."""
        layers = keys_values(self.lm, vectors[None].to(self.lm.device, self.lm.dtype))
        return self.entries.vectors_of(layers).cpu()

    def cache(self, lm: FrozenLM, vectors: Float[Tensor, "B K W"] | None) -> Any:
        """A DynamicCache with these keys and values, differentiable; None without vectors."""
        if vectors is None:
            return None
        return self.entries.cache(vectors, lm.rounding, self._constants(vectors.shape[1]))

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K W"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """The embedded tokens only; keys and values are in the cache, before the inputs.

        Raises MemvecError for the start rule 'vectors'.
        """
        if vectors is None:
            return super().inputs(lm, None, ids, start_rule)
        if start_rule == "vectors":
            raise MemvecError(_nothing_before(self.space))
        given = lm.start_ids(ids, start_rule) if start_rule == "bos" else ids[:, :0]
        return lm.embed(torch.cat([given, ids[:, :-1]], 1))

    def opening(
        self, lm: FrozenLM, vectors: Float[Tensor, "B K W"], given: Int[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B N D"], Callable[[], Any]]:
        """The embedded given tokens, and a function that makes the cache with the prefix.

        Raises MemvecError if no token is given.
        """
        if not given.shape[1]:
            raise MemvecError(_nothing_before(self.space))
        return lm.embed(given), lambda: self.cache(lm, vectors.to(lm.device))

    @torch.no_grad()
    def _agrees(self, probe: Layers) -> None:
        """Raise MemvecError if the model's own keys and values, passed in, change its logits."""
        lm, ids = self.lm, spread_ids(self.lm.embedding, 7)
        tables = [table for layer in probe for table in layer]
        # All layers, whichever of them are trained, in units of 1.
        whole = Entries.of(list(range(len(probe))), tables, [0] * len(tables))
        two = [(keys[:, :, :2], values[:, :, :2]) for keys, values in probe]
        cache = whole.cache(whole.vectors_of(two)[None], lm.rounding)
        states = lm.states_of(lm.embed(ids[:, 2:-1]), keep=4, cache=cache)
        ok, detail = agree(lm.head(states), lm.own_logits(ids)[:, 2:-1], lm.rounding)
        if not ok:
            raise _unfit(lm, self.space, f"its own, handed in again, give others, {detail}")


class OneLayer(KeysValues):
    """A key and a value of each key-value head in one layer; other layers hold constants.

    `options`: `layer`, from 0; `filler`, the id of the token whose keys and values the other layers
    hold. Raises MemvecError if the model has no such layer or token.
    """

    space = "prefix-layer"

    def __init__(self, lm: FrozenLM, options: Mapping[str, Any]) -> None:
        super().__init__(lm, options)
        filler = options.get("filler", lm.bos_id or 0)
        if not isinstance(filler, int) or not 0 <= filler < lm.vocab_size:
            raise MemvecError(f"{lm.name} has no token {filler} for the layers without a prefix.")
        self.filler = filler
        self.options = {**self.options, "layer": self.layers[0], "filler": filler}
        self._kept: dict[int, Layers] = {}

    def _trained(self, layers: int, options: Mapping[str, Any]) -> list[int]:
        layer = options.get("layer", 0)
        if not isinstance(layer, int) or not 0 <= layer < layers:
            raise MemvecError(
                f"{self.lm.name} has layers 0 to {layers - 1}: no prefix stands in layer {layer}."
            )
        return [layer]

    @torch.no_grad()
    def _constants(self, K: int) -> Layers:
        if K not in self._kept:
            ids = torch.full((1, K), self.filler, device=self.lm.device)
            self._kept[K] = keys_values(self.lm, self.lm.embed(ids))
        return self._kept[K]


def keys_values(lm: FrozenLM, inputs: Float[Tensor, "1 K D"]) -> Layers:
    """Keys and values that a model computes for free inputs, one pair per layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    lm.states_of(inputs, keep=1, cache=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def _probed(lm: FrozenLM, space: str) -> Layers:
    """Keys and values of seven tokens. Raises MemvecError for a model that cannot give them."""
    if not lm.has_cache:
        raise _unfit(lm, space, "it decodes without a cache")
    if lm.checkpointing:
        raise _unfit(lm, space, "checkpointing computes layers twice, and a cache grows at each")
    inputs = lm.embed(spread_ids(lm.embedding, 7))
    try:
        layers = keys_values(lm, inputs)
        whole = layers and all(t.dim() == 4 and t.shape[2] == 7 for pair in layers for t in pair)
    except Exception as error:  # foreign code may raise any error
        raise _unfit(lm, space, f"its cache is of another kind: {first_line(error)}") from error
    if not whole:
        raise _unfit(lm, space, "its cache is of another kind")
    if len({table.device for pair in layers for table in pair}) > 1:
        raise _unfit(lm, space, "its layers lie on several devices")
    return layers


def _unit(table: Tensor) -> int:
    """The exponent of the power of two nearest to the root mean square; 0 without one."""
    size = float(table.float().square().mean().sqrt())
    return round(math.log2(size)) if size > 0 and math.isfinite(size) else 0


def _checked(units: Any, count: int) -> list[int]:
    """The units of a file. Raises MemvecError unless they are `count` integers from -64 to 64."""
    if not isinstance(units, list) or len(units) != count:
        raise MemvecError(f"a prefix in this model has {count} units, and its header has others.")
    if any(not isinstance(unit, int) or abs(unit) > 64 for unit in units):
        raise MemvecError("the units of a prefix are exponents of two, from -64 to 64.")
    return units


def _nothing_before(space: str) -> str:
    return (
        f"in the space '{space}' a token stands before the first predicted one: use the start "
        "rule bos or first-token, not vectors."
    )


def _unfit(lm: FrozenLM, space: str, reason: str) -> MemvecError:
    return MemvecError(
        f"{lm.name} keeps no keys and values that the space '{space}' could put a prefix in "
        f"({reason}): use the space 'inputs'."
    )
