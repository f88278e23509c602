"""Choices that the core does not import: those of published programs, their recipes, and the
optimizer of the default recipe.

Each is registered by name as any other, and loaded when a recipe names it.
"""
