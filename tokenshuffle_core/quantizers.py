"""Quantisers of the image tokenizer: from a latent vector to a code, and back to a vector."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ImageTokenizerConfig

PRODUCTS = 2**24  # of points with a codebook's vectors at the same time: 64 MiB


class Quantized(NamedTuple):
    vectors: Tensor  # (B, codebook_dim, h, w), straight-through gradient to the latent
    codes: Tensor  # (B, h, w) int64
    loss: Tensor  # scalar: codebook + beta * commitment


class VectorQuantizer(nn.Module):
    """A codebook (van den Oord et al., arXiv 1711.00937), of which the vector with the largest dot
    product is taken: `normalised`, of vectors of length 1, where it is the nearest one (ViT-VQGAN,
    arXiv 2110.04627), or of vectors as they are (IBQ, arXiv 2412.02692)."""

    beta = 0.25

    def __init__(self, size: int, dim: int, normalised: bool = True):
        super().__init__()
        self.codebook = nn.Embedding(size, dim)
        self.normalised = normalised

    def working_nbytes(self, codes: int) -> int:
        """What `nearest` needs for so many, at most: two copies of the codebook, and products."""
        size, dim = self.codebook.weight.shape
        return 4 * (2 * size * dim + min(codes * size, max(PRODUCTS, size)))

    def _scaled(self, x: Tensor, dim: int) -> Tensor:
        return F.normalize(x, dim=dim) if self.normalised else x

    def project(self, latent: Tensor) -> Tensor:
        """What `nearest` takes, from the encoder's latent (B, dim, h, w)."""
        return latent

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 -> vectors (B, dim, h, w)."""
        return self._scaled(self.codebook(codes), -1).movedim(-1, 1)

    def nearest(self, latent: Tensor) -> Tensor:
        """latent (B, dim, h, w), of any norm -> codes (B, h, w) int64."""
        every = torch.arange(self.codebook.num_embeddings, device=latent.device)
        book = self._scaled(self.codebook(every), -1)
        # In bfloat16 the nearest two often tie; not every device supports autocast.
        kind = latent.device.type
        cast = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if cast else nullcontext():
            book, points = book.float().T, latent.float().movedim(1, -1)
            parts = points.flatten(0, -2).split(max(1, PRODUCTS // len(every)))
            return torch.cat([(part @ book).argmax(-1) for part in parts]).view(points.shape[:-1])

    def forward(self, latent: Tensor) -> Quantized:
        latent = self._scaled(latent, 1)
        codes = self.nearest(latent)
        vectors = self.vectors(codes)
        commitment = F.mse_loss(latent, vectors.detach())
        loss = F.mse_loss(vectors, latent.detach()) + self.beta * commitment
        return Quantized(latent + (vectors - latent).detach(), codes, loss)


class ScalarQuantizer(nn.Module):
    """Finite scalar quantisation (arXiv 2309.15505): dimension i is rounded to one of levels[i]
    values around 0, and a code counts through them, the first dimension fastest. Nothing is
    learnt; the codebook is the table of all vectors."""

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        grids = torch.meshgrid(*(torch.arange(n) for n in reversed(levels)), indexing="ij")
        digits = torch.stack([grid.flatten() for grid in reversed(grids)], -1)
        halves = torch.tensor(levels, device=digits.device) // 2
        self.codebook = nn.Embedding.from_pretrained((digits - halves) / halves)
        self.levels = levels

    def working_nbytes(self, codes: int) -> int:
        """As that of `VectorQuantizer`: no more than the encoder needs already."""
        return 0

    def _per_level(self, x: Tensor, function) -> Tensor:
        """A number for each dimension, (dim, 1, 1) as `x`."""
        return torch.tensor([function(n) for n in self.levels]).to(x)[:, None, None]

    def project(self, latent: Tensor) -> Tensor:
        """The encoder's latent (B, dim, h, w), bounded to the range of the levels."""
        half = self._per_level(latent, lambda n: (n - 1) * (1 + 1e-3) / 2)
        offset = self._per_level(latent, lambda n: 0.0 if n % 2 else 0.5)
        bounded = (latent + (offset / half).atanh()).tanh() * half - offset
        return bounded / self._per_level(latent, lambda n: n // 2)

    def vectors(self, codes: Tensor) -> Tensor:
        """As `VectorQuantizer.vectors`."""
        return self.codebook(codes).movedim(-1, 1)

    def nearest(self, latent: Tensor) -> Tensor:
        """What `project` returns (B, dim, h, w) -> codes (B, h, w) int64."""
        code, basis = 0, 1
        for x, n in zip(latent.float().unbind(1), self.levels, strict=True):
            digit = (x * (n // 2)).round().long() + n // 2
            code, basis = code + digit.clamp(0, n - 1) * basis, basis * n
        return code

    def forward(self, latent: Tensor) -> Quantized:
        latent = self.project(latent)
        codes = self.nearest(latent)
        vectors = self.vectors(codes).to(latent)
        return Quantized(latent + (vectors - latent).detach(), codes, latent.new_zeros(()))


def quantizer_of(config: ImageTokenizerConfig) -> VectorQuantizer | ScalarQuantizer:
    if config.quantizer == "fsq":
        return ScalarQuantizer(config.levels)
    normalised = config.quantizer == "normalised"
    return VectorQuantizer(config.codebook_size, config.codebook_dim, normalised)
