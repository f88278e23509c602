"""One-pass encoders for a frozen LM: their networks, files, training and measurement."""
