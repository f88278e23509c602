"""The optimisers and their parameter groups; a GPU can replay their steps from a CUDA graph.

Notable:
- Muon (the formula of torch.optim.Muon, orthogonal updates of equal RMS) works on stacks of
  matrices of one shape: a stack needs as many products as a single matrix;
- a learning rate is a tensor on the device, so that a replayed step reads the present value.

`pocket.py` imports this module; it is not run.
"""

import torch

from decoder import Decoder
from encoder import Encoder
from recipe import Recipe

# Newton-Schulz coefficients of torch.optim.Muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(stack, steps: int = 5):
    """Orthogonalise n matrices (n, R, C): each one's singular values become close to one.

    Newton-Schulz iterations in bfloat16.
    """
    a, b, c = COEFFICIENTS
    is_wide = stack.shape[1] <= stack.shape[2]
    x = stack.bfloat16() if is_wide else stack.bfloat16().mT
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x if is_wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon, with updates scaled to the RMS of AdamW's. Matrices of one shape form one group."""

    def __init__(self, matrices, lr, momentum: float = 0.95, weight_decay: float = 0.1):
        shapes: dict = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        defaults = {"momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": p, "lr": lr.clone()} for p in shapes.values()], defaults)

    @torch.no_grad()
    def step(self):
        """Take one step. Every matrix needs a gradient."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            gradients = torch.stack([p.grad for p in params])
            state = self.state[params[0]]  # the state of the stack belongs to its first matrix
            if not state:
                state["mean"] = torch.zeros_like(gradients)
            mean = state["mean"].lerp_(gradients, 1 - group["momentum"])
            update = orthogonal(gradients.lerp(mean, group["momentum"])).float()
            update *= 0.2 * max(params[0].shape) ** 0.5 * lr
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, list(update.unbind()))


def optimizers_of(model: Decoder, encoder: Encoder, recipe: Recipe, device: str):
    """Muon for the matrices of the layers, AdamW for everything else: [Muon, AdamW].

    Their learning rates are tensors on the device. A checkpoint stores the groups in this order.
    """

    def tensor(rate: float):
        return torch.tensor(rate, device=device)

    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    matrix_ids = {id(p) for p in matrices}
    other_parameters = [p for p in model.parameters() if id(p) not in matrix_ids]
    groups = [
        {"params": other_parameters, "lr": tensor(recipe.lr_rest)},
        {"params": [encoder.summary], "lr": tensor(recipe.lr_rest)},
        {"params": list(encoder.map.parameters()), "lr": tensor(recipe.lr_encoder)},
    ]
    on_gpu = torch.device(device).type == "cuda"
    adam = torch.optim.AdamW(
        groups, lr=tensor(0.0), betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=on_gpu
    )
    return [Muon(matrices, tensor(recipe.lr_matrices)), adam]
