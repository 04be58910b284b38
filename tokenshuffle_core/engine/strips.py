"""Layers of the image tokenizer on large feature maps, a strip of rows at a time.

A strip includes the rows around it that the layer's convolutions reach, and group normalisation
uses the statistics of the whole map, so the result equals that of whole maps, without seams. On a
CPU this is faster than whole maps, because a strip stays in the processor's cache between
operations. Memory holds two maps, or one if there is no room for two.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP = 2**20  # values of a feature map in a strip, which fit a CPU's cache
GPU_STRIP = 2**24  # on other devices, where strips only save memory
# Device types whose `native_group_norm` takes channels-last maps; CUDA's refuses them.
CHANNELS_LAST_NORM = ("cpu",)


class Plan(NamedTuple):
    """How large maps are computed: maps of up to `room` values may be held twice; `bf16` lets a CPU
    with native bfloat16 use it for convolutions, which is twice as fast. The maps stay float32, and
    pixels change by roughly 1/255 at most.
    """

    room: int
    bf16: bool


def convolution(conv: nn.Conv2d, x: Tensor, plan: Plan) -> Callable[[Tensor], Tensor]:
    """The layer as a function of rows of x. Its stride is 1."""
    if not _in_bf16(x, plan):
        return conv  # the module: a host may fetch its weights on each call
    return _convolve_in_bf16(conv.weight, conv.bias, conv.padding)


def _in_bf16(x: Tensor, plan: Plan) -> bool:
    return plan.bf16 and NATIVE_BF16 and x.device.type == "cpu" and x.dtype == torch.float32


def _convolve_in_bf16(weight: Tensor, bias: Tensor, padding=0) -> Callable[[Tensor], Tensor]:
    weight, bias = weight.bfloat16(), bias.bfloat16()
    return lambda rows: F.conv2d(rows.bfloat16(), weight, bias, 1, padding).float()


# Instructions for it, in versions of PyTorch that can detect them.
NATIVE_BF16 = any(
    getattr(torch.cpu, name, bool)()
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
)


def strip_of(device: torch.device) -> int:
    return STRIP if device.type == "cpu" else GPU_STRIP


def strips(x: Tensor) -> Iterator[tuple[int, int]]:
    """The first row and the row after the last of each strip of a map (B, C, H, W). Strips have an
    even number of rows, except for the last."""
    rows = max(2, strip_of(x.device) // (x.shape[0] * x.shape[1] * x.shape[3]) // 2 * 2)
    for start in range(0, x.shape[2], rows):
        yield start, min(start + rows, x.shape[2])


def new_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (len(like), channels, height, width)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (B, groups), of a map (B, C, H, W) in each group of channels; float64
    on CPU and CUDA, else float32. `eps` is that of the norm."""
    exact = torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32
    if x.device.type in CHANNELS_LAST_NORM:  # ten times faster than `var_mean` on a CPU
        x = x.float().contiguous(memory_format=torch.channels_last)
        _, mean, inverse = torch.native_group_norm(
            x, None, None, len(x), x.shape[1], x.shape[2] * x.shape[3], groups, eps
        )
        return mean.to(exact), inverse.to(exact) ** -2 - eps
    # Channel by channel, which reads a channels-last map in memory order, without a copy.
    variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
    variance, mean = (v.to(exact).unflatten(1, (groups, -1)) for v in (variance, mean))
    return mean.mean(-1), variance.mean(-1) + mean.var(-1, correction=0)


