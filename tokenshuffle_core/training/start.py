"""What a training starts from: a model with new weights, or a trained one."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .. import checkpoints
from ..adapt.card import MERGED, changed_card
from ..adapt.grow import grow
from ..adapt.lora import merge_lora
from ..adapt.vocabulary import change_text_tokenizer
from ..config import Config, GenerationConfig, ModelConfig
from ..data.shards import CodeShards
from ..engine.quantize import check_whole
from ..model import TokenShuffleModel
from ..pipeline import Pipeline, load
from ..text_tokenizer import TextTokenizer
from .distributed import in_any, rank

CAPTIONS = 200_000  # enough to train a text tokenizer; more change little
NEW = "new"  # instead of the path of a tokenizer.json: train one on the captions


@dataclass(frozen=True)
class Changes:
    """How the model that a training starts from differs from the preset or the checkpoint.

    `text_tokenizer` is the path of a tokenizer.json, or `NEW`; `vocabulary` is the largest size of
    a new one, by default the preset's or the checkpoint's. `seed` is for new weights.
    `loras` are files of LoRAs, which are merged into the checkpoint before all else.
    """

    windows: tuple[int, ...] | None = None
    window_head: int = 0
    text_tokenizer: str | Path | None = None
    vocabulary: int | None = None
    card: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    loras: tuple[Path, ...] = ()


def open_codes(directory: str | Path) -> CodeShards:
    """The image codes in a folder. Only process 0 verifies their checksums; the others wait.

    Raises as `CodeShards`, in every process if in one, so that none continues alone.
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


def new_pipeline(
    shards: CodeShards, image_tokenizer: Path, preset: Config, changes: Changes
) -> Pipeline:
    """A model of the preset's shape with new weights, for the codes of `shards`.

    Its text tokenizer is a new one unless `changes` names another; the model has an embedding for
    each of its tokens. Its default size is the most frequent size of the pictures. Raises as the
    readers of these files.
    """
    images = checkpoints.load_image_tokenizer(image_tokenizer)
    shards.check(images)
    text = _text_tokenizer(changes.text_tokenizer or NEW, changes.vocabulary, shards, preset.model)
    shape: ModelConfig = replace(
        preset.model,
        text_vocabulary=len(text),
        codebook_size=images.config.codebook_size,
        windows=changes.windows or preset.model.windows,
        window_head=changes.window_head or preset.model.window_head,
    )
    config = Config(images.config, shape, _of_size(preset.generation, shards))
    torch.manual_seed(changes.seed)
    module = TokenShuffleModel(shape)
    module.initialise()
    return Pipeline(config, module, images, text, changes.card)


def trained_pipeline(init: Path, shards: CodeShards, changes: Changes) -> Pipeline:
    """The checkpoint `init` in float32 with `changes`: LoRAs merged, grown to other windows or a
    window head, and with another text tokenizer. Its default size becomes the most frequent size of
    the pictures. Of its card, the licence stays; its vocabulary, which says what it was trained on,
    is left out.

    Raises as the readers of these files, and ValueError for quantised weights or a shape that does
    not allow the changes.
    """
    pipeline = load(init, dtype=torch.float32)
    check_whole(pipeline.model)
    config = replace(pipeline.config, generation=_of_size(pipeline.config.generation, shards))
    pipeline = replace(pipeline, config=config, vocabulary=None)
    shape = config.model
    torch.manual_seed(changes.seed)
    for lora in changes.loras:
        merge_lora(pipeline.model, lora)
        pipeline.card = changed_card(pipeline.card, MERGED)
    if changes.text_tokenizer:
        text = _text_tokenizer(changes.text_tokenizer, changes.vocabulary, shards, shape)
        pipeline = change_text_tokenizer(pipeline, text)
    windows, head = changes.windows or shape.windows, changes.window_head
    if windows != shape.windows or head not in (0, shape.window_head):
        pipeline = grow(pipeline, windows, head)
    trained = shards.index["pictures"] - shards.index["held_out"]
    card = changed_card(pipeline.card, f"trained on {trained} pictures")
    return replace(pipeline, card=card | changes.card)


def _of_size(settings: GenerationConfig, shards: CodeShards) -> GenerationConfig:
    width, height = max(shards.indices, key=lambda size: len(shards.indices[size]))
    return replace(settings, width=width, height=height)


def _text_tokenizer(
    path: str | Path, vocabulary: int | None, shards: CodeShards, shape: ModelConfig
) -> TextTokenizer:
    """The one in the file `path`, or one trained on captions from the whole data set."""
    if path != NEW:
        return TextTokenizer.from_file(path, shape.max_grid)
    shape = replace(shape, text_vocabulary=vocabulary or shape.text_vocabulary)  # which checks it
    step = max(1, len(shards) // CAPTIONS)
    captions = (text for i in range(0, len(shards), step) for text in shards.record(i)["captions"])
    return TextTokenizer.train(captions, shape.text_vocabulary, shape.max_grid)
