"""Linear layers for decoding on a CPU, where a step costs what reading the weights costs."""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .quantize import QuantizedLinear, multiply, pack

# Rows from which on a product is computed longer than its weight is read.
MANY, MANY_IN_16_BITS, MANY_IN_8_BITS = 8, 64, 64
# What MKL reads at the memory's speed: a matrix of so many columns for two rows, and for four.
COLUMNS_FOR_2, COLUMNS_FOR_4 = 1536, 768


class Product(NamedTuple):
    """Layers with the same input as one function, but for their biases."""

    of: Callable[[Tensor], Tensor]  # x (rows, columns), row by row in memory -> (rows, out)
    rows: int  # at most
    nbytes: int  # of what was packed for it, beside the weights

    layers: Sequence[nn.Module]
    weights: list[weakref.ref]  # those that were packed
    versions: list[tuple]

    def is_current(self) -> bool:
        """Whether the layers still have the weights that were packed."""
        now = [layer.weight for layer in self.layers]
        same = all(packed() is weight for packed, weight in zip(self.weights, now, strict=True))
        return same and self.versions == [_version(weight) for weight in now]


class CpuLinear(nn.Module):
    """Stands in for a linear layer and shares its parameters, but reads the weight once for a few
    rows. More rows, and all that needs gradients, are left to the layer."""

    def __init__(self, plain: nn.Linear | QuantizedLinear):
        super().__init__()
        self._parameters = plain._parameters  # the same dict: what replaces one replaces both
        self.plain = (plain,)  # in a tuple, so that it does not become a submodule
        self.products = [product([plain])]

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[-1]
        if count > self.products[0].rows or torch.is_grad_enabled():
            return self.plain[0](x)
        y = row_major(self.products[0].of(x.reshape(count, -1))).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def product(layers: Sequence[nn.Linear | QuantizedLinear]) -> Product:
    """Of layers with the same input, packed from their weights as they are now."""
    weights = [layer.weight for layer in layers]
    state = layers, [weakref.ref(w) for w in weights], [_version(w) for w in weights]
    if isinstance(layers[0], QuantizedLinear):
        packed = pack(layers)
        nbytes = 0 if packed is None else sum(weight.nbytes for weight in weights)
        return Product(partial(multiply, layers, packed=packed), MANY_IN_8_BITS, nbytes, *state)
    return Product(*_of_weights([weight.detach() for weight in weights]), *state)


def _version(weight: Tensor) -> tuple:
    """Changes with the weight's numbers, where they are changed in place."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _of_weights(weights: Sequence[Tensor]) -> tuple[Callable[[Tensor], Tensor], int, int]:
    """The first three fields of their product."""
    if product := _in_16_bits(weights):
        return product
    cut = [_cut(weight) for weight in weights]
    copied = sum(c.nbytes for c, w in zip(cut, weights, strict=True) if c is not w)
    if len(cut) == 1:
        return partial(few_rows, weight=cut[0]), MANY, copied
    return lambda x: torch.cat([few_rows(x, w) for w in cut], 1), MANY, copied


def _in_16_bits(
    weights: Sequence[Tensor],
) -> tuple[Callable[[Tensor], Tensor], int, int] | None:
    """By FBGEMM's kernel, which reads half the bytes and computes in float32; for weights that lose
    nothing as float16, which are those of a file in float16 or bfloat16."""
    if weights[0].dtype != torch.float32 or not _multiplies_float16():
        return None
    scale = _float16_scale(weights)
    if scale is None:
        return None
    whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    nbytes = 2 * whole.numel()
    whole = whole if scale == 1 else whole * scale
    packed = torch.ops.quantized.linear_prepack_fp16(whole, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    if scale == 1:
        return lambda x: multiply(x, packed), MANY_IN_16_BITS, nbytes
    return lambda x: multiply(x, packed).mul_(1 / scale), MANY_IN_16_BITS, nbytes


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


def _cut(weight: Tensor) -> Tensor:
    """The weight, or a copy cut into blocks of columns."""
    count = _blocks_of(*weight.shape)
    return weight if count == 1 else weight.unflatten(1, (count, -1)).movedim(1, 0).contiguous()


def _blocks_of(rows: int, columns: int) -> int:
    """1, or the fewest blocks of at most COLUMNS_FOR_4 columns that are equally wide. Cut is what
    has too many columns and more than rows, since it is kept a second time: of a LLaMA's matrices
    those of the MLPs' outputs, a fifth of the model."""
    if columns <= max(COLUMNS_FOR_2, rows):
        return 1
    counts = range(-(-columns // COLUMNS_FOR_4), columns // 64 + 1)
    return next((count for count in counts if columns % count == 0), 1)
