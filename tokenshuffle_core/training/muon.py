"""Muon (K. Jordan, https://kellerjordan.github.io/posts/muon/): momentum, orthogonalised.

Equal to `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw", but for rounding. That one
orthogonalises one matrix after another, in products too small for a GPU; here all matrices of one
shape are one batch, and torch need not be so new.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration, by K. Jordan
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For matrices of hidden layers. The update is scaled to the root mean square of AdamW's (arXiv
    2502.16982), whose learning rate and weight decay so fit. Parameters without a gradient stay.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype | None = None,
    ):
        """`dtype` is that of the orthogonalisation, by default the parameters', on a GPU bf16."""
        self.dtype = dtype
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for matrix in group["params"]:
                self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            lr, momentum = group["lr"], group["momentum"]
            for shape, matrices in by_shape.items():
                gradients = [matrix.grad for matrix in matrices]
                buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov
                updates = (
                    orthogonalised(torch.stack(ahead), self.dtype).to(buffers[0].dtype).unbind()
                )
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                torch._foreach_add_(matrices, updates, alpha=-lr * 0.2 * max(shape) ** 0.5)


def orthogonalised(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Matrices (n, rows, columns) -> about the nearest orthogonal ones: the same singular vectors,
    with singular values of about 0.7 to 1.2, by Newton-Schulz iterations, which do not need more
    than bf16."""
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype or (torch.bfloat16 if matrices.is_cuda else matrices.dtype))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
