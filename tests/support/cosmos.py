"""A Cosmos-Tokenizer-DV8x16x16 with random weights, as published in three dimensions: causal
convolutions over time and space, attention over each, Haar wavelets at both ends."""

import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = (8, 8, 8, 5, 5, 5)


class Conv(nn.Module):
    def __init__(self, before: int, after: int, kernel=(1, 1, 1), stride=1, time_stride=1, pad=0):
        super().__init__()
        self.conv3d = nn.Conv3d(before, after, kernel, (time_stride, stride, stride))
        self.time, self.pad = kernel[0] - 1 + 1 - time_stride, pad

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([*[x[:, :, :1]] * self.time, x], 2)
        return self.conv3d(F.pad(x, (self.pad,) * 4))


def pair(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(Conv(before, after, (1, 3, 3), pad=1), Conv(after, after, (3, 1, 1)))


class Norm(nn.Module):
    """Of each frame alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(frame) for frame in x.unbind(2)], 2)


class Block(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(before), pair(before, after)
        self.norm2, self.conv2 = Norm(after), pair(after, after)
        self.nin_shortcut = Conv(before, after) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels: int, over_time: bool):
        super().__init__()
        self.norm, self.over_time = Norm(channels), over_time
        self.q, self.k, self.v, self.proj_out = (Conv(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        parts = (self.q(h), self.k(h), self.v(h))
        if self.over_time:
            q, k, v = (part.permute(0, 3, 4, 2, 1) for part in parts)
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(0, 4, 3, 1, 2)
        else:
            q, k, v = (part.flatten(3).permute(0, 2, 3, 1) for part in parts)
            h = F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2).view(x.shape)
        return x + self.proj_out(h)


class Down(nn.Module):
    def __init__(self, channels: int, over_time: bool):
        super().__init__()
        self.conv1 = Conv(channels, channels, (1, 3, 3), stride=2)
        self.conv2 = Conv(channels, channels, (3, 1, 1), time_stride=2)
        self.conv3, self.over_time = Conv(channels, channels), over_time

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        x = self.conv1(x) + F.avg_pool3d(x, (1, 2, 2))
        if self.over_time:
            x = torch.cat([x[:, :, :1], x], 2)
            x = self.conv2(x) + F.avg_pool3d(x, (2, 1, 1))
        return self.conv3(x)


class Up(nn.Module):
    def __init__(self, channels: int, over_time: bool):
        super().__init__()
        self.conv1 = Conv(channels, channels, (3, 1, 1))
        self.conv2 = Conv(channels, channels, (1, 3, 3), pad=1)
        self.conv3, self.over_time = Conv(channels, channels), over_time

    def forward(self, x: Tensor) -> Tensor:
        if self.over_time:
            x = self.conv1(x) + x
        x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
        return self.conv3(self.conv2(x) + x)


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = Block(channels, channels), Block(channels, channels)
        self.attn_1 = nn.Sequential(Attention(channels, False), Attention(channels, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    def __init__(self, before: int, after: int, blocks: int, name: str, resample):
        super().__init__()
        self.block = nn.ModuleList(Block(before if i == 0 else after, after) for i in range(blocks))
        self.add_module(name, resample)
        self.resample = name if resample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample)(x) if self.resample else x


def haar(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, 8 C, T / 2, H / 2, W / 2), each band scaled by 1 / 2 sqrt(2)."""
    parts = [x]
    for dim in (2, 3, 4):
        split = []
        for part in parts:
            first, second = (part.narrow(dim, 0, part.shape[dim]).index_select(
                dim, torch.arange(i, part.shape[dim], 2)) for i in (0, 1))  # fmt: skip
            split += [(first + second) / math.sqrt(2), (first - second) / math.sqrt(2)]
        parts = split
    return torch.cat(parts, 1) / (2 * math.sqrt(2))


def inverse_haar(x: Tensor) -> Tensor:
    parts = list((x * 2 * math.sqrt(2)).chunk(8, 1))
    for dim in (4, 3, 2):
        parts = [
            torch.stack(
                [(low + high) / math.sqrt(2), (low - high) / math.sqrt(2)], dim + 1
            ).flatten(dim, dim + 1)
            for low, high in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


class Cosmos(nn.Module):
    """For a picture (B, 3, H, W) in -1..1."""

    def __init__(self, channels: int = 8, latent: int = 6):
        super().__init__()
        first, second, third = (channels * m for m in (2, 4, 4))
        e = self.encoder = nn.Module()
        e.conv_in, e.mid, e.norm_out = pair(192, channels), Middle(third), Norm(third)
        e.down = nn.ModuleList(
            [Level(channels, first, 2, "downsample", Down(first, True)),
             Level(first, second, 2, "downsample", Down(second, False)),
             Level(second, third, 2, "downsample", None)]
        )  # fmt: skip
        e.conv_out = pair(third, latent)
        d = self.decoder = nn.Module()
        d.conv_in, d.mid, d.norm_out = pair(latent, third), Middle(third), Norm(first)
        d.up = nn.ModuleList(
            [Level(second, first, 3, "upsample", None),
             Level(third, second, 3, "upsample", Up(second, True)),
             Level(third, third, 3, "upsample", Up(third, False))]
        )  # fmt: skip
        d.conv_out = pair(first, 192)
        self.quant_conv, self.post_quant_conv = Conv(latent, 6), Conv(6, latent)

    def latent(self, pictures: Tensor) -> Tensor:
        x, e = haar(haar(pictures[:, :, None].repeat(1, 1, 4, 1, 1))), self.encoder
        x = e.conv_in(x)
        for part in e.down:
            x = part(x)
        x = e.conv_out(F.silu(e.norm_out(e.mid(x))))
        return self.quant_conv(x)[:, :, 0]

    def pixels(self, vectors: Tensor) -> Tensor:
        d = self.decoder
        x = d.mid(d.conv_in(self.post_quant_conv(vectors[:, :, None])))
        for part in reversed(d.up):
            x = part(x)
        x = d.conv_out(F.silu(d.norm_out(x)))
        return inverse_haar(inverse_haar(x))[:, :, -1]


class Half(nn.Module):
    """The encoder or the decoder alone, as published."""

    def __init__(self, whole: Cosmos, *parts: str):
        super().__init__()
        for part in parts:
            self.add_module(part, getattr(whole, part))
        # Buffers that a state dict leaves out are in TorchScript all the same.
        self.register_buffer(
            f"{parts[-1]}_levels", torch.tensor(LEVELS, dtype=torch.int32), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return Cosmos.latent(self, x) if hasattr(self, "encoder") else Cosmos.pixels(self, x)


def write_cosmos(model: Cosmos, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The published folder: TorchScript archives of both halves."""
    folder.mkdir(parents=True, exist_ok=True)
    size, kind = 32, model.quant_conv.conv3d.weight.dtype
    for name, parts, shape in (
        ("encoder", ("encoder", "quant_conv"), (1, 3, size, size)),
        ("decoder", ("post_quant_conv", "decoder"), (1, len(LEVELS), size // 16, size // 16)),
    ):
        half = Half(model, *parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has deprecated what NVIDIA uses
            traced = torch.jit.trace(half, torch.zeros(shape, dtype=kind), check_trace=False)
            traced.to(dtype).save(folder / f"{name}.jit")
    (folder / "config.json").write_text('{"architectures": ["CosmosTokenizer"]}')
    return folder
