"""One-pass encoders beside a frozen LM: what they are, their files, their training."""
