"""TokenShuffle and TokenUnshuffle (arXiv 2504.17789, section 3.2).

An s x s window of neighbouring codes becomes one transformer position and back. The rearrangement
is a space-to-depth and exactly invertible; the linear layers and the residual MLPs are learned.
With window 1, an ordinary model, both modules are the identity.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import ModelConfig


def shuffle(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, H / s, W / s, s * s * C): windows row by row, then channels.

    Equals `torch.nn.functional.pixel_unshuffle` up to the order of the channels. Raises
    ValueError where the window does not divide the grid.
    """
    height, width = x.shape[1:3]
    if height % window or width % window:
        raise ValueError(f"a window of {window} does not divide a grid of {width}x{height} codes")
    return rearrange(x, "b (h i) (w j) c -> b h w (i j c)", i=window, j=window)


def unshuffle(x: Tensor, window: int) -> Tensor:
    """(B, H / s, W / s, s * s * C) -> (B, H, W, C), the inverse of `shuffle`."""
    return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=window, j=window)


class FuseBlock(nn.Module):
    """Residual MLP on a fused token: x + down(gelu(up(norm(x))))."""

    def __init__(self, dim: int, norm_eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.up = nn.Linear(dim, 2 * dim, bias=False)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def _fuse(dim: int, window: int, blocks: int, norm_eps: float) -> nn.Sequential:
    return nn.Sequential(*(FuseBlock(dim, norm_eps) for _ in range(blocks if window > 1 else 0)))


class TokenShuffle(nn.Module):
    """Code embeddings (B, H, W, d) -> fused tokens (B, H / s, W / s, d)."""

    def __init__(self, dim: int, window: int, blocks: int, norm_eps: float = 1e-5):
        super().__init__()
        self.window, plain = window, window == 1
        self.compress = nn.Identity() if plain else nn.Linear(dim, dim // window**2, bias=False)
        self.fuse = _fuse(dim, window, blocks, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(shuffle(self.compress(x), self.window))


class TokenUnshuffle(nn.Module):
    """Hidden states (B, h, w, d) -> one vector per code (B, h * s, w * s, d)."""

    def __init__(self, dim: int, window: int, blocks: int, norm_eps: float = 1e-5):
        super().__init__()
        self.window, plain = window, window == 1
        self.fuse = _fuse(dim, window, blocks, norm_eps)
        self.expand = nn.Identity() if plain else nn.Linear(dim // window**2, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(unshuffle(self.fuse(x), self.window))


class WindowHead(nn.Module):
    """Predicts codes autoregressively within the window (not in the paper, where they are
    independent given the hidden state, which blurs large windows).

    A residual MLP on each code's state whose hidden layer also depends on the earlier codes of the
    window: h_i = W x_i + sum over j < i of relations[i, j] * embedding(code_j), by channel. In
    training, where all codes are known, a window is computed at once.
    """

    def __init__(self, config: ModelConfig, window: int):
        super().__init__()
        self.code_embedding = nn.Embedding(config.codebook_size, config.window_head)
        self.relations = nn.Parameter(torch.empty(window**2, window**2, config.window_head))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.input = nn.Linear(config.dim, config.window_head, bias=False)
        self.output = nn.Linear(config.window_head, config.dim, bias=False)

    def forward(self, states: Tensor, codes: Tensor, first: int = 0) -> Tensor:
        """States (..., n, d) of the window's codes first, first + 1, ... -> the same shape.

        `codes` (..., m) int64 are the window's codes from its start, m >= first + n - 1. Each state
        depends on those before it.
        """
        last = first + states.shape[-2]
        relations = self.relations[first:last, : last - 1]
        embedded = self.code_embedding(codes[..., : last - 1])
        if states.shape[-2] == 1:  # in a step, where all of `codes` are earlier ones
            context = (relations[0] * embedded).sum(-2, keepdim=True)
        else:
            place = torch.arange(last, device=states.device)
            earlier = place[first:, None] > place[:-1]
            relations = relations * earlier[..., None]
            context = torch.einsum("ijh,...jh->...ih", relations, embedded)
        return states + self.output(F.gelu(self.input(self.norm(states)) + context))
