"""The frozen language model: self-checks, and logits from input vectors."""
