"""What a training starts from: a model with fresh weights, and its text tokenizer."""

from dataclasses import replace
from pathlib import Path

import torch

from .. import checkpoint
from ..config import Config, ModelConfig
from ..model import TokenShuffleModel
from ..text_tokenizer import TextTokenizer
from .shards import CodeShards

CAPTIONS = 200_000  # of which a text tokenizer is trained; more change little


def train_text_tokenizer(shards: CodeShards, vocabulary: int, max_grid: int) -> TextTokenizer:
    """A tokenizer trained on the captions of pictures spread over the data set."""
    step = max(1, len(shards) // CAPTIONS)
    captions = (text for i in range(0, len(shards), step) for text in shards.record(i)["captions"])
    return TextTokenizer.train(captions, vocabulary, max_grid)


def fresh_parts(
    codes: Path,
    image_tokenizer: Path,
    preset: Config,
    *,
    windows: tuple[int, ...] | None = None,
    window_head: int = 0,
    text_tokenizer: Path | None = None,
    card: dict[str, str] | None = None,
    seed: int = 0,
) -> checkpoint.Checkpoint:
    """A model of the preset's shape with fresh weights, for the codes in the folder `codes`.

    `preset.model.text_vocabulary` is an upper bound: the model gets as many embeddings as the
    text tokenizer (a tokenizer.json, or one trained on the captions) has tokens. Its default size
    is the most frequent one of the pictures. Raises as the readers of these files, and ValueError
    where the text tokenizer is too large.
    """
    shards = CodeShards(codes)
    images = checkpoint.load_image_tokenizer(image_tokenizer)
    shards.check(images)
    shape = preset.model
    text = (
        TextTokenizer.from_file(text_tokenizer, shape.max_grid)
        if text_tokenizer
        else train_text_tokenizer(shards, shape.text_vocabulary, shape.max_grid)
    )
    shape: ModelConfig = replace(
        shape,
        text_vocabulary=len(text),
        codebook_size=images.config.codebook_size,
        windows=windows or shape.windows,
        window_head=window_head,
    )
    width, height = max(shards.indices, key=lambda size: len(shards.indices[size]))
    config = Config(images.config, shape, replace(preset.generation, width=width, height=height))
    torch.manual_seed(seed)
    module = TokenShuffleModel(shape)
    module.initialise()
    return checkpoint.Checkpoint(config, module, images, text, card or {})
