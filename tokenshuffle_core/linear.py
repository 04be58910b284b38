"""Linear layers for decoding on a CPU, where a step costs what reading the weights costs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 8  # from here on BLAS computes more than it reads
# What MKL reads at the memory's speed: a matrix of so many columns for two rows, and for four.
COLUMNS_FOR_2, COLUMNS_FOR_4 = 1024, 768


class Linear(nn.Linear):
    """`nn.Linear` without a bias that reads its weight once for a few rows on a CPU.

    `F.linear` asks BLAS for (out, rows) = W x^T, which MKL computes for few rows as one
    matrix-vector product after another: with guidance each weight is read twice. Asked for the
    transpose, (rows, out), MKL takes a kernel for narrow matrices that reads it once, and at the
    memory's speed if it has not too many columns: such a matrix is kept a second time, cut into
    blocks of columns.
    """

    def __init__(self, columns: int, rows: int):
        super().__init__(columns, rows, bias=False)
        self._cut: tuple = (None, None)

    def forward(self, x: Tensor) -> Tensor:
        narrow = x.numel() <= MANY * x.shape[-1]
        if not narrow or torch.is_grad_enabled() or x.device.type != "cpu":
            return F.linear(x, self.weight)
        blocks = self.blocks()
        few = 4 if blocks.shape[-1] <= COLUMNS_FOR_4 else 2
        parts = [_few_rows(part, blocks) for part in x.reshape(-1, x.shape[-1]).split(few)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.view(*x.shape[:-1], -1)

    def blocks(self) -> Tensor:
        """The weight as (blocks, out, columns / blocks), in its own memory where one will do."""
        weight = self.weight
        count = _blocks_of(weight.shape[1])
        if count == 1:
            return weight[None]
        known = weight.data_ptr(), None if weight.is_inference() else weight._version
        if self._cut[0] != known:  # the first time, or others: of a LoRA, on another device
            blocks = weight.detach().unflatten(1, (count, -1)).movedim(1, 0).contiguous()
            self._cut = known, blocks
        return self._cut[1]


def _few_rows(x: Tensor, blocks: Tensor) -> Tensor:
    """x (rows, columns) -> (rows, out)."""
    rows = len(x)
    if rows == 1:  # with one row BLAS takes the slower matrix-vector product again
        x = x.expand(2, -1)
    if len(blocks) == 1:
        y = blocks[0] @ x.T
    else:
        y = torch.bmm(blocks, x.unflatten(1, (len(blocks), -1)).permute(1, 2, 0)).sum(0)
    return y.T[:rows].contiguous()


def _blocks_of(columns: int) -> int:
    """1, or the fewest blocks of at most COLUMNS_FOR_4 columns that are equally wide."""
    if columns <= COLUMNS_FOR_2:
        return 1
    counts = range(-(-columns // COLUMNS_FOR_4), columns // 64 + 1)
    return next((count for count in counts if columns % count == 0), 1)
