"""VQGAN image tokenizer in LlamaGen's architecture (arXiv 2406.06525): pixels to codes and back.

ResNet blocks with GroupNorm and swish, attention at the lowest resolution, and a codebook of
small l2-normalised vectors, so that the nearest vector is the one with the largest dot product.
"""

import logging
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_sides
from .config import MAX_PIXELS, ImageTokenizerConfig
from .engine import strips
from .quantizers import Quantized, quantizer_of

# Values in the largest feature map that a CPU holds twice; elsewhere, in 16 bits, that is held
# between any two layers.
LARGE = 2**27
SMALL = 2**24  # the same when saving memory
HALF = ("cuda",)  # device types on which float32 weights decode in `ImageTokenizer.decode_dtype`

log = logging.getLogger(__name__)


class ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h

    def in_strips(self, x: strips.Map, plan: strips.Plan) -> strips.Map:
        """The same for a large map."""
        parts = self.norm1, self.conv1, self.norm2, self.conv2, self.shortcut
        return strips.residual(*parts, x, plan)


class AttentionBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )
        h = strips.attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class PointwiseBlock(nn.Module):
    """A residual layer that mixes channels: attention over a single frame."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))

    def in_strips(self, x: strips.Map, plan: strips.Plan) -> strips.Map:
        return strips.downsample(self.conv, x, plan)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def in_strips(self, x: strips.Map, plan: strips.Plan) -> strips.Map:
        return strips.upsample(self.conv, x, plan)


def _middle(channels: int, config: ImageTokenizerConfig) -> nn.Sequential:
    groups = config.norm_groups
    return nn.Sequential(
        ResnetBlock(channels, channels, groups),
        AttentionBlock(channels, groups),
        *([PointwiseBlock(channels, groups)] if config.video else []),
        ResnetBlock(channels, channels, groups),
    )


def _levels(
    first: int,
    channels: list[int],
    blocks: int,
    groups: int,
    attended: Sequence[int],
    resample: type,
) -> nn.ModuleList:
    """Levels with these `channels`, resampled between them; `first` channels enter, and each block
    of a level that is `attended` is followed by attention."""
    levels = nn.ModuleList()
    for i, (before, after) in enumerate(zip([first, *channels], channels, strict=False)):
        level = nn.Sequential()
        for block in range(blocks):
            level.append(ResnetBlock(after if block else before, after, groups))
            if i in attended:
                level.append(AttentionBlock(after, groups))
        if i < len(channels) - 1:
            level.append(resample(after))
        levels.append(level)
    return levels


def _run(
    levels: nn.ModuleList, x: Tensor | strips.Map, plan: strips.Plan | None
) -> Tensor | strips.Map:
    """All layers in turn; with a plan, large maps in strips."""
    for layer in (layer for level in levels for layer in level):
        if not _in_strips(x, plan):
            x = layer(x)
        elif isinstance(layer, (AttentionBlock, nn.Conv2d)):  # have the whole map at once
            x = layer(strips.hold(x))
        else:
            x = _large(layer, x, plan)
    return x


def _large(layer: nn.Module, x: Tensor | strips.Map, plan: strips.Plan) -> Tensor | strips.Map:
    """A layer on a large map, which may be overwritten. One map at least is held at each resolution
    below the full one: all layers after it are computed again for every norm."""
    x = strips.as_map(x)
    if isinstance(layer, Upsample):
        x = strips.as_map(strips.hold(x))
    y = layer.in_strips(x, plan)
    if plan.hold or isinstance(layer, Downsample) or math.prod(y.shape) <= plan.room:
        return strips.hold(y, x.held if x.shape == y.shape else None)
    return y


def _in_strips(x: Tensor | strips.Map, plan: strips.Plan | None) -> bool:
    if plan is None or isinstance(x, strips.Map):
        return plan is not None
    return x.numel() > strips.whole(x.device)


class Encoder(nn.Module):
    """(B, 3, H, W) in -1..1 -> (B, latent_channels, H / stride, W / stride)."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        channels = [config.channels * m for m in config.channel_multipliers]
        groups, lowest = config.norm_groups, len(channels) - 1
        attended = [lowest - level for level in config.attention_levels]
        shape = config.channels, channels, config.res_blocks
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.channels, 3, padding=1)
        self.levels = _levels(*shape, groups, attended, Downsample)
        self.mid = _middle(channels[-1], config)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, plan: strips.Plan | None = None) -> Tensor:
        """Without a `plan`, whole maps are computed, also for gradients."""
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        values = x[:, 0].numel() * self.conv_in.out_channels
        if plan is None or plan.hold or values <= strips.whole(x.device):
            h = self.conv_in(x)
        else:
            h = strips.output(None, self.conv_in, strips.as_map(x))
        h = self.mid(strips.hold(_run(self.levels, h, plan)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, 3, h * stride, w * stride), roughly -1..1."""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        channels = [config.channels * m for m in reversed(config.channel_multipliers)]
        groups, shape = config.norm_groups, (channels[0], channels, config.res_blocks + 1)
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid = _middle(channels[0], config)
        self.levels = _levels(*shape, groups, config.attention_levels, Upsample)
        if config.video:
            self.levels[1].insert(-1, nn.Conv2d(channels[1], channels[1], 1))
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3 * config.patch**2, 3, padding=1)

    def forward(self, z: Tensor, plan: strips.Plan | None = None) -> Tensor:
        """`plan` as in the encoder."""
        h = _run(self.levels, self.mid(self.conv_in(z)), plan)
        if _in_strips(h, plan):
            x = strips.hold(strips.output(self.norm_out, self.conv_out, strips.as_map(h)))
        else:
            x = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class ImageTokenizer(nn.Module):
    """Images (B, 3, H, W) float in 0..1 <-> codes (B, H / stride, W / stride) int64.

    On CUDA, float32 weights decode in `decode_dtype`. Measured with its rounding emulated, float16
    changes pixels by up to 0.3/255 with the bundled weights and bfloat16 by up to 2/255, and would
    change 2 % and 16 % of the codes in `encode`, which therefore stays in float32.
    """

    decode_dtype = torch.float16

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.quantizer = quantizer_of(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def working_nbytes(
        self,
        pictures: int,
        pixels: int,
        device: torch.device,
        save_memory: bool = False,
        encode: bool = False,
    ) -> int:
        """An upper bound on the bytes that `decode` or `encode` needs on `device` for `pictures`
        pictures with `pixels` pixels each, beside the weights and the workspaces of libraries such
        as cuDNN.
        """
        weights = self.quantizer.codebook.weight.dtype
        dtype = weights if encode else self._decode_dtype(device)
        plan, small = self._plan(device, dtype, save_memory), strips.whole(device)
        base, largest = self._base(pixels), self._largest(pixels)
        at_once = self._at_once(pictures, pixels, plan)
        # Measured: at most ten feature maps of the base channels live at once, or strips of them;
        # with strips also the whole input and output, and the map between them if there is room.
        values = 12 * min(at_once * base, small)
        if plan.hold:
            maps = 3 if pictures * largest <= plan.room else 2
            values += maps * (pictures * largest > small) * pictures * largest
        else:
            values += self._held(at_once * pixels, plan.room) + 6 * pictures * pixels
        attended = self._attended(at_once, pixels, device)
        values = max(values, attended + 6 * pictures * pixels)
        codes = at_once * pixels // self.config.stride**2
        return values * dtype.itemsize + encode * self.quantizer.working_nbytes(codes)

    def _base(self, pixels: int) -> int:
        places = pixels // self.config.patch**2
        return places * self.config.channels * self.config.channel_multipliers[0]

    def _largest(self, pixels: int) -> int:
        # Upsample reaches the full size with the channels of the level below.
        places = pixels // self.config.patch**2
        return places * self.config.channels * max(self.config.channel_multipliers[:2])

    def _attended(self, pictures: int, pixels: int, device: torch.device) -> int:
        """Values that attention needs, which has a map whole, and its queries, keys and values."""
        most, config = 0, self.config
        for level in config.attention_levels:
            depth = len(config.channel_multipliers) - 1 - level
            places = pixels // config.patch**2 >> 2 * depth
            channels = config.channels * config.channel_multipliers[depth]
            products = strips.attention_values(pictures, places, device)
            most = max(most, 10 * pictures * places * channels + products)
        return most

    def _held(self, pixels: int, room: int) -> int:
        """Values in the maps of a decoder that are held at the same time, at most."""
        multipliers, most = self.config.channel_multipliers, 0
        pixels //= self.config.patch**2
        for level, (own, below) in enumerate(pairwise(multipliers)):
            size = pixels * self.config.channels >> 2 * level
            own, upsampled = own * size, below * size
            if upsampled <= room:  # then the first block needs its middle, and its result
                blocks = upsampled + (1 if own == upsampled else 2) * own
                most = max(most, upsampled // 4 + upsampled, blocks)
            elif own <= room:
                most = max(most, upsampled // 4 + own, 2 * own)
            else:  # only the picture is held at the full resolution
                most = max(most, upsampled // 4 + own * (level > 0))
        return most

    def latent(self, images: Tensor, plan: strips.Plan | None = None) -> Tensor:
        """(B, 3, H, W) in 0..1 -> latent (B, codebook_dim, h, w) before quantisation."""
        return self.quant_conv(self.encoder(images * 2 - 1, plan))

    def codes_of(self, latent: Tensor) -> Tensor:
        """latent (B, codebook_dim, h, w) -> codes (B, h, w) int64."""
        return self.quantizer.nearest(self.quantizer.project(latent))

    def pixels(self, vectors: Tensor, plan: strips.Plan | None = None) -> Tensor:
        """Codebook vectors (B, codebook_dim, h, w) -> (B, 3, H, W), roughly 0..1, not clamped."""
        return (self.decoder(self.post_quant_conv(vectors), plan) + 1) / 2

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """For training: the reconstruction, not clamped, and the quantiser's output."""
        quantized = self.quantizer(self.latent(images))
        return self.pixels(quantized.vectors), quantized

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in 0..1 -> codes (B, H / stride, W / stride) int64.

        Raises ValueError where a side is not a multiple of the stride.
        """
        stride = self.config.stride
        height, width = images.shape[-2:]
        check_sides(width, height, stride)
        plan = self._plan(images.device, images.dtype)
        parts = images.split(self._at_once(len(images), height * width, plan))
        return torch.cat([self.codes_of(self.latent(part, plan)) for part in parts])

    def decode(self, codes: Tensor, save_memory: bool = False) -> Tensor:
        """Codes (B, h, w) int64 -> images (B, 3, h * stride, w * stride) in 0..1.

        Large pictures are decoded in strips, without seams; `save_memory` does so for smaller ones
        and holds fewer maps, which is slower. Raises ValueError for a code outside the codebook.
        """
        if codes.numel() == 0 or codes.min() < 0 or codes.max() >= self.config.codebook_size:
            raise ValueError(
                f"codes must be from 0 to {self.config.codebook_size - 1}, this model's codebook; "
                "these are from another model or are not codes"
            )
        dtype = self._decode_dtype(codes.device)
        plan = self._plan(codes.device, dtype, save_memory)
        pixels = codes[0].numel() * self.config.stride**2
        if pixels > MAX_PIXELS:
            raise ValueError(f"codes of a picture of {pixels} pixels: the limit is {MAX_PIXELS}")
        parts = [
            self._decode(part, dtype, save_memory)
            for part in codes.split(self._at_once(len(codes), pixels, plan))
        ]
        return torch.cat(parts).clamp_(0, 1)

    def _decode(self, codes: Tensor, dtype: torch.dtype, save_memory: bool) -> Tensor:
        vectors = self.quantizer.vectors(codes)
        if dtype != vectors.dtype:
            with torch.autocast(codes.device.type, dtype):
                pixels = self.pixels(vectors, self._plan(codes.device, dtype, save_memory))
            if pixels.isfinite().all():  # a norm would spread an overflow over the picture
                return pixels
            log.warning("%s overflows in this image tokenizer: decoding in float32", dtype)
        plan = self._plan(codes.device, vectors.dtype, save_memory)
        return self.pixels(vectors, plan._replace(bf16=True)).to(dtype)

    def _decode_dtype(self, device: torch.device) -> torch.dtype:
        weights = self.quantizer.codebook.weight.dtype
        half = weights == torch.float32 and device.type in HALF
        return self.decode_dtype if half else weights

    def _plan(
        self, device: torch.device, dtype: torch.dtype, save_memory: bool = False
    ) -> strips.Plan:
        room, hold = SMALL if save_memory else LARGE, device.type in strips.HOLDING
        return strips.Plan(room if hold else 2 * room // dtype.itemsize, bf16=False, hold=hold)

    def _at_once(self, pictures: int, pixels: int, plan: strips.Plan) -> int:
        """How many pictures to compute at once: where rows are computed when needed, only as many
        as can be held."""
        fit = max(1, plan.room // self._largest(pixels))
        return pictures if plan.hold else min(pictures, fit)
