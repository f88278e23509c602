"""The one-pass encoder: [mem] vectors from the hidden states of the model itself.

`pocket.py` and `shapes.py` import this module; it is not run.
"""

import torch
from torch import nn


class Encoder(nn.Module):
    """Splits a passage into K equal parts and makes one [mem] vector from each.

    The model reads each part alone, followed by the summary embedding, and the hidden state there
    becomes the vector. So K > 1 uses what K = 1 has learnt. (Another encoder, which made K vectors
    after the whole passage, was trained for 450 steps on passages of fewer than 24 tokens: with
    K = 4, 39 % of 24 tokens were right, and 37 % with K = 1.)
    """

    def __init__(self, width: int):
        super().__init__()
        self.summary = nn.Parameter(0.05 * torch.randn(1, width))
        self.map = nn.Linear(width, width)
        # At the start the output is small, as embeddings are; training then sets its size.
        nn.init.zeros_(self.map.bias)
        with torch.no_grad():
            self.map.weight.copy_(0.1 * torch.eye(width))

    def forward(self, model, embedded, K: int):
        """embedded (B, T, D), with T a multiple of K → [mem] vectors (B, K, D).

        `model` maps inputs (B, S, D) to last hidden states (B, S, D).
        """
        B, T, D = embedded.shape
        parts = embedded.reshape(B * K, T // K, D)
        summary = self.summary.to(embedded.dtype).expand(B * K, 1, D)
        return self.map(model(torch.cat((parts, summary), dim=1))[:, -1]).view(B, K, D)
