"""Models with random weights in the measured sizes."""

import torch

from tokenshuffle_core import checkpoints
from tokenshuffle_core.config import Config, ImageTokenizerConfig, ModelConfig
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.presets import LLAMAGEN_VQ16, PRESETS
from tokenshuffle_core.text_tokenizer import TextTokenizer

# LlamaGen's B, L and XL (arXiv 2406.06525) and the paper's own: dim, layers, heads, hidden.
SHAPES = {
    "tiny": (128, 2, 2, 384),
    "111m": (768, 12, 12, 2048),
    "343m": (1024, 24, 16, 2816),
    "775m": (1280, 36, 20, 3584),
    "2.7b": (3072, 20, 24, 8192),
}

# SimpleAR's (arXiv 2504.11455): a Qwen2.5-1.5B, and Cosmos' tokenizer of 82 M parameters.
SIMPLEAR = ModelConfig(
    text_vocabulary=151_672, codebook_size=64_000, dim=1536, layers=28, heads=12, kv_heads=2,
    hidden=8960, windows=(1,), context=4608, max_prompt=508, max_grid=64, rope_theta=1e6,
    norm_eps=1e-6, qkv_bias=True,
)  # fmt: skip
COSMOS = ImageTokenizerConfig(
    channel_multipliers=(2, 4, 4), norm_groups=1, latent_channels=16, codebook_size=64_000,
    codebook_dim=6, quantizer="fsq", levels=(8, 8, 8, 5, 5, 5), patch=4, attention_levels=(),
    video=True,
)  # fmt: skip


def random_pipeline(name: str, window: int, device="cpu") -> Pipeline:
    """A model of SHAPES over 16,384 codes of 16 pixels each, for pictures of up to 2048 pixels, or
    of SimpleAR's shape, in the dtype that the device computes in. Guidance is on by default."""
    text = TextTokenizer.train(["a red apple"], 1024, max_grid=PRESETS["paper-2.7b"].model.max_grid)
    if name == "simplear-1.5b":
        return random_weights(Config(COSMOS, SIMPLEAR), text, device)
    dim, layers, heads, hidden = SHAPES[name]
    shape = ModelConfig(
        text_vocabulary=len(text), codebook_size=LLAMAGEN_VQ16.codebook_size, windows=(window,),
        dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden, context=16_640,
        max_grid=PRESETS["paper-2.7b"].model.max_grid,
    )  # fmt: skip
    return random_weights(Config(LLAMAGEN_VQ16, shape), text, device)


def random_weights(config: Config, text: TextTokenizer, device) -> Pipeline:
    with torch.device(device):
        model = TokenShuffleModel(config.model).to(checkpoints.default_dtype(device)).eval()
        images = ImageTokenizer(config.image_tokenizer).eval()
    model.initialise()
    return Pipeline(config, model, images, text, {})
