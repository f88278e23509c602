"""Protocols: ways to measure how much vectors hold, one per file, listed in memvec.registry."""
