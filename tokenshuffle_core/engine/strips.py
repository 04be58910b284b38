"""Layers of the image tokenizer on large feature maps, a strip of rows at a time.

A strip includes the rows around it that the layer's convolutions reach, and group normalisation
uses the statistics of the whole map, so the result equals that of whole maps, without seams. On a
CPU this is faster than whole maps, because a strip stays in the processor's cache between
operations. Memory holds two maps, or one if there is no room for two.

Other devices need not hold the largest maps at all: their rows are computed from the map below
whenever they are needed, once for the statistics of each norm and once for the result.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP = 2**20  # values of a feature map in a strip, which fit a CPU's cache
GPU_STRIP = 2**23  # on other devices, where strips only save memory
HOLDING = ("cpu",)  # device types where memory holds every map between two layers
# Device types whose `native_group_norm` takes channels-last maps; CUDA's refuses them.
CHANNELS_LAST_NORM = ("cpu",)


class Plan(NamedTuple):
    """How large maps are computed: maps of up to `room` values may be held twice, larger ones once,
    or not at all without `hold`. `bf16` lets a CPU with native bfloat16 use it for convolutions,
    which is twice as fast. The maps stay float32, and pixels change by roughly 1/255 at most.
    """

    room: int
    bf16: bool
    hold: bool = True


class Map(NamedTuple):
    """A feature map (B, C, H, W) that is held in memory, or whose rows are computed when needed."""

    shape: tuple[int, int, int, int]
    step: int  # rows in a strip
    rows: Callable[[int, int], Tensor]  # first row, row after the last -> (B, C, rows, W)
    like: Tensor  # empty, with its dtype and device
    held: Tensor | None = None


def as_map(x: Tensor | Map) -> Map:
    if isinstance(x, Map):
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    step = _step(x.shape, x.device)
    return Map(tuple(x.shape), step, lambda start, stop: x[:, :, start:stop], x.new_empty(0), x)


def hold(x: Tensor | Map, over: Tensor | None = None) -> Tensor:
    """All rows of a map. They may be written `over` the map that they are computed from, if they
    reach at most two rows above themselves: a strip waits until the next one is computed."""
    if isinstance(x, Tensor) or x.held is not None:
        return x if isinstance(x, Tensor) else x.held
    y = new_map(x.like, *x.shape) if over is None else over
    waiting = y[:, :, :0]
    for start, stop in strips(x):
        rows = x.rows(start, stop)
        y[:, :, start - waiting.shape[2] : start] = waiting
        waiting = rows
    y[:, :, stop - waiting.shape[2] :] = waiting
    return y


def convolution(conv: nn.Conv2d, like: Tensor, plan: Plan) -> Callable[[Tensor], Tensor]:
    """The layer as a function of rows of a map like this. Its stride is 1."""
    if not _in_bf16(like, plan):
        return conv  # the module: a host may fetch its weights on each call
    return _convolve_in_bf16(conv.weight, conv.bias, conv.padding)


def _in_bf16(like: Tensor, plan: Plan) -> bool:
    cpu = like.device.type == "cpu" and like.dtype == torch.float32
    return plan.bf16 and NATIVE_BF16 and cpu


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


def whole(device: torch.device) -> int:
    """Values in the largest map that is computed whole."""
    return 2 * strip_of(device)


def _step(shape: tuple[int, ...], device: torch.device) -> int:
    """Rows in a strip of a map (B, C, H, W): an even number."""
    return max(2, strip_of(device) // (shape[0] * shape[1] * shape[3]) // 2 * 2)


def strips(x: Map) -> Iterator[tuple[int, int]]:
    """The first row and the row after the last of each strip."""
    for start in range(0, x.shape[2], x.step):
        yield start, min(start + x.step, x.shape[2])


def new_map(like: Tensor, *shape: int) -> Tensor:
    kind = {"dtype": like.dtype, "device": like.device}
    return torch.empty(shape, memory_format=torch.channels_last, **kind)


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
        self.affine: tuple[Tensor, Tensor] | None = None  # scale and shift, (B, C, 1, 1)

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
        if self.affine is None:
            deviation = (self.squares / self.count + self.norm.eps).sqrt()
            channels = self.norm.num_channels // self.norm.num_groups
            # float32, so that it is rounded once, where a device takes two dtypes in one operation
            dtype = torch.float32 if x.device.type in ("cpu", "cuda") else x.dtype
            mean, deviation = (
                v.to(dtype).repeat_interleave(channels, 1) for v in (self.mean, deviation)
            )
            scale = self.norm.weight.to(mean) / deviation
            shift = self.norm.bias.to(mean) - mean * scale
            self.affine = scale[..., None, None], shift[..., None, None]
        scale, shift = self.affine
        return F.silu(torch.addcmul(shift, x, scale, out=torch.empty_like(x)), True)


def normalised(norm: nn.GroupNorm, x: Map) -> Normalised:
    result = Normalised(norm)
    for start, stop in strips(x):
        result.add(x.rows(start, stop))
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
    x: Map,
    plan: Plan,
) -> Map:
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))), the convolutions 3x3 and the
    shortcut 1x1: (B, C, H, W) -> (B, C of conv2, H, W).

    Without room for the map between its convolutions, the first convolution is computed twice: the
    second normalisation needs the statistics of the whole map before it can start.
    """
    (batch, _, height, width), channels = x.shape, conv1.out_channels
    room = x.held is not None and x.held.numel() <= plan.room
    conv1, conv2 = (convolution(conv, x.like, plan) for conv in (conv1, conv2))
    first, second = normalised(norm1, x), Normalised(norm2)
    middle = new_map(x.like, batch, channels, height, width) if room else None

    def between(rows: Tensor, offset: int, start: int, stop: int) -> Tensor:
        """Rows start..stop after the first convolution; `rows` are those of x from `offset` on."""
        reach = slice(max(0, start - 1) - offset, min(height, stop + 1) - offset)
        return convolve(conv1, first(rows[:, :, reach]), start, stop, height)

    for start, stop in strips(x):
        top = max(0, start - 1)
        h = between(x.rows(top, min(height, stop + 1)), top, start, stop)
        second.add(h)
        if room:
            middle[:, :, start:stop] = h

    def rows(start: int, stop: int) -> Tensor:
        top, bottom = max(0, start - 1), min(height, stop + 1)
        if room:
            h, inputs = middle[:, :, top:bottom], x.rows(start, stop)
        else:
            offset = max(0, start - 2)
            reach = x.rows(offset, min(height, stop + 2))
            if plan.hold:  # a CPU rounds channels-last maps differently
                reach = reach.contiguous()
            h = between(reach, offset, top, bottom)
            inputs = reach[:, :, start - offset : stop - offset]
        h = convolve(conv2, second(h), start, stop, height)
        return h.add_(shortcut(inputs))

    return Map((batch, channels, height, width), x.step, rows, x.like)


