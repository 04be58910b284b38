"""The unified model: text tokens and fused image tokens in, logits over codes out.

    text ids ------------------> text embedding ----------\
                                                           > LLaMA blocks -> TokenUnshuffle -> head
    codes -> code embedding -> TokenShuffle (s x s : 1) --/

The hidden state at the last text token predicts window 0; the one at window t predicts the s * s
codes of window t + 1, in raster order of the windows.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .shuffle import TokenShuffle, TokenUnshuffle, shuffle
from .transformer import KVCache, Transformer


class Logits(NamedTuple):
    codes: Tensor  # (B, windows, s * s, codebook_size)
    text: Tensor | None  # (B, T, text_vocabulary): the token that follows each text token


class TokenShuffleModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocabulary, config.width)
        self.code_embedding = nn.Embedding(config.codebook_size, config.width)
        shape = (config.width, config.window, config.fuse_blocks, config.norm_eps)
        self.shuffle = TokenShuffle(*shape)
        self.transformer = Transformer(config)
        self.unshuffle = TokenUnshuffle(*shape)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)

    def initialise(self) -> None:
        """Fresh weights: sqrt(2 / 5d) for linear layers (SmallInit, arXiv 1910.05895), residual
        outputs scaled by 1 / sqrt(2 layers) as in GPT-2; compress and expand keep the variance."""
        small = (2 / (5 * self.config.width)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear) and name.endswith(("compress", "expand")):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Linear):
                residual = name.endswith(("o_proj", "down_proj", "down"))
                scale = (2 * self.config.layers) ** -0.5 if residual else 1.0
                nn.init.normal_(module.weight, std=small * scale)

    def forward(
        self, text: Tensor, padding: Tensor, codes: Tensor, with_text: bool = False
    ) -> Logits:
        """Teacher-forced logits for every window.

        text (B, T) int64 framed ids, padded at the left by `padding` (B,) tokens;
        codes (B, H, W) int64 with sides that the window divides.
        """
        windows = self.embed_codes(codes)[:, :-1]
        x = torch.cat([self.text_embedding(text), windows], dim=1)
        hidden = self.transformer(x, padding)
        last = text.shape[1] - 1
        text_logits = hidden[:, : last + 1] @ self.text_embedding.weight.T if with_text else None
        return Logits(self.code_logits(hidden[:, last:]), text_logits)

    def targets(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W) -> (B, windows, s * s), in the order of the logits."""
        return shuffle(codes[..., None], self.config.window).flatten(1, 2)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W) -> fused tokens (B, windows, d)."""
        return self.shuffle(self.code_embedding(codes)).flatten(1, 2)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, n, d) -> logits (B, n, s * s, codebook_size)."""
        window = self.unshuffle(hidden[:, :, None])  # (B, n * s, s, d)
        return self.head(window).unflatten(1, (hidden.shape[1], -1)).flatten(2, 3)

    def prefill(self, text: Tensor, padding: Tensor, windows: int) -> tuple[KVCache, Tensor]:
        """Run the prompt; text and padding as in `forward`, `windows` how many will follow.

        Returns the cache and the logits (B, s * s, codebook_size) of the first window.
        """
        capacity = text.shape[1] + windows
        cache = KVCache(self.config, padding, capacity, self.head.weight.dtype)
        hidden = self.transformer(self.text_embedding(text), cache=cache)
        return cache, self.code_logits(hidden[:, -1:])[:, 0]

    def step(self, cache: KVCache, codes: Tensor) -> Tensor:
        """Append windows of codes (B, H, W), usually one, as one row or part of it.

        Returns the logits (B, s * s, codebook_size) of the window that follows.
        """
        hidden = self.transformer(self.embed_codes(codes), cache=cache)
        return self.code_logits(hidden[:, -1:])[:, 0]
