"""Layers of the image tokenizer on large feature maps, a strip of rows at a time.

A strip comes with the rows around it that the layer's convolutions reach, and group normalisation
takes the statistics of the whole map: the result is that of the whole picture, without seams. A
residual block needs the statistics of what lies between its convolutions, so it computes the first
one twice and keeps no map of it, and its result takes the place of its input. So one map is held at
a time, and the next one while the size changes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP = 2**22  # numbers of a feature map in a strip


def strips(x: Tensor) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of each strip of a map (B, C, H, W)."""
    rows = max(2, STRIP // (x.shape[0] * x.shape[1] * x.shape[3]) // 2 * 2)
    for start in range(0, x.shape[2], rows):
        yield start, min(start + rows, x.shape[2])


class Normalised:
    """silu(group_norm(x)) of a map that is seen strip by strip, first for its statistics."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.count = 0
        self.mean = self.squares = 0.0  # float64 (B, groups): the mean, the squared deviations

    def add(self, x: Tensor) -> "Normalised":
        """Chan's update (1979), which does not cancel as a sum of squares does."""
        values = x.unflatten(1, (self.norm.num_groups, -1)).flatten(2).float()
        variance, mean = (v.double() for v in torch.var_mean(values, 2, correction=0))
        count, before = values.shape[2], self.count
        self.count += count
        change = mean - self.mean
        self.mean = self.mean + change * (count / self.count)
        self.squares = (
            self.squares + variance * count + change.square() * (before * count / self.count)
        )
        return self

    def add_all(self, x: Tensor) -> "Normalised":
        for start, stop in strips(x):
            self.add(x[:, :, start:stop])
        return self

    def __call__(self, x: Tensor) -> Tensor:
        deviation = (self.squares / self.count + self.norm.eps).sqrt()
        channels = self.norm.num_channels // self.norm.num_groups
        mean, deviation = (
            v.to(x.dtype).repeat_interleave(channels, 1) for v in (self.mean, deviation)
        )
        scale = self.norm.weight.to(x) / deviation
        shift = self.norm.bias.to(x) - mean * scale
        return F.silu(torch.addcmul(shift[..., None, None], x, scale[..., None, None]))


def convolve(conv: nn.Conv2d, x: Tensor, start: int, stop: int, height: int) -> Tensor:
    """A 3x3 convolution of the rows start..stop of a map, which come with one more on either side
    unless the map ends there."""
    y = conv(x)
    return y[:, :, int(start > 0) : y.shape[2] - int(stop < height)]


def residual(block, x: Tensor) -> Tensor:
    """A ResnetBlock; x is overwritten where the result has as many channels."""
    height = x.shape[2]
    first, second = Normalised(block.norm1).add_all(x), Normalised(block.norm2)

    def between(rows: Tensor, offset: int, start: int, stop: int) -> Tensor:
        """Rows start..stop behind the first convolution; `rows` are x's from `offset` on."""
        reach = slice(max(0, start - 1) - offset, min(height, stop + 1) - offset)
        return convolve(block.conv1, first(rows[:, :, reach]), start, stop, height)

    for start, stop in strips(x):
        second.add(between(x, 0, start, stop))
    same = isinstance(block.shortcut, nn.Identity)
    y = x if same else x.new_empty(len(x), block.conv2.out_channels, *x.shape[2:])
    above = x[:, :, :0]  # two rows over the strip, as they were
    for start, stop in strips(x):
        offset = start - above.shape[2]
        rows = torch.cat([above, x[:, :, start : stop + 2]], dim=2)
        above = rows[:, :, stop - offset - 2 : stop - offset]
        h = second(between(rows, offset, max(0, start - 1), min(height, stop + 1)))
        own = block.shortcut(rows[:, :, start - offset : stop - offset])
        torch.add(own, convolve(block.conv2, h, start, stop, height), out=y[:, :, start:stop])
    return y


def upsample(layer, x: Tensor) -> Tensor:
    """An Upsample: each row becomes two before the convolution."""
    height = x.shape[2]
    y = x.new_empty(len(x), layer.conv.out_channels, 2 * height, 2 * x.shape[3])
    for start, stop in strips(x):
        top, bottom = max(0, start - 1), min(height, stop + 1)
        rows = F.interpolate(x[:, :, top:bottom], scale_factor=2.0, mode="nearest")
        rows = rows[:, :, int(start > 0) : rows.shape[2] - int(stop < height)]
        y[:, :, 2 * start : 2 * stop] = convolve(layer.conv, rows, start, stop, height)
    return y


def downsample(layer, x: Tensor) -> Tensor:
    """A Downsample: two rows become one, and see the row below them."""
    height = x.shape[2]
    y = x.new_empty(len(x), layer.conv.out_channels, height // 2, x.shape[3] // 2)
    for start, stop in strips(x):
        rows = F.pad(x[:, :, start : stop + 1], (0, 1, 0, int(stop == height)))
        y[:, :, start // 2 : stop // 2] = layer.conv(rows)
    return y


def output(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))), the end of the encoder and of the decoder."""
    height = x.shape[2]
    normalised = Normalised(norm).add_all(x)
    y = x.new_empty(len(x), conv.out_channels, *x.shape[2:])
    for start, stop in strips(x):
        rows = normalised(x[:, :, max(0, start - 1) : stop + 1])
        y[:, :, start:stop] = convolve(conv, rows, start, stop, height)
    return y
