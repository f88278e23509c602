"""Choices that the core does not need: those of published programs, and their recipes.

Each is registered by name as any other. Nothing in the core imports them; a recipe names them.
"""
