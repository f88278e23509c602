"""Optimisers whose steps a GPU can replay: learning rates are tensors, matrices move together.

Notable:
- Muon (torch.optim.Muon's formula, orthogonal updates of equal RMS) over stacks of matrices of one
  shape: five products for a whole stack instead of five for each matrix;
- a rate is a tensor of the device, so that a captured step reads the rate of today.

Used by `pocket.py`; nothing to run here.
"""

import torch

# Newton-Schulz coefficients of Muon as torch has them
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(stack, steps: int = 5):
    """Matrices (n, R, C), each with its singular values near one, by Newton-Schulz in bfloat16."""
    a, b, c = COEFFICIENTS
    wide = stack.shape[1] <= stack.shape[2]
    x = stack.bfloat16() if wide else stack.bfloat16().mT
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with the RMS of AdamW's updates, for matrices; those of one shape are one group."""

    def __init__(self, matrices, lr, momentum: float = 0.95, weight_decay: float = 0.1):
        shapes: dict = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        defaults = {"momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": p, "lr": lr.clone()} for p in shapes.values()], defaults)

    @torch.no_grad()
    def step(self):
        """One step from the gradients, of which every matrix needs one."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            gradients = torch.stack([p.grad for p in params])
            state = self.state[params[0]]  # the stack's, kept with its first matrix
            if not state:
                state["mean"] = torch.zeros_like(gradients)
            mean = state["mean"].lerp_(gradients, 1 - group["momentum"])
            update = orthogonal(gradients.lerp(mean, group["momentum"])).float()
            update *= 0.2 * max(params[0].shape) ** 0.5 * lr
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, list(update.unbind()))


def optimizers(matrices, rate: float, others, device: str):
    """Muon for matrices at a rate, AdamW for others [(params, rate)]; rates are tensors there."""

    def tensor(rate: float):
        return torch.tensor(rate, device=device)

    groups = [{"params": list(params), "lr": tensor(rate)} for params, rate in others]
    on_gpu = torch.device(device).type == "cuda"
    adam = torch.optim.AdamW(
        groups, lr=tensor(0.0), betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=on_gpu
    )
    return [Muon(matrices, tensor(rate)), adam]
