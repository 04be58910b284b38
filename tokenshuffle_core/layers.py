"""Layers that decode soon on a CPU, where a step should cost what reading the weights costs."""

import copy
from collections.abc import Sequence

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
        self.few = 4 if columns // self.block_count <= COLUMNS_FOR_4 else 2  # rows
        self._cut: tuple = (None, None)
        self.joined: tuple = (None, None)  # with others, see `together`

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

    def joins(self, x: Tensor) -> bool:
        """Whether one multiplication for several layers takes less time than one for each."""
        few = x.numel() <= self.few * self.in_features
        return few and self.block_count == 1 and x.device.type == "cpu"

    def _blocks(self) -> Tensor:
        """The weight as (blocks, out, columns / blocks)."""
        weight = self.weight
        known = weight.data_ptr(), None if weight.is_inference() else weight._version
        if self._cut[0] != known:  # the first time, or others: of a LoRA, on another device
            cut = weight.detach().unflatten(1, (self.block_count, -1)).movedim(1, 0)
            self._cut = known, cut.contiguous()
        return self._cut[1]


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` (arXiv 1910.07467), on a CPU in half of its time for a few rows."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_() * self.weight


def together(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of these linear layers makes of x, where it helps in one multiplication.

    Their weights then stand one behind the other in memory, where they are moved the first time.
    """
    first = layers[0]
    kinds = {type(layer) for layer in layers}
    if len(kinds) > 1 or torch.is_grad_enabled() or not getattr(first, "joins", _never)(x):
        return [layer(x) for layer in layers]
    known = [layer.weight.data_ptr() for layer in layers]
    if first.joined[0] != known:
        whole = _join(layers)
        first.joined = [layer.weight.data_ptr() for layer in layers], whole
    return first.joined[1](x).split([len(layer.weight) for layer in layers], dim=-1)


def _never(x: Tensor) -> bool:
    return False


def _join(layers: Sequence[nn.Module]) -> nn.Module:
    """A layer with the rows of all, whose memory they then share."""
    whole = copy.copy(layers[0])
    whole._parameters = dict(whole._parameters)
    for name, _ in layers[0].named_parameters():
        parts = [getattr(layer, name) for layer in layers]
        rows = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, rows.split([len(part) for part in parts]), strict=True):
            part.data = view
        setattr(whole, name, nn.Parameter(rows, requires_grad=False))
    return whole


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, columns) -> (rows, out); the weight is (out, columns), or cut into blocks."""
    if x.shape[0] == 1:  # one row, or one seen twice, BLAS multiplies in a slower way
        return _few_rows(x.repeat(2, 1), weight)[:1]
    if weight.ndim == 2:
        y = torch.mm(weight, x.t())
    else:
        y = torch.bmm(weight, x.unflatten(1, (len(weight), -1)).permute(1, 2, 0)).sum(0)
    return torch.stack(y.unbind(1))  # sooner than a transposed copy


def _blocks_of(columns: int) -> int:
    """1, or the fewest blocks of at most COLUMNS_FOR_4 columns that are equally wide."""
    if columns <= COLUMNS_FOR_2:
        return 1
    counts = range(-(-columns // COLUMNS_FOR_4), columns // 64 + 1)
    return next((count for count in counts if columns % count == 0), 1)
