"""Weights of 4 bits: groups of 128 columns of a row share a scale; the last group may be shorter.

A weight is (n - 8) scale, with n in 0..15. A group's bytes hold the n of its first half of columns
in their low bits and that of its second half in their high bits, so a kernel expands a group
without interleaving. Scales are bfloat16: their products with 4 bits are exact in float16.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128
# What the largest weight of a group may become, in scales. -8 uses the whole range; beyond it the
# largest are clipped, which makes the steps between the others smaller.
LARGEST = (-7.5, -8.0, -8.5, -9.0, -9.5)
AT_ONCE = 2**18  # weights, which a core's cache holds


def shapes(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the packed weight and of its scales."""
    whole, rest = divmod(columns, GROUP)
    return (rows, whole * GROUP // 2 + -(-rest // 2)), (rows, -(-columns // GROUP))


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 (rows, columns) -> the packed weight uint8 and its scales bfloat16, in `shapes`.

    Of a few scales, each group has the one with the smallest squared error. (AWQ, arXiv 2306.00978,
    also clips weights by such a search, but for the error of a layer's output.)
    """
    parts = [_quantized(part) for part in x.split(max(1, AT_ONCE // x.shape[1]))]
    weight, scale = zip(*parts, strict=True)
    return torch.cat(weight), torch.cat(scale)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    packed, scales = [], []
    for group in _groups(x, GROUP):
        numbers, scale = _nearest(group)
        if group.shape[2] % 2:
            numbers = F.pad(numbers, (0, 1), value=8)
        low, high = numbers.chunk(2, -1)
        packed.append((low | high << 4).flatten(1))
        scales.append(scale.flatten(1))
    return torch.cat(packed, 1), torch.cat(scales, 1)


def _nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (rows, groups, columns) -> n as uint8, and scales (rows, groups, 1)."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    errors, scales = [], []
    for becomes in LARGEST:
        scale = (largest / becomes).bfloat16()
        errors.append((_rounded(x, scale) * scale - x).square_().sum(-1, keepdim=True))
        scales.append(scale)
    best = torch.cat(errors, -1).argmin(-1, keepdim=True)
    scale = torch.cat(scales, -1).gather(-1, best)
    return (_rounded(x, scale) + 8).to(torch.uint8), scale


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest of -8..7 scales; 0 where a scale is 0."""
    return (x / scale.float()).nan_to_num_(0).round_().clamp_(-8, 7)


def dequantized(weight: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight (rows, columns) in `dtype` that `quantized` packed."""
    scale, parts = scale.to(dtype)[..., None], []
    for packed in _groups(weight, GROUP // 2):
        numbers = torch.cat([packed & 15, packed >> 4], -1).to(dtype).sub_(8)
        part, scale = scale.split([packed.shape[1], scale.shape[1] - packed.shape[1]], 1)
        parts.append(numbers.mul_(part).flatten(1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, :columns]


def _groups(x: Tensor, size: int) -> Iterator[Tensor]:
    """(rows, columns) -> all whole groups (rows, groups, size), then a shorter one, if any."""
    whole = x.shape[1] // size * size
    if whole:
        yield x[:, :whole].unflatten(1, (-1, size))
    if whole < x.shape[1]:
        yield x[:, None, whole:]
