"""The unified model: text tokens and fused image tokens in, logits over codes out.

    text ids ------------------> text embedding ----------\
                                                           > LLaMA blocks -> TokenUnshuffle -> head
    codes -> code embedding -> TokenShuffle (s x s : 1) --/

The hidden state at the last text token predicts window 0; the one at window t predicts the s * s
codes of window t + 1, in raster order of the windows.

An elastic model supports several windows: each has its own TokenShuffle and TokenUnshuffle around
the same transformer, and an embedding that tells the transformer which window follows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .shuffle import TokenShuffle, TokenUnshuffle, WindowHead, shuffle
from .transformer import KVCache, Layout, Transformer


class Logits(NamedTuple):
    codes: Tensor  # (B, windows, s * s, codebook_size)
    text: Tensor | None  # (B, T, text_vocabulary): the token that follows each text token


class TokenShuffleModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocabulary, config.dim)
        self.code_embedding = nn.Embedding(config.codebook_size, config.dim)
        self.window_embedding = (
            nn.Embedding(len(config.windows), config.dim) if len(config.windows) > 1 else None
        )
        shape = (config.fuse_blocks, config.norm_eps)
        self.shuffle = _by_window(config, lambda s: TokenShuffle(config.dim, s, *shape))
        self.transformer = Transformer(config)
        self.unshuffle = _by_window(config, lambda s: TokenUnshuffle(config.dim, s, *shape))
        headed = [s for s in config.windows if s > 1 and config.window_head]
        self.window_head = nn.ModuleDict({str(s): WindowHead(config, s) for s in headed})
        hidden = config.head_hidden
        self.head_input = nn.Linear(config.dim, hidden, bias=True) if hidden else None
        self.head = nn.Linear(hidden or config.dim, config.codebook_size, bias=hidden > 0)
        self.text_head = (
            nn.Linear(config.dim, config.text_vocabulary, bias=False) if config.text_head else None
        )

    def initialise(self) -> None:
        """Fresh weights: sqrt(2 / 5d) for linear layers (SmallInit, arXiv 1910.05895), residual
        outputs scaled by 1 / sqrt(2 layers) as in GPT-2; compress and expand keep the variance."""
        small = (2 / (5 * self.config.dim)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, WindowHead):
                nn.init.normal_(module.relations)
            elif isinstance(module, nn.Linear) and name.endswith(("compress", "expand")):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Linear):
                residual = name.endswith(("o_proj", "down_proj", "down", "output"))
                scale = (2 * self.config.layers) ** -0.5 if residual else 1.0
                nn.init.normal_(module.weight, std=small * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        text: Tensor,
        padding: Tensor,
        codes: Tensor,
        window: int | None = None,
        *,
        targets: Tensor | None = None,
        with_text: bool = False,
    ) -> Logits:
        """Teacher-forced logits for every window.

        text (B, T) int64 are framed ids with `padding` (B,) padding tokens on the left;
        codes (B, H, W) int64 have sides divisible by the window. `targets`, also codes, are what a
        window head sees of the window that it predicts, `codes` if None.
        """
        windows = self.embed_codes(codes, window)
        columns = codes.shape[2] // (window or self.config.window)
        if self.config.row_end is not None:
            rows = windows.unflatten(1, (-1, columns))
            end = self.row_end().expand(*rows.shape[:2], 1, -1)
            windows = torch.cat([rows, end], dim=2).flatten(1, 2)[:, :-1]
        x = torch.cat([self.embed_text(text, window), windows[:, :-1]], dim=1)
        layout = self.layout(text.shape[1], codes.shape[2], window)
        hidden = self.transformer(x, padding, layout=layout)
        last = text.shape[1] - 1
        text_logits = self.text_logits(hidden[:, : last + 1]) if with_text else None
        hidden = hidden[:, last:]
        if self.config.row_end is not None:  # after the last window of a row, its end is known
            rows = F.pad(hidden, (0, 0, 0, 1)).unflatten(1, (-1, columns + 1))
            hidden = rows[:, :, :columns].flatten(1, 2)
        states = self.code_states(hidden, window)
        seen = self.targets(codes if targets is None else targets, window)
        return Logits(self.code_logits(states, window, seen), text_logits)

    def layout(self, text: int, columns: int, window: int | None = None) -> Layout | None:
        """The layout of `text` tokens and a picture `columns` codes across; None with one axis."""
        window = window or self.config.window
        return Layout(text, columns // window, window) if self.config.rope_axes == 2 else None

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, d) -> logits of the text token that follows each."""
        if self.text_head is not None:
            return self.text_head(hidden)
        return hidden @ self.text_embedding.weight.T

    def targets(self, codes: Tensor, window: int | None = None) -> Tensor:
        """Codes (B, H, W) -> (B, windows, s * s), in the order of the logits."""
        return shuffle(codes[..., None], window or self.config.window).flatten(1, 2)

    def embed_text(self, text: Tensor, window: int | None = None) -> Tensor:
        """Framed ids (B, T) -> embeddings (B, T, d); the last one encodes which window follows."""
        x = self.text_embedding(text)
        if self.window_embedding is None:
            return x
        index = self.config.windows.index(window or self.config.window)
        last = x[:, -1:] + self.window_embedding.weight[index]
        return torch.cat([x[:, :-1], last], dim=1)

    def row_end(self) -> Tensor:
        """The embedding (d,) of the token between two rows."""
        return self.text_embedding.weight[self.config.row_end]

    def embed_codes(self, codes: Tensor, window: int | None = None) -> Tensor:
        """Codes (B, H, W) -> fused tokens (B, windows, d)."""
        fused = self.shuffle[str(window or self.config.window)](self.code_embedding(codes))
        return fused.flatten(1, 2)

    def code_states(self, hidden: Tensor, window: int | None = None) -> Tensor:
        """Hidden states (B, n, d) -> a vector for each code of a window (B, n, s * s, d)."""
        unshuffle = self.unshuffle[str(window or self.config.window)]
        codes = unshuffle(hidden[:, :, None])  # (B, n * s, s, d)
        return codes.unflatten(1, (hidden.shape[1], -1)).flatten(2, 3)

    def code_logits(
        self, states: Tensor, window: int | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """Code states (..., s * s, d) of a window -> logits (..., s * s, codebook_size).

        A window head also uses the window's `codes` (..., s * s), for each code those before it.
        """
        return self.head(self.head_states(states, window, codes))

    def head_states(
        self,
        states: Tensor,
        window: int | None = None,
        codes: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """The head's input (..., n, d or head_hidden), from the states (..., n, d) of the window's
        codes first, first + 1, ... and, with a window head, its `codes` (..., m) up to them."""
        window_head = self.window_head_of(window)
        if window_head is not None:
            states = window_head(states, codes, first)
        return states if self.head_input is None else F.gelu(self.head_input(states))

    def window_head_of(self, window: int | None = None) -> WindowHead | None:
        key = str(window or self.config.window)
        return self.window_head[key] if key in self.window_head else None  # noqa: SIM401

    def prefill(self, cache: KVCache, text: Tensor, window: int | None = None) -> Tensor:
        """Run the prompts with an empty cache; text (B, T) as in `forward`, and the cache has its
        padding. Returns the code states (B, 1, s * s, d) of the first window."""
        hidden = self.transformer(self.embed_text(text, window), cache=cache)
        return self.code_states(hidden[:, -1:], window)

    def step(
        self,
        cache: KVCache,
        codes: Tensor,
        window: int | None = None,
        row_ends: Tensor | None = None,
    ) -> Tensor:
        """Append windows of codes (B, n, s, s), with a row's end in the place of those where
        `row_ends` (n,) is true.

        The cache may have a multiple of B rows: prompts that share their codes, as with guidance.
        Returns the code states (rows, n, s * s, d) of the window after each.
        """
        x = self.embed_codes(codes.flatten(0, 1), window).view(*codes.shape[:2], -1)
        if row_ends is not None:
            x = torch.where(row_ends[:, None], self.row_end(), x)
        x = x.repeat(len(cache.padding) // len(x), 1, 1)
        return self.code_states(self.transformer(x, cache=cache), window)


def _by_window(config: ModelConfig, make) -> nn.ModuleDict:
    return nn.ModuleDict({str(window): make(window) for window in config.windows})
