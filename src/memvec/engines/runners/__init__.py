"""What runs inside an engine's own environment; nothing here imports memvec."""
