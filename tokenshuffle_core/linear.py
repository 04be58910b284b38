"""Linear layers for decoding on a CPU, where a step costs what reading the weights costs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 8  # from here on BLAS computes more than it reads
# What MKL reads at the memory's speed: a matrix of so many columns for two rows, and for four.
COLUMNS_FOR_2, COLUMNS_FOR_4 = 1536, 768


class Linear(nn.Linear):
    """`nn.Linear` without a bias that reads its weight once for a few rows on a CPU.

    `F.linear` asks BLAS for (out, rows) = W x^T, which MKL computes for few rows as one
    matrix-vector product after another: with guidance each weight is read twice. Asked for the
    transpose, (rows, out), MKL takes a kernel for narrow matrices that reads it once, and at the
    memory's speed if it has not too many columns. A matrix with too many is kept a second time, cut
    into blocks of columns, if it has more columns than rows: of a LLaMA's, only those of the MLPs'
    outputs, a fifth of the model.
    """

    def __init__(self, columns: int, rows: int):
        super().__init__(columns, rows, bias=False)
        self.block_count = _blocks_of(columns) if columns > rows else 1
        self._cut: tuple = (None, None, None)  # a weight, its version and memory, its blocks

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.in_features
        if count > MANY or torch.is_grad_enabled() or x.device.type != "cpu":
            return F.linear(x, self.weight)
        y = few_rows(x.reshape(count, -1), self.blocks())
        return row_major(y).view(*x.shape[:-1], -1)

    def blocks(self) -> Tensor:
        """The weight for `few_rows`: as it is, or as (blocks, out, columns / blocks)."""
        weight = self.weight
        if self.block_count == 1:
            return weight
        version = weight.data_ptr(), None if weight.is_inference() else weight._version
        if self._cut[0] is not weight or self._cut[1] != version:  # the first time, or a LoRA's
            cut = weight.detach().unflatten(1, (self.block_count, -1)).movedim(1, 0)
            self._cut = weight, version, cut.contiguous()
        return self._cut[2]


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, columns), row by row in memory -> x weight^T (rows, out), column by column; the
    weight is (out, columns), or cut into blocks (blocks, out, columns / blocks)."""
    few = 4 if weight.shape[-1] <= COLUMNS_FOR_4 else 2
    if x.shape[0] > few:
        return torch.cat([few_rows(part, weight) for part in x.split(few)])
    if x.shape[0] == 1:  # one row, or one seen twice, BLAS multiplies in a slower way
        return few_rows(x.repeat(2, 1), weight)[:1]
    if weight.ndim == 2:
        return torch.mm(weight, x.t()).t()
    return torch.bmm(weight, x.unflatten(1, (len(weight), -1)).permute(1, 2, 0)).sum(0).t()


def row_major(x: Tensor) -> Tensor:
    """A matrix of few rows row by row in memory, sooner than `contiguous` does it."""
    return x if x.is_contiguous() else torch.stack(x.unbind())


def _blocks_of(columns: int) -> int:
    """1, or the fewest blocks of at most COLUMNS_FOR_4 columns that are equally wide."""
    if columns <= COLUMNS_FOR_2:
        return 1
    counts = range(-(-columns // COLUMNS_FOR_4), columns // 64 + 1)
    return next((count for count in counts if columns % count == 0), 1)
