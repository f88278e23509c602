"""Vectors that stand for their text as context: the second loss, its certificate, and their use."""
