"""Models with random weights in the measured sizes."""

import torch

from tokenshuffle_core import checkpoints
from tokenshuffle_core.config import Config, GenerationConfig, ModelConfig
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


def random_pipeline(name: str, window: int, device="cpu") -> Pipeline:
    """A model of SHAPES over 16,384 codes of 16 pixels each, for pictures of up to 2048 pixels, in
    the dtype that the device computes in. Guidance is on by default."""
    dim, layers, heads, hidden = SHAPES[name]
    text = TextTokenizer.train(["a red apple"], 1024, max_grid=PRESETS["paper-2.7b"].model.max_grid)
    shape = ModelConfig(
        text_vocabulary=len(text), codebook_size=LLAMAGEN_VQ16.codebook_size, windows=(window,),
        dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden, context=16_640,
        max_grid=PRESETS["paper-2.7b"].model.max_grid,
    )  # fmt: skip
    with torch.device(device):
        model = TokenShuffleModel(shape).to(checkpoints.default_dtype(device)).eval()
        images = ImageTokenizer(LLAMAGEN_VQ16).eval()
    model.initialise()
    return Pipeline(Config(LLAMAGEN_VQ16, shape, GenerationConfig()), model, images, text, {})
