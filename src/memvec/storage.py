"""How the numbers of [mem] vectors are stored: float32, bfloat16, float16, int8 or int4.

A storage defines the numbers that a reader of the file gets (`rounded`), the tensors of the file
(`pack`, `unpack`) and their size in bytes (`size`). The engine optimises and certification decodes
the result of `rounded`. `unpack` returns bit-identical numbers from a file, so the stored vectors
are the measured ones.

Integers are symmetric, with one scale per vector: number = code x scale, codes in -L..L with L 127
(int8) or 7 (int4, two codes per byte). The scale is the largest absolute number over L, rounded to
bfloat16. Its 8 significant bits make three things exact in float32: code x scale (15 bits), its
division by the scale, and the largest code, which is always L (L times a relative error of 2^-9 is
less than a half). Packing a rounded vector therefore changes nothing, and a file whose tensors
`pack` could not have made is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.errors import MemvecError, did_you_mean

SMALLEST_SCALE = torch.finfo(torch.bfloat16).smallest_normal  # below: vector is zero

PackingName = Literal["int8", "int4"]


@dataclass(frozen=True)
class Floats:
    """Floating-point numbers as they are, in one tensor `vectors` (P, K, D)."""

    name: str  # in STORAGES
    dtype: torch.dtype  # of the file, and of the vectors that are read from it
    packing: None = None

    def rounded(self, vectors: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """The vectors cast to the storage's dtype and back."""
        return vectors.to(self.dtype).to(vectors.dtype)

    def pack(self, vectors: Float[Tensor, "P K D"]) -> dict[str, Tensor]:
        """The tensor `vectors` in the storage's dtype."""
        return {"vectors": vectors.to(self.dtype).contiguous()}

    def unpack(self, tensors: dict[str, Tensor]) -> Float[Tensor, "P K D"]:
        """The tensor `vectors`. Raises ValueError if it has another dtype."""
        vectors = tensors["vectors"]
        if vectors.dtype != self.dtype:
            raise ValueError(f"stores {vectors.dtype} for {self.name}, which memvec does not write")
        return vectors

    def size(self, vectors: int, D: int) -> int:
        """Bytes of a number of vectors with D numbers each."""
        return vectors * D * self.dtype.itemsize


@dataclass(frozen=True)
class Integers:
    """Integer codes (P, K, D) and bfloat16 scales (P, K); 4-bit codes share a byte in pairs.

    A byte holds code + 8 of an even index in its low half and of the next index in its high half.
    For an odd D the last high half is 0, which no code uses, so the tensors alone determine D.
    """

    name: PackingName  # in STORAGES
    bits: int
    dtype: torch.dtype = torch.float32  # of the vectors that are read from a file

    @property
    def packing(self) -> PackingName:
        """The name: numbers are stored as integer codes."""
        return self.name

    @property
    def largest(self) -> int:
        """L: codes are -L..L."""
        return (1 << (self.bits - 1)) - 1

    def _codes(
        self, vectors: Float[Tensor, "*shape D"]
    ) -> tuple[Float[Tensor, "*shape D"], Float[Tensor, "*shape 1"]]:
        """Codes and scales, both in float32. A vector with a non-finite number has scale NaN."""
        scale = (vectors.abs().amax(-1, keepdim=True) / self.largest).to(torch.bfloat16).float()
        scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
        scale = torch.where(torch.isfinite(scale), scale, torch.nan)
        codes = torch.where(scale == 0, 0.0, (vectors / scale).round())
        # + 0.0 turns -0 into 0, as integer codes do.
        return codes.clamp(-self.largest, self.largest) + 0.0, scale

    def rounded(self, vectors: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """The nearest codes times the scale. Rounding again changes nothing."""
        codes, scale = self._codes(vectors)
        return codes * scale

    def pack(self, vectors: Float[Tensor, "P K D"]) -> dict[str, Tensor]:
        """`codes` (P, K, D) int8, or (P, K, ceil(D / 2)) uint8 for 4 bits; `scales` (P, K)."""
        numbers, scale = self._codes(vectors)
        codes = numbers.to(torch.int8)
        if self.bits == 4:
            halves = (codes + 8).to(torch.uint8)
            if halves.shape[-1] % 2:
                halves = torch.nn.functional.pad(halves, (0, 1))
            codes = halves[..., ::2] | halves[..., 1::2] << 4
        scales = scale[..., 0].to(torch.bfloat16)
        return {"codes": codes.contiguous(), "scales": scales.contiguous()}

    def unpack(self, tensors: dict[str, Tensor]) -> Float[Tensor, "P K D"]:
        """Codes times scales. Raises ValueError unless `pack` gives back the same tensors."""
        codes, scales = tensors["codes"], tensors["scales"]
        kind = torch.uint8 if self.bits == 4 else torch.int8
        if (codes.dtype, scales.dtype) != (kind, torch.bfloat16):
            raise ValueError(
                f"stores {codes.dtype} and {scales.dtype} for {self.name}, "
                "which memvec does not write"
            )
        if codes.dim() != 3 or scales.shape != codes.shape[:2] or 0 in codes.shape:
            raise ValueError(
                f"holds codes of shape {tuple(codes.shape)} and scales of shape "
                f"{tuple(scales.shape)}: it is damaged"
            )
        if self.bits == 4:
            halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
            if not bool(halves[..., -1].any()):
                halves = halves[..., :-1]
            numbers = halves.float() - 8
        else:
            numbers = codes.float()
        vectors = numbers * scales.float()[..., None]
        again = self.pack(vectors)
        # Compare bytes: NaN is not equal to itself, and a scale of -0 would equal 0.
        if not all(
            torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8))
            for name in again
        ):
            raise ValueError(f"holds codes and scales that {self.name} does not make")
        return vectors

    def size(self, vectors: int, D: int) -> int:
        """Bytes of codes and scales, the unused half byte of an odd D included."""
        return vectors * (-(-D * self.bits // 8) + torch.bfloat16.itemsize)


Storage = Floats | Integers
STORAGES: dict[str, Storage] = {
    "float32": Floats("float32", torch.float32),
    "bfloat16": Floats("bfloat16", torch.bfloat16),
    "float16": Floats("float16", torch.float16),
    "int8": Integers("int8", 8),
    "int4": Integers("int4", 4),
}


def storage_of(kind: str | torch.dtype | Storage) -> Storage:
    """The storage of a name or a torch dtype. Raises MemvecError for an unknown one."""
    if isinstance(kind, Storage):
        return kind
    name = str(kind).removeprefix("torch.")
    if name not in STORAGES:
        raise MemvecError(f"unknown storage '{name}': {did_you_mean(name, STORAGES)}")
    return STORAGES[name]
