"""Passages, and the documents that they are cut from (memvec.lab.sources: passages of studies)."""
