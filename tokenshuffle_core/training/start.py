"""What a training starts from: a model with fresh weights, or a trained one."""

from dataclasses import replace
from pathlib import Path

import torch

from .. import checkpoints
from ..adapt.grow import grow
from ..adapt.vocabulary import change_text_tokenizer
from ..config import Config, GenerationConfig, ModelConfig
from ..data.shards import CodeShards
from ..engine.quantize import check_whole
from ..model import TokenShuffleModel
from ..pipeline import Pipeline, load
from ..text_tokenizer import TextTokenizer
from .distributed import in_any, rank

CAPTIONS = 200_000  # of which a text tokenizer is trained; more change little
NEW = "new"  # instead of the path of a tokenizer.json: train one on the captions


def open_codes(directory: str | Path) -> CodeShards:
    """The codes in a folder. Process 0 alone compares their checksums, and the others wait for it.

    Raises as `CodeShards`, in all processes where it does so in one, so that none goes on alone.
    """
    shards = problem = None
    try:
        shards = CodeShards(directory, verify=rank() == 0)
    except (ValueError, OSError) as error:
        problem = error
    (failed,) = in_any(problem is not None)
    if failed:
        raise problem or ValueError(f"another process cannot use the codes in {directory}")
    return shards


def train_text_tokenizer(shards: CodeShards, vocabulary: int, max_grid: int) -> TextTokenizer:
    """A tokenizer trained on the captions of pictures spread over the data set."""
    step = max(1, len(shards) // CAPTIONS)
    captions = (text for i in range(0, len(shards), step) for text in shards.record(i)["captions"])
    return TextTokenizer.train(captions, vocabulary, max_grid)


def fresh_parts(
    shards: CodeShards,
    image_tokenizer: Path,
    preset: Config,
    *,
    windows: tuple[int, ...] | None = None,
    window_head: int = 0,
    text_tokenizer: str | Path | None = None,
    vocabulary: int | None = None,
    card: dict[str, str] | None = None,
    seed: int = 0,
) -> Pipeline:
    """A model of the preset's shape with fresh weights, for the codes of `shards`.

    `vocabulary` bounds the text tokenizer, a new one where None is named, as large as the preset's
    where None; the model gets as many embeddings as that has tokens. Its default size is the most
    frequent one of the pictures. Raises as the readers of these files.
    """
    images = checkpoints.load_image_tokenizer(image_tokenizer)
    shards.check(images)
    text = _text_tokenizer(text_tokenizer or NEW, vocabulary, shards, preset.model)
    shape: ModelConfig = replace(
        preset.model,
        text_vocabulary=len(text),
        codebook_size=images.config.codebook_size,
        windows=windows or preset.model.windows,
        window_head=window_head,
    )
    config = Config(images.config, shape, _of_size(preset.generation, shards))
    torch.manual_seed(seed)
    module = TokenShuffleModel(shape)
    module.initialise()
    return Pipeline(config, module, images, text, card or {})


def trained_parts(
    init: Path,
    shards: CodeShards,
    *,
    windows: tuple[int, ...] | None = None,
    window_head: int = 0,
    text_tokenizer: str | Path | None = None,
    vocabulary: int | None = None,
    card: dict[str, str] | None = None,
    seed: int = 0,
) -> Pipeline:
    """The checkpoint `init`, grown to `windows` and a window head and moved to another text
    tokenizer where these are asked for; `vocabulary` bounds a new one, as large as the old where
    None. Its default size becomes the most frequent one of the pictures.

    Raises as the readers of these files, and ValueError where the shape does not allow it and for
    quantised weights.
    """
    parts = load(init)
    check_whole(parts.model)
    config = replace(parts.config, generation=_of_size(parts.config.generation, shards))
    parts = replace(parts, config=config, card=card or {})
    shape = config.model
    torch.manual_seed(seed)
    if text_tokenizer:
        text = _text_tokenizer(text_tokenizer, vocabulary, shards, shape)
        parts = change_text_tokenizer(parts, text)
    if (windows or shape.windows) != shape.windows or window_head not in (0, shape.window_head):
        parts = grow(parts, windows or shape.windows, window_head)
    return parts


def _of_size(settings: GenerationConfig, shards: CodeShards) -> GenerationConfig:
    width, height = max(shards.indices, key=lambda size: len(shards.indices[size]))
    return replace(settings, width=width, height=height)


def _text_tokenizer(
    path: str | Path, vocabulary: int | None, shards: CodeShards, shape: ModelConfig
) -> TextTokenizer:
    if path == NEW:
        shape = replace(shape, text_vocabulary=vocabulary or shape.text_vocabulary)
        return train_text_tokenizer(shards, shape.text_vocabulary, shape.max_grid)
    return TextTokenizer.from_file(path, shape.max_grid)
