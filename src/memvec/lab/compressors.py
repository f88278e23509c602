"""Bytes of a text by compressors that fit any text, beside those of its vectors."""

from __future__ import annotations

import lzma
import math

import zstandard

XZ_DICTIONARY = 2**26  # bytes that the largest preset of xz allocates and clears for any text


def byte_account(text: bytes, vector_bytes: int, lm_bits: float) -> dict[str, int]:
    """Bytes of the text, of its vectors, and of the text after each compressor.

    `arithmetic` is what an arithmetic coder driven by the same model needs, H_LM / 8 (the paper's
    Table 4 compares with it too); vectors are not a file compressor, and this shows it.
    """
    return {
        "text": len(text),
        "vectors": vector_bytes,
        "xz": xz_size(text, preset=9 | lzma.PRESET_EXTREME),
        "zstd": len(zstandard.ZstdCompressor(level=19).compress(text)),
        "arithmetic": math.ceil(lm_bits / 8),
    }


def xz_size(text: bytes, *, preset: int) -> int:
    """Bytes by xz, with a dictionary no larger than the text: it changes nothing."""
    dictionary = min(max(len(text), 4096), XZ_DICTIONARY)
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}
    return len(lzma.compress(text, filters=[lzma2]))
