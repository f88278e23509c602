"""Choices that the core stands without: those of published programs, their recipes, and
the optimizer of the default recipe.

Each is registered by name as any other. Nothing in the core imports them; a recipe names them.
"""
