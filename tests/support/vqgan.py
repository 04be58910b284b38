"""A VQGAN with random weights, as published (arXiv 2012.09841), and IBQ's choice of codes (arXiv
2412.02692)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.published import randomise


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = self.norm2(self.conv1(h * h.sigmoid()))
        h = self.conv2(h * h.sigmoid())
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view(x.shape))


class Resampled(nn.Module):
    def __init__(self, channels: int, down: bool):
        super().__init__()
        self.conv, self.down = nn.Conv2d(channels, channels, 3, 2 if down else 1), down

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1)))


def side(levels: list[tuple[int, int, bool]], blocks: int, ends: tuple[int, int], up: bool):
    """Of levels (channels in, channels out, with attention), by resolution, the highest first;
    `ends` are the channels of what enters and leaves. The middle is at the lowest."""
    made, lowest = nn.Module(), levels[-1][0 if up else 1]
    name, resampled = ("up", "upsample") if up else ("down", "downsample")
    made.conv_in = nn.Conv2d(ends[0], lowest if up else levels[0][0], 3, padding=1)
    parts = nn.ModuleList()
    for i, (before, after, attended) in enumerate(levels):
        part = nn.Module()
        part.block = nn.ModuleList(Block(after if j else before, after) for j in range(blocks))
        part.attn = nn.ModuleList(Attention(after) for _ in range(blocks * attended))
        if i != (0 if up else len(levels) - 1):
            part.add_module(resampled, Resampled(after, not up))
        parts.append(part)
    made.add_module(name, parts)
    made.mid = nn.Module()
    made.mid.block_1, made.mid.block_2 = Block(lowest, lowest), Block(lowest, lowest)
    made.mid.attn_1 = Attention(lowest)
    made.norm_out = norm(levels[0][1] if up else lowest)
    made.conv_out = nn.Conv2d(made.norm_out.num_channels, ends[1], 3, padding=1)
    return made


def middle(part: nn.Module, x: Tensor) -> Tensor:
    return part.mid.block_2(part.mid.attn_1(part.mid.block_1(x)))


def level(part: nn.Module, x: Tensor) -> Tensor:
    for i, block in enumerate(part.block):
        x = block(x)
        x = part.attn[i](x) if len(part.attn) else x
    for name in ("downsample", "upsample"):
        x = getattr(part, name)(x) if hasattr(part, name) else x
    return x


class VQGAN(nn.Module):
    """For pictures (B, 3, H, W) in -1..1; `attended` are its levels with attention, of which 0 is
    the full resolution, and `codes` the codebook's (size, dim)."""

    def __init__(
        self,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 1, 2),
        blocks: int = 1,
        attended: tuple[int, ...] = (2,),
        latent: int = 16,
        codes: tuple[int, int] = (64, 8),
    ):
        super().__init__()
        outputs = [channels * m for m in multipliers]
        down = zip([channels, *outputs], outputs, strict=False)
        up = zip([*outputs[1:], outputs[-1]], outputs, strict=True)
        down, up = ([(*x, i in attended) for i, x in enumerate(levels)] for levels in (down, up))
        self.encoder = side(down, blocks, (3, latent), up=False)
        self.decoder = side(up, blocks + 1, (latent, 3), up=True)
        self.quant_conv = nn.Conv2d(latent, codes[1], 1)
        self.post_quant_conv = nn.Conv2d(codes[1], latent, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(*codes)

    def latent(self, pictures: Tensor) -> Tensor:
        e = self.encoder
        x = e.conv_in(pictures)
        for part in e.down:
            x = level(part, x)
        x = e.norm_out(middle(e, x))
        return self.quant_conv(e.conv_out(x * x.sigmoid()))

    def codes(self, pictures: Tensor) -> Tensor:
        """(B, h, w): of the vector with the largest dot product."""
        book = self.quantize.embedding.weight
        return torch.einsum("bdhw,nd->bnhw", self.latent(pictures), book).argmax(1)

    def pixels(self, codes: Tensor) -> Tensor:
        d, vectors = self.decoder, self.quantize.embedding.weight[codes].movedim(-1, 1)
        x = middle(d, d.conv_in(self.post_quant_conv(vectors)))
        for part in reversed(d.up):
            x = level(part, x)
        x = d.norm_out(x)
        return d.conv_out(x * x.sigmoid())


def ibq(**shape) -> VQGAN:
    """A small one with as many codes as Emu3.5's."""
    return randomise(VQGAN(**{"codes": (2**17, 4)} | shape))


def write_ibq(model: VQGAN, folder) -> None:
    """As it is published."""
    folder.mkdir()
    (folder / "config.yaml").write_text("n_embed: 131072\n")
    torch.save({"state_dict": model.state_dict()}, folder / "model.ckpt")
