"""Passages, and the documents that they are cut from (memvec.lab.sources: passages of studies)."""

from memvec.passages.cutting import Cutter
from memvec.passages.documents import Document, read_document
from memvec.passages.passage import Passage

__all__ = ["Cutter", "Document", "Passage", "read_document"]
