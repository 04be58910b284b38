"""Linear layers for decoding on a CPU, where a step costs what reading the weights costs."""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows from which on a product is computed longer than its weight is read.
MANY, MANY_IN_FLOAT16 = 8, 64
# What MKL reads at the memory's speed: a matrix of so many columns for two rows, and for four.
COLUMNS_FOR_2, COLUMNS_FOR_4 = 1536, 768


class Product(NamedTuple):
    """Layers with the same input as one function, which reads their weights once."""

    rows: int  # at most
    of: Callable[[Tensor], Tensor]  # x (rows, columns), row by row in memory -> (rows, out)


class Linear(nn.Linear):
    """`nn.Linear` that reads its weight once for a few rows on a CPU."""

    def __init__(self, columns: int, rows: int, bias: bool = False):
        super().__init__(columns, rows, bias)
        self._products: dict[int, tuple] = {}  # of how many layers -> their weights, the product

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.in_features
        if count > MANY_IN_FLOAT16 or torch.is_grad_enabled() or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        product = self.product([self])
        if count > product.rows:
            return F.linear(x, self.weight, self.bias)
        y = row_major(product.of(x.reshape(count, -1))).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def product(self, layers: Sequence["Linear"]) -> Product:
        """Of layers of which this is the first, but for biases; it is kept until one of the weights
        changes."""
        weights = [layer.weight for layer in layers]
        known, versions, product = self._products.get(len(layers), ((), (), None))
        same = len(known) > 0 and all(a() is b for a, b in zip(known, weights, strict=True))
        if not same or versions != _versions(weights):
            product = _product(weights)
            known = [weakref.ref(weight) for weight in weights]
            self._products[len(layers)] = known, _versions(weights), product
        return product


def _versions(weights: Sequence[Tensor]) -> list[tuple]:
    return [(w.data_ptr(), None if w.is_inference() else w._version) for w in weights]


def _product(weights: Sequence[nn.Parameter]) -> Product:
    if product := _float16_product([weight.detach() for weight in weights]):
        return product
    weight = (weights[0] if len(weights) == 1 else _joined(weights)).detach()
    if (count := _blocks_of(*weight.shape)) > 1:
        weight = weight.unflatten(1, (count, -1)).movedim(1, 0).contiguous()
    return Product(MANY, lambda x: few_rows(x, weight))


def _float16_product(weights: Sequence[Tensor]) -> Product | None:
    """By FBGEMM's kernel, which reads half the bytes and computes in float32; for weights that lose
    nothing as float16, which are those of a file in float16 or bfloat16."""
    if weights[0].dtype != torch.float32 or not _multiplies_float16():
        return None
    scale = _float16_scale(weights)
    if scale is None:
        return None
    whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    whole = whole if scale == 1 else whole * scale
    packed = torch.ops.quantized.linear_prepack_fp16(whole, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    if scale == 1:
        return Product(MANY_IN_FLOAT16, lambda x: multiply(x, packed))
    return Product(MANY_IN_FLOAT16, lambda x: multiply(x, packed).mul_(1 / scale))


def _float16_scale(weights: Sequence[Tensor]) -> float | None:
    """The power of two with which the weights, as float16, differ from what they are by no more
    than float32 rounds the largest of them; None where there is none."""
    ends = [torch.stack(weight.aminmax()) for weight in weights]
    largest = float(torch.stack(ends).abs().max())
    if not 0 < largest < math.inf:
        return None

    def fit(scale: float, rows: int | None = None) -> bool:
        limit = largest * scale * 2**-24
        parts = (part for weight in weights for part in weight[:rows].split(64))  # in the caches
        return all(
            ((x := part * scale).half().float().sub_(x).abs_().amax() <= limit) for part in parts
        )

    # The first row tells of nearly every weight that it does not fit.
    scales = (1.0, 2.0 ** (15 - math.frexp(largest)[1]))
    return next((scale for scale in scales if fit(scale, rows=1) and fit(scale)), None)


@cache
def _multiplies_float16() -> bool:
    """Asked by doing it: the kernel is there on x86 processors alone."""
    try:
        torch.ops.quantized.linear_prepack_fp16(torch.ones(1, 1), None)
    except RuntimeError:
        return False
    return True


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, columns), row by row in memory -> x weight^T (rows, out), column by column; the
    weight is (out, columns), or cut into blocks (blocks, out, columns / blocks).

    `F.linear` asks BLAS for (out, rows) = W x^T, which MKL computes for few rows as one
    matrix-vector product after another: with guidance each weight is read twice. Asked for the
    transpose, (rows, out), MKL takes a kernel for narrow matrices that reads it once, and at the
    memory's speed if it has not too many columns.
    """
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


def _joined(weights: Sequence[nn.Parameter]) -> Tensor:
    """The weights one under the other; they are moved to where they stand so, the first time."""
    ends = [weight.data_ptr() + weight.nbytes for weight in weights[:-1]]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(storages) > 1 or ends != [weight.data_ptr() for weight in weights[1:]]:
        with torch.inference_mode(weights[0].is_inference()):  # others may be trained again
            whole = torch.cat([weight.detach() for weight in weights])
        parts = whole.split([len(weight) for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
    rows, first = sum(map(len, weights)), weights[0]
    return first.detach().as_strided((rows, first.shape[1]), first.stride())


def _blocks_of(rows: int, columns: int) -> int:
    """1, or the fewest blocks of at most COLUMNS_FOR_4 columns that are equally wide. Cut is what
    has too many columns and more than rows, since it is kept a second time: of a LLaMA's matrices
    those of the MLPs' outputs, a fifth of the model."""
    if columns <= max(COLUMNS_FOR_2, rows):
        return 1
    counts = range(-(-columns // COLUMNS_FOR_4), columns // 64 + 1)
    return next((count for count in counts if columns % count == 0), 1)
