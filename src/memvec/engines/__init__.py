"""Inference engines, really run: each in its own environment, on requests that memvec writes."""

from memvec.engines.run import ENGINES, Answer, decode_with, run_engine

__all__ = ["ENGINES", "Answer", "decode_with", "run_engine"]
