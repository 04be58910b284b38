"""Models with random weights in the sizes that are measured."""

import torch

from tokenshuffle_core.config import LLAMAGEN_VQ16, PRESETS, Config, GenerationConfig, ModelConfig
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.text_tokenizer import TextTokenizer

# LlamaGen's B, L and XL (arXiv 2406.06525) and the paper's: dim, layers, heads, hidden.
SHAPES = {
    "tiny": (128, 2, 2, 384),
    "111m": (768, 12, 12, 2048),
    "343m": (1024, 24, 16, 2816),
    "775m": (1280, 36, 20, 3584),
    "2.7b": (3072, 20, 24, 8192),
}


def random_pipeline(
    name: str, window: int, settings: GenerationConfig, device="cpu", dtype=torch.float32
) -> Pipeline:
    """A model of SHAPES over 16,384 codes of 16 pixels. `ready` for pictures of 2048 pixels."""
    dim, layers, heads, hidden = SHAPES[name]
    text = TextTokenizer.train(["a red apple"], 1024, max_grid=PRESETS["paper-2.7b"].model.max_grid)
    shape = ModelConfig(
        text_vocabulary=len(text), codebook_size=LLAMAGEN_VQ16.codebook_size, windows=(window,),
        dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden, context=16_640,
        max_grid=PRESETS["paper-2.7b"].model.max_grid,
    )  # fmt: skip
    with torch.device(device):
        model = TokenShuffleModel(shape).to(dtype).eval()
        images = ImageTokenizer(LLAMAGEN_VQ16).eval()
    model.initialise()
    return Pipeline(Config(LLAMAGEN_VQ16, shape, settings), model, images, text, {})


def read_weights(model: TokenShuffleModel, stored: torch.dtype | None = None) -> int:
    """Bytes of the weights that a decoding step has to read, all but the tables of embeddings: as
    they are, or as their file stores them."""
    weights = [w for name, w in model.state_dict().items() if "embedding" not in name]
    return sum(min(w.itemsize, (stored or w.dtype).itemsize) * w.numel() for w in weights)
