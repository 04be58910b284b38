"""Tiny models with random weights, and a short training."""

import copy
import dataclasses

import torch
from torch import nn

from tokenshuffle_core.engine.quantize import QuantizedLinear
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.text_tokenizer import TextTokenizer
from tokenshuffle_core.training.settings import LoopConfig

TINY = PRESETS["tiny"]
CONFIG = TINY.model
LOOP = LoopConfig(
    steps=100, batch=4, learning_rate=5e-3, warmup=5, ema=0.9, validate_every=100, save_minutes=1e9
)


def random_checkpoint() -> Pipeline:
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    model = TokenShuffleModel(config.model)
    model.initialise()
    for parameter in model.parameters():  # logits that differ enough to matter
        parameter.data *= 2
    text = TextTokenizer.train(["a red apple"], 512, config.model.max_grid)
    card = {"modelspec.title": "tiny", "modelspec.resolution": "32x32"}
    return Pipeline(config, model, ImageTokenizer(config.image_tokenizer), text, card)


def model_of(window: int, **changes) -> TokenShuffleModel:
    torch.manual_seed(window)
    model = TokenShuffleModel(dataclasses.replace(CONFIG, windows=(window,), **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def dequantized(model: nn.Module) -> nn.Module:
    """A copy whose layers have the float32 weights that the small ones of `model` stand for."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            weight = layer.dequantized(torch.float32)
            whole = nn.Linear(*weight.shape[::-1], layer.bias is not None, device="meta")
            whole.weight, whole.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, whole)
    return model
