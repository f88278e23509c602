"""Choices that the core does not import: the methods of other publications, and their recipes.

The optimizer of the default recipe is here, too. Each choice is registered by name, and is imported
when a recipe names it.
"""
