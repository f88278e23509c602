"""Where passages come from: documents of text or token ids, cut so that cramming succeeds."""

from memvec.passages.cut import Cutter
from memvec.passages.documents import Document, read_document
from memvec.passages.passage import Passage

__all__ = ["Cutter", "Document", "Passage", "read_document"]
