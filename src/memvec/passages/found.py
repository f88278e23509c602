"""The earlier name of a source's passage, until the lab imports `SourcedPassage`."""

from memvec.passages.sources.base import SourcedPassage as Found

__all__ = ["Found"]
