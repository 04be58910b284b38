"""Linear layers for decoding on a CPU, where reading the weights takes most of a step."""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantize import CastLinear, QuantizedLinear, multiply, pack
from .swapped import Swapped

# Rows beyond which computing a product takes longer than reading its weight.
MANY, MANY_IN_16_BITS, MANY_IN_8_BITS = 8, 256, 64
# The most columns of a matrix that MKL reads at memory speed, for two rows and for four.
COLUMNS_FOR_2, COLUMNS_FOR_4 = 1536, 768


Kernel = tuple[Callable[[Tensor], Tensor], int, int]  # the first three fields of a Product


class Product(NamedTuple):
    """Layers with the same input as one function, without their biases."""

    of: Callable[[Tensor], Tensor]  # x (rows, columns), row-major -> (rows, out)
    rows: int  # the most that it takes
    nbytes: int  # of packed weights, beside the layers' own
    layers: Sequence[nn.Module]
    weights: list[weakref.ref]  # as packed
    versions: list[tuple]

    def is_current(self) -> bool:
        """Whether the layers still have the packed weights."""
        now = [layer.weight for layer in self.layers]
        same = all(packed() is weight for packed, weight in zip(self.weights, now, strict=True))
        return same and self.versions == [_version(weight) for weight in now]


class CpuLinear(Swapped):
    """Replaces a linear layer and shares its parameters, but reads the weight once for a few rows.
    More rows, gradients, and a weight that has changed since, are left to the original layer."""

    def __init__(self, plain: nn.Linear | QuantizedLinear):
        super().__init__(plain)
        self.products = [product([plain])]

    def is_current(self) -> bool:
        return self.products[0].is_current()

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[-1]
        many = count > self.products[0].rows
        if many or torch.is_grad_enabled() or not self.is_current():
            return self.plain[0](x)
        y = row_major(self.products[0].of(x.reshape(count, -1))).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def product(layers: Sequence[nn.Linear | QuantizedLinear]) -> Product:
    """The product of layers with the same input, packed from their current weights."""
    weights = [layer.weight for layer in layers]
    if weights[0].dtype == torch.uint8:
        kernel = _in_4_bits(layers)
    elif isinstance(layers[0], QuantizedLinear):
        packed = pack(layers)
        nbytes = 0 if packed is None else sum(weight.nbytes for weight in weights)
        kernel = partial(multiply, layers, packed=packed), MANY_IN_8_BITS, nbytes
    else:
        plain = [weight.detach() for weight in weights]
        cast = any(isinstance(layer, CastLinear) for layer in layers)
        dtype = torch.float32 if cast else plain[0].dtype  # what they compute in
        kernel = (dtype == torch.float32 and _in_16_bits(plain)) or _unpacked(plain, dtype)
        kernel = _of_any_input(*kernel) if cast else kernel
    versions = [_version(weight) for weight in weights]
    return Product(*kernel, layers, [weakref.ref(weight) for weight in weights], versions)


