"""LLaMA blocks (arXiv 2302.13971): RMSNorm, rotary embedding, grouped-query attention, SwiGLU; and
those of Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388), which add biases and normalised
queries and keys.

Weights are laid out as in the LLaMA of the `transformers` library: rotary pairs are
(i, i + head_size / 2).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class KVCache:
    """Preallocated keys and values of each layer, (B, kv_heads, capacity, head_size).

    `length` positions are filled. `padding` (B,) counts the padding tokens on the left of each
    row; they are never attended to and do not count as positions. `layout`: see `positions_of`.
    """

    def __init__(
        self,
        config: ModelConfig,
        padding: Tensor,
        capacity: int,
        dtype: torch.dtype,
        layout: "Layout | None" = None,
    ):
        shape = (config.layers, len(padding), config.kv_heads, capacity, config.head_size)
        self.capacity = capacity
        self.keys = torch.empty(shape, dtype=dtype, device=padding.device).unbind()
        self.values = torch.empty(shape, dtype=dtype, device=padding.device).unbind()
        self.layout = layout
        self.start(padding)

    def start(self, padding: Tensor) -> None:
        """Forget all tokens: a new sequence begins, with this padding (B,)."""
        self.padding = padding
        self.padded = bool(padding.any())  # once: on a GPU this synchronises
        self.length = 0

    @staticmethod
    def nbytes(config: ModelConfig, rows: int, positions: int, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of `rows` rows with `positions` positions each."""
        values = config.layers * rows * config.kv_heads * positions * config.head_size
        return 2 * values * dtype.itemsize

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, kv_heads, T, head_size) and return all keys and values so far."""
        count, filled = keys.shape[2], []
        for stored, new in ((self.keys[layer], keys), (self.values[layer], values)):
            stored.narrow(2, self.length, count).copy_(new)
            filled.append(stored.narrow(2, 0, self.length + count))
        return tuple(filled)

    def places(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The function `places` for the next `length` tokens."""
        padding = self.padding if self.padded else None
        return places(
            self.length, length, len(self.padding), padding, self.padding.device, self.layout
        )

    def advance(self, length: int) -> None:
        """Count tokens after every layer has appended them."""
        self.length += length

    def drop(self, length: int | Tensor) -> None:
        """Forget the last tokens."""
        self.length -= int(length)


class Layout(NamedTuple):
    """The layout of a sequence whose positions have two axes (ModelConfig.rope_axes)."""

    text: int  # tokens before the first window
    columns: int  # windows in a row
    window: int = 1  # codes along the side of a window: positions are those of codes


def places(
    start: int,
    length: int,
    batch: int,
    padding: Tensor | None,
    device: torch.device,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Positions and attention mask of `length` tokens after the first `start`: (B, T) or (B, T, 2),
    and (B, 1, T, start + T), True where a token attends to another; None for a causal mask.
    """
    index = torch.arange(start, start + length, device=device).expand(batch, length)
    keys = torch.arange(start + length, device=device)
    if padding is not None:
        visible = (keys <= index[..., None]) & (keys >= padding[:, None, None])
        # A padding token attends to itself: a row without any key would be NaN.
        mask = (visible | (keys == index[..., None]))[:, None]
        return positions_of(index, padding, layout), mask
    mask = (keys <= index[..., None])[:, None] if start and length > 1 else None
    return positions_of(index, None, layout), mask


def positions_of(index: Tensor, padding: Tensor | None, layout: Layout | None) -> Tensor:
    """Indices in the sequence (B, T) -> positions (B, T), not counting padding, or with a `layout`
    rows and columns (B, T, 2), -1 for text."""
    if layout is None:
        return index if padding is None else (index - padding[:, None]).clamp(min=0)
    count = index - layout.text
    place = torch.stack([count // layout.columns, count % layout.columns], dim=-1)
    return (place * layout.window).masked_fill((count < 0)[..., None], -1)


def rotary_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Positions (B, T), or rows and columns (B, T, 2), -> cosine and sine, each (B, 1, T,
    head_size) float32; the sine is negated in the first half, as `rotate` expects.

    With two axes, half of the pairs rotate by the row and half by the column; for text, cosine and
    sine are both 0, which zeroes its queries and keys as in LlamaGen (arXiv 2406.06525).
    """
    size = config.head_size // config.rope_axes
    pairs = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / size)
    if config.rope_scaling:
        frequencies = _scaled(frequencies, *config.rope_scaling)
    angles = (positions.float()[..., None] * frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    if config.rope_axes == 2:
        placed = (positions >= 0)[:, None, :, :, None]
        cos, sin = (x.mul(placed).flatten(-2) for x in (cos, sin))
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _scaled(frequencies: Tensor, factor: float, low: float, high: float, context: float) -> Tensor:
    """Llama 3's context extension (arXiv 2407.21783): wavelengths that fit into the original
    `context` more than `high` times are kept, those that fit fewer than `low` times grow by
    `factor`, with a linear ramp between."""
    turns = context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding (arXiv 2104.09864) to x (B, heads, T, head_size)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.kv_heads != config.heads
        q_dim, kv_dim = (n * config.head_size for n in (config.heads, config.kv_heads))
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        norm = (config.head_size, config.norm_eps)
        self.q_norm = nn.RMSNorm(*norm) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(*norm) if config.qk_norm else None

    def forward(self, x, angles, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        causal = mask is None and q.shape[2] > 1
        h = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
        )
        return self.o_proj(h.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden)

    def forward(self, x, angles, mask, cache, layer) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, mask, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A causal stack of LLaMA blocks over embeddings, with the final norm and no head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Embeddings (B, T, d) -> hidden states (B, T, d).

        `padding` (B,) int64 counts the padding tokens on the left of each row; `layout` is needed
        with two axes of positions. With a `cache`, x continues its sequence, and its padding and
        layout apply instead.
        """
        batch, length = x.shape[:2]
        if cache is not None:
            positions, mask = cache.places(length)
        else:
            positions, mask = places(0, length, batch, padding, x.device, layout)
        angles = rotary_angles(positions, self.config)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, mask, cache, layer)
        if cache is not None:
            cache.advance(length)
        return self.norm(x)
