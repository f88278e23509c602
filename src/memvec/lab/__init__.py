"""The laboratory: capacity protocols, studies of models and texts, and their report."""