def _version(weight: Tensor) -> tuple:
    """Differs after the weight's values are changed in place."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _of_any_input(of: Callable[[Tensor], Tensor], rows: int, nbytes: int) -> Kernel:
    """Of a kernel for float32, one that takes and gives any float type."""
    return lambda x: of(x.float()).to(x.dtype), rows, nbytes


def _unpacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Kernel:
    parts = [_in_blocks(weight.to(dtype)) for weight in weights]
    copied = sum(p.nbytes for p, w in zip(parts, weights, strict=True) if p is not w)
    if len(parts) == 1:
        return partial(few_rows, weight=parts[0]), MANY, copied
    return lambda x: torch.cat([few_rows(x, part) for part in parts], 1), MANY, copied


def _in_16_bits(weights: Sequence[Tensor]) -> Kernel | None:
    """With FBGEMM's kernel, which reads half the bytes and computes in float32; only for weights
    that lose nothing in float16, such as those of a file in float16 or bfloat16."""
    scale = _float16_scale(weights) if multiplies_float16() else None
    if scale is None:
        return None
    scaled = torch.cat([weight.float() for weight in weights]).mul_(scale)
    packed = torch.ops.quantized.linear_prepack_fp16(scaled, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    if scale == 1:
        return lambda x: multiply(x, packed), MANY_IN_16_BITS, 2 * scaled.numel()
    return lambda x: multiply(x, packed).mul_(1 / scale), MANY_IN_16_BITS, 2 * scaled.numel()


def _in_4_bits(layers: Sequence[QuantizedLinear]) -> Kernel:
    """Weight-only, with the weights expanded once: PyTorch's kernel for 4-bit weights is vectorised
    for bfloat16 alone, and takes some 20 times as long as this one for two rows of float32."""
    whole = [layer.dequantized(torch.float32) for layer in layers]
    kernel = _in_16_bits(whole)  # loses nothing
    if kernel is None:
        weight = torch.cat(whole)
        kernel = partial(F.linear, weight=weight), MANY_IN_16_BITS, weight.nbytes
    return _of_any_input(*kernel)


def _float16_scale(weights: Sequence[Tensor]) -> float | None:
    """A power of two that, multiplied with the weights, makes float16 change them by no more than
    float32's rounding of the largest one; None if there is none."""
    ends = [torch.stack(weight.aminmax()) for weight in weights]
    largest = float(torch.stack(ends).abs().max())
    if not 0 < largest < math.inf:
        return None

    def fit(scale: float, rows: int | None = None) -> bool:
        limit = largest * scale * 2**-24
        parts = (part for weight in weights for part in weight[:rows].split(64))  # fit the caches
        return all(
            ((x := part.float() * scale).half().float().sub_(x).abs_().amax() <= limit)
            for part in parts
        )

    # Nearly every weight that does not fit fails in its first row.
    scales = (1.0, 2.0 ** (15 - math.frexp(largest)[1]))
    return next((scale for scale in scales if fit(scale, rows=1) and fit(scale)), None)


@cache
def multiplies_float16() -> bool:
    """Determined by trying: only builds for x86 processors have the kernel."""
    try:
        torch.ops.quantized.linear_prepack_fp16(torch.ones(1, 1), None)
    except RuntimeError:
        return False
    return True


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, columns), row-major -> x weight^T (rows, out), column-major; the weight is
    (out, columns), or in blocks (blocks, out, columns / blocks).

    `F.linear` calls BLAS for (out, rows) = W x^T, which MKL computes for a few rows as separate
    matrix-vector products: with guidance each weight is read twice. For the transpose, (rows, out),
    MKL has a kernel for narrow matrices that reads the weight once, and at memory speed unless it
    has too many columns.
    """
    few = 4 if weight.shape[-1] <= COLUMNS_FOR_4 else 2
    if x.shape[0] > few:
        return torch.cat([few_rows(part, weight) for part in x.split(few)])
    if x.shape[0] == 1:  # for a single row, or an expanded one, BLAS takes a slower path
        return few_rows(x.repeat(2, 1), weight)[:1]
    if weight.ndim == 2:
        return torch.mm(weight, x.t()).t()
    return torch.bmm(weight, x.unflatten(1, (len(weight), -1)).permute(1, 2, 0)).sum(0).t()


def row_major(x: Tensor) -> Tensor:
    """A matrix of a few rows, made row-major; faster than `contiguous`."""
    return x if x.is_contiguous() else torch.stack(x.unbind())


def _in_blocks(weight: Tensor) -> Tensor:
    """The weight, or a copy as the fewest blocks with equally many columns, at most COLUMNS_FOR_4.

    Since a copy takes memory, this is only for weights with too many columns and more columns than
    rows: of a LLaMA's, the down projections of the MLPs, a fifth of the model."""
    rows, columns = weight.shape
    if columns <= max(COLUMNS_FOR_2, rows):
        return weight
    counts = range(-(-columns // COLUMNS_FOR_4), columns // 64 + 1)
    count = next((count for count in counts if columns % count == 0), 1)
    return weight if count == 1 else weight.unflatten(1, (count, -1)).movedim(1, 0).contiguous()
