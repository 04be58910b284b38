"""Linear layers for decoding on a CPU, where a step costs what reading the weights costs."""

from collections.abc import Sequence

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
        self.block_count = _blocks_of(columns)
        self.few = 4 if columns // self.block_count <= COLUMNS_FOR_4 else 2  # rows
        self._cut: tuple = (None, None)

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.in_features
        if count > MANY or torch.is_grad_enabled() or x.device.type != "cpu":
            return F.linear(x, self.weight)
        rows = x.reshape(count, -1)
        blocks = self.weight if self.block_count == 1 else self._blocks()
        if count > self.few:
            y = torch.cat([_few_rows(part, blocks) for part in rows.split(self.few)])
        else:
            y = _few_rows(rows, blocks)
        return y.view(*x.shape[:-1], -1)

    def _blocks(self) -> Tensor:
        """The weight as (blocks, out, columns / blocks)."""
        weight = self.weight
        known = weight.data_ptr(), None if weight.is_inference() else weight._version
        if self._cut[0] != known:  # the first time, or others: of a LoRA, on another device
            cut = weight.detach().unflatten(1, (self.block_count, -1)).movedim(1, 0)
            self._cut = known, cut.contiguous()
        return self._cut[1]


def together(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of these layers makes of x, of few rows on a CPU in one multiplication.

    Their weights then stand one behind the other in memory, where they are moved the first time.
    """
    count = x.numel() // x.shape[-1]
    plain = all(type(layer) is Linear for layer in layers) and not torch.is_grad_enabled()
    few = count <= layers[0].few if plain else False
    if not few or x.device.type != "cpu" or layers[0].block_count > 1:
        return [layer(x) for layer in layers]
    sizes = [layer.out_features for layer in layers]
    weight = _joined([layer.weight for layer in layers], sum(sizes))
    return _few_rows(x.reshape(count, -1), weight).view(*x.shape[:-1], -1).split(sizes, dim=-1)


def _joined(weights: list[nn.Parameter], rows: int) -> Tensor:
    ends = [weight.data_ptr() + weight.nbytes for weight in weights[:-1]]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(storages) > 1 or ends != [weight.data_ptr() for weight in weights[1:]]:
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = part
    first = weights[0]
    return first.detach().as_strided((rows, first.shape[1]), first.stride())


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, columns) -> (rows, out); the weight is (out, columns), or cut into blocks."""
    if x.shape[0] == 1:  # one row, or one seen twice, BLAS multiplies in a slower way
        return _few_rows(x.repeat(2, 1), weight)[:1]
    if weight.ndim == 2:
        y = torch.mm(weight, x.t())
    else:
        y = torch.bmm(weight, x.unflatten(1, (len(weight), -1)).permute(1, 2, 0)).sum(0)
    return y.t().contiguous()


def _blocks_of(columns: int) -> int:
    """1, or the fewest blocks of at most COLUMNS_FOR_4 columns that are equally wide."""
    if columns <= COLUMNS_FOR_2:
        return 1
    counts = range(-(-columns // COLUMNS_FOR_4), columns // 64 + 1)
    return next((count for count in counts if columns % count == 0), 1)
