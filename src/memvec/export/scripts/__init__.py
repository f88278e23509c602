"""Programs that lie in an export's folder and run in an engine's environment, without memvec."""
