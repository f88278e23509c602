"""The frozen language model: loading, checking, and logits from free input vectors."""