class Normalised:
    """silu(group_norm(x)) of a map, strip by strip; a first pass collects its statistics."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.count = 0
        self.mean = self.squares = 0.0  # (B, groups): the mean, the squared deviations

    def add(self, x: Tensor) -> "Normalised":
        """Combine the statistics of a strip with those of earlier strips (Chan et al., 1979)."""
        mean, variance = moments(x, self.norm.num_groups, self.norm.eps)
        count, before = x[0].numel() // self.norm.num_groups, self.count
        self.count += count
        change = mean - self.mean
        self.mean = self.mean + change * (count / self.count)
        self.squares = (
            self.squares + variance * count + change.square() * (before * count / self.count)
        )
        return self

    def __call__(self, x: Tensor) -> Tensor:
        deviation = (self.squares / self.count + self.norm.eps).sqrt()
        channels = self.norm.num_channels // self.norm.num_groups
        mean, deviation = (
            v.to(x.dtype).repeat_interleave(channels, 1) for v in (self.mean, deviation)
        )
        scale = self.norm.weight.to(x) / deviation
        shift = self.norm.bias.to(x) - mean * scale
        return F.silu(torch.addcmul(shift[..., None, None], x, scale[..., None, None]), True)


def normalised(norm: nn.GroupNorm, x: Tensor) -> Normalised:
    result = Normalised(norm)
    for start, stop in strips(x):
        result.add(x[:, :, start:stop])
    return result


def convolve(
    conv: Callable[[Tensor], Tensor], x: Tensor, start: int, stop: int, height: int
) -> Tensor:
    """A 3x3 convolution of the rows start..stop of a map; x includes one more row on either side
    unless the map ends there."""
    y = conv(x)
    return y[:, :, int(start > 0) : y.shape[2] - int(stop < height)]


def residual(
    norm1: nn.GroupNorm,
    conv1: nn.Conv2d,
    norm2: nn.GroupNorm,
    conv2: nn.Conv2d,
    shortcut: nn.Conv2d | nn.Identity,
    x: Tensor,
    plan: Plan,
) -> Tensor:
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))), the convolutions 3x3 and the
    shortcut 1x1: (B, C, H, W) -> (B, C of conv2, H, W). x is overwritten if the result has as many
    channels.

    Without room for the map between its convolutions, the first convolution is computed twice: the
    second normalisation needs the statistics of the whole map before it can start.
    """
    height, room = x.shape[2], x.numel() <= plan.room
    channels, same = conv1.out_channels, isinstance(shortcut, nn.Identity)
    conv1, conv2 = (convolution(conv, x, plan) for conv in (conv1, conv2))
    first, second = normalised(norm1, x), Normalised(norm2)
    middle = new_map(x, channels, *x.shape[2:]) if room else None

    def between(rows: Tensor, offset: int, start: int, stop: int) -> Tensor:
        """Rows start..stop after the first convolution; `rows` are those of x from `offset` on."""
        reach = slice(max(0, start - 1) - offset, min(height, stop + 1) - offset)
        return convolve(conv1, first(rows[:, :, reach]), start, stop, height)

    for start, stop in strips(x):
        h = between(x, 0, start, stop)
        second.add(h)
        if room:
            middle[:, :, start:stop] = h
    y = x if same else new_map(x, channels, *x.shape[2:])
    above = x[:, :, :0]  # the two rows above the strip, before they were overwritten
    for start, stop in strips(x):
        reach = max(0, start - 1), min(height, stop + 1)
        if room:
            h, inputs = middle[:, :, slice(*reach)], x[:, :, start:stop]
        else:
            offset = start - above.shape[2]
            rows = torch.cat([above, x[:, :, start : stop + 2]], dim=2)
            above = rows[:, :, stop - offset - 2 : stop - offset]
            h, inputs = between(rows, offset, *reach), rows[:, :, start - offset : stop - offset]
        h = convolve(conv2, second(h), start, stop, height)
        torch.add(shortcut(inputs), h, out=y[:, :, start:stop])
    return y


def upsample(conv: nn.Conv2d, x: Tensor, plan: Plan) -> Tensor:
    """conv of x with its rows and columns doubled: (B, C, H, W) -> (B, C of conv, 2 H, 2 W).

    A 3x3 convolution reads doubled pixels more than once, so a 2x2 convolution of the small map for
    each of the four output pixels is equivalent.
    """
    height, width = x.shape[2:]
    y = new_map(x, conv.out_channels, 2 * height, 2 * width)
    weight, bias = conv.weight.to(x), conv.bias.to(x)
    # Two of three neighbours are equal: the last two at an even pixel, the first two at an odd one.
    even, odd = torch.tensor([[1.0, 0, 0], [0, 1, 1]]), torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    convolutions = {}
    for i, down in enumerate((even, odd)):
        for j, across in enumerate((even, odd)):
            part = torch.einsum("ocyx,ry,sx->ocrs", weight, down.to(x), across.to(x))
            convolutions[i, j] = (
                _convolve_in_bf16(part, bias)
                if _in_bf16(x, plan)
                else partial(F.conv2d, weight=part, bias=bias)
            )
    for start, stop in strips(x):
        top, bottom = max(0, start - 1), min(height, stop + 1)
        rows = F.pad(x[:, :, top:bottom], (1, 1, int(start == 0), int(stop == height)))
        for (i, j), convolved in convolutions.items():
            part = rows[:, :, i : i + stop - start + 1, j : j + width + 1]
            y[:, :, 2 * start + i : 2 * stop : 2, j::2] = convolved(part)
    return y


def downsample(conv: nn.Conv2d, x: Tensor, plan: Plan) -> Tensor:
    """conv, 3x3 with a stride of 2, of x with a zero row below and a zero column to the right:
    (B, C, H, W) -> (B, C of conv, H / 2, W / 2). Two rows become one, and see the row below them.
    """
    height = x.shape[2]
    y = new_map(x, conv.out_channels, height // 2, x.shape[3] // 2)
    for start, stop in strips(x):
        rows = F.pad(x[:, :, start : stop + 1], (0, 1, 0, int(stop == height)))
        y[:, :, start // 2 : stop // 2] = conv(rows)
    return y


def output(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))), the end of the encoder and of the decoder."""
    height, activate = x.shape[2], normalised(norm, x)
    y = new_map(x, conv.out_channels, *x.shape[2:])
    for start, stop in strips(x):
        rows = activate(x[:, :, max(0, start - 1) : stop + 1])
        y[:, :, start:stop] = convolve(conv, rows, start, stop, height)
    return y
