"""One-step decoding: two vectors, one forward pass, all tokens of a passage at once.

Mezentsev & Oseledets, "Exploring the Latent Capacity of LLMs for One-Step Text Generation"
(arXiv 2505.21189, EMNLP 2025): the frozen model reads [e, m, m, ..., m], as many inputs as the
passage has tokens, and the output at position i is token i. Nothing is fed back, so nothing can be
continued; in the paper's tables two vectors hold about half of the tokens that one vector gives
back token by token.
"""

from memvec.onestep.reading import OneStep, decode_at_once, laid_out, laid_out_as
from memvec.onestep.rows import from_rows, row_count, to_rows

__all__ = [
    "OneStep",
    "decode_at_once",
    "from_rows",
    "laid_out",
    "laid_out_as",
    "row_count",
    "to_rows",
]
