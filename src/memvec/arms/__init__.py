"""Choices of published programs that the core does not need, registered by name as any other."""