def upsample(conv: nn.Conv2d, x: Map, plan: Plan) -> Map:
    """conv of x with its rows and columns doubled: (B, C, H, W) -> (B, C of conv, 2 H, 2 W).

    A 3x3 convolution reads doubled pixels more than once, so a 2x2 convolution of the small map for
    each of the four output pixels is equivalent.
    """
    (batch, _, height, width), channels = x.shape, conv.out_channels
    device, dtype = x.like.device, x.like.dtype
    weight, bias = conv.weight.to(device, torch.float32), conv.bias.to(x.like)
    # Two of three neighbours are equal: the last two at an even pixel, the first two at an odd one.
    even, odd = torch.tensor([[1.0, 0, 0], [0, 1, 1]]), torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    convolutions = {}
    for i, down in enumerate((even, odd)):
        for j, across in enumerate((even, odd)):
            part = torch.einsum("ocyx,ry,sx->ocrs", weight, down.to(device), across.to(device))
            convolutions[i, j] = (
                _convolve_in_bf16(part, bias)
                if _in_bf16(x.like, plan)
                else partial(F.conv2d, weight=part.to(dtype), bias=bias)
            )

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // 2, -(-stop // 2)  # rows of x
        top, bottom = max(0, first - 1), min(height, last + 1)
        small = F.pad(x.rows(top, bottom), (1, 1, int(first == 0), int(last == height)))
        y = new_map(x.like, batch, channels, 2 * (last - first), 2 * width)
        for (i, j), convolved in convolutions.items():
            part = small[:, :, i : i + last - first + 1, j : j + width + 1]
            y[:, :, i::2, j::2] = convolved(part)
        return y[:, :, start - 2 * first : stop - 2 * first]

    return Map((batch, channels, 2 * height, 2 * width), 2 * x.step, rows, x.like)


def downsample(conv: nn.Conv2d, x: Map, plan: Plan) -> Map:
    """conv, 3x3 with a stride of 2, of x with a zero row below and a zero column to the right:
    (B, C, H, W) -> (B, C of conv, H / 2, W / 2). Two rows become one, and see the row below them.
    """
    batch, _, height, width = x.shape

    def rows(start: int, stop: int) -> Tensor:
        below = min(height, 2 * stop + 1)
        return conv(F.pad(x.rows(2 * start, below), (0, 1, 0, int(2 * stop == height))))

    shape = batch, conv.out_channels, height // 2, width // 2
    return Map(shape, x.step // 2, rows, x.like)


def output(norm: nn.GroupNorm | None, conv: nn.Conv2d, x: Map) -> Map:
    """conv(silu(norm(x))), the end of the encoder and of the decoder; without a norm conv(x), their
    beginning."""
    (batch, _, height, width), channels = x.shape, conv.out_channels
    activate = normalised(norm, x) if norm else lambda rows: rows

    def rows(start: int, stop: int) -> Tensor:
        reach = x.rows(max(0, start - 1), min(height, stop + 1))
        return convolve(conv, activate(reach), start, stop, height)

    shape = batch, channels, height, width
    return Map(shape, min(x.step, _step(shape, x.like.device)), rows, x.like)


def _products(device: torch.device) -> int:
    """Those of queries with keys at the same time, at most, for which a CPU has room."""
    return strip_of(device) * (16 if device.type in HOLDING else 1)


def attention_values(batch: int, positions: int, device: torch.device) -> int:
    """How many values `attention` needs for products, at most."""
    return 3 * min(batch * positions**2, max(_products(device), batch * positions))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention (B, 1, N, C) without all (N, N) weights of a large map.

    PyTorch's fused kernels need a unit stride in the last dimension. The memory-efficient one for
    NVIDIA's cards takes any number of channels; elsewhere there may be none that takes so many, so
    that the queries come in pieces.
    """
    if q.device.type not in HOLDING:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if q.device.type == "cuda" and torch.version.cuda:
            return F.scaled_dot_product_attention(q, k, v)
    pieces = q.split(max(1, _products(q.device) // (len(q) * k.shape[2])), 2)
    return torch.cat([F.scaled_dot_product_attention(piece, k, v) for piece in pieces], 2)
