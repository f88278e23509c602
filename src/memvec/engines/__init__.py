"""Inference engines, really run: each in its own environment, on requests that memvec writes."""

from memvec.engines.decode import answer_with, decode_with
from memvec.engines.request import Prompt
from memvec.engines.run import ENGINES, Answer, run_engine

__all__ = ["ENGINES", "Answer", "Prompt", "answer_with", "decode_with", "run_engine"]
