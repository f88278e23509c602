"""Protocols: how much fits, asked in different ways. One file each, listed in memvec.registry."""
