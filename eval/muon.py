"""Muon: momentum whose update is orthogonalised, for the hidden matrices of a transformer (Jordan et al. 2024).

`torch.optim.Muon` computes in bfloat16, which CPUs without bfloat16 arithmetic emulate: there it took more than half of
a training step. This one computes in float32 and orthogonalises matrices of one shape together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration that pushes all singular values towards 1."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of `matrices` (n, rows, columns), rows <= columns."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; steps scaled by sqrt(max(1, rows / columns)); decoupled weight decay."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                by_shape[tuple(p.shape)].append(p)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for p in parameters:
                    assert p.grad is not None
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                update = torch.stack(updates)
                wide = rows <= columns
                update = orthogonalise(update if wide else update.mT)
                update = update if wide else update.mT
                for p, change in zip(parameters, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(change, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
