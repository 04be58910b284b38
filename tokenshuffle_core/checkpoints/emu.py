"""Emu3.5 and Emu3.5-Image (arXiv 2510.26583): a Qwen3 whose image codes, those of IBQ, follow its
text tokens in one vocabulary. The prompt spells out rows and columns, and a token follows each row.
"""

from dataclasses import replace
from pathlib import Path

from ..config import Config, GenerationConfig, PromptConfig
from ..text_tokenizer import TextTokenizer
from . import ibq, image_tokenizers, native, one_vocabulary
from .checkpoint import Checkpoint
from .source import PICKLES, Source
from .tokenizer_files import text_tokenizer_of

PICTURE = ("<|extra_100|>", "<|image start|>", "{rows}*{columns}", "<|image token|>")
PROMPT = PromptConfig(
    (
        "<|extra_203|>",
        "You are a helpful assistant for t2i task. USER: {prompt} ASSISTANT: ",
        *PICTURE,
    ),
    pad="<|endoftext|>",
    negative=("<|extra_203|>", "You are a helpful assistant. USER: {prompt} ASSISTANT: ", *PICTURE),
)
ROW_END, LAST = "<|extra_200|>", "<|image end|>"  # the codes follow the last text token
MAX_PROMPT, MAX_GRID = 1024, 97
# Rows and columns of codes, as published.
GRIDS = (64, 64), (55, 73), (73, 55), (52, 78), (78, 52), (47, 85), (85, 47), (41, 97)
IMAGE_TOKENIZER = "Emu3.5-VisionTokenizer"  # the folder of it


def is_one(source: Source) -> bool:
    normed = "model.layers.0.self_attn.q_norm.weight" in source  # which Emu3 lacks
    return normed and one_vocabulary.is_named(source, "emu3")


def read(
    source: Source, image_tokenizer: Path | None = None, side: int | None = None
) -> Checkpoint:
    """A folder with config.json, emu3.tiktoken and weights, and the file or folder of the image
    tokenizer, by default one inside the folder or beside it. Raises FileNotFoundError or
    ValueError."""
    found = image_tokenizer or source.beside(IMAGE_TOKENIZER)
    published = found.is_dir() or found.suffix.lower() in PICKLES
    images, image_weights = (ibq if published else image_tokenizers).read(found)
    text_tokenizer = TextTokenizer.from_json(text_tokenizer_of(source), PROMPT)
    ids = text_tokenizer.tokenizer.get_vocab()
    if missing := {ROW_END, LAST} - ids.keys():
        raise ValueError(f"{source.path}: its text tokenizer has no token {min(missing)}")
    model = one_vocabulary.shape_of(
        source, ids[LAST] + 1, images.codebook_size, max_prompt=MAX_PROMPT, max_grid=MAX_GRID
    )
    model = replace(model, row_end=ids[ROW_END])
    stride = images.stride
    sizes = [(side, side)] if side else [(w * stride, h * stride) for h, w in GRIDS]
    card = {
        "modelspec.title": source.name,
        "modelspec.author": "BAAI",
        "modelspec.description": "Emu3.5: the prompt describes the picture.",
        "modelspec.license": "Apache-2.0 (code)",
        **native.card_of_sizes(sizes),
    }
    cfg = 5.0 if "image" in source.name.lower() else 2.0
    generation = GenerationConfig(*sizes[0], cfg=cfg, schedule="constant", top_k=5120)
    weights = one_vocabulary.weights_of(source, model)
    config = Config(images, model, generation, PROMPT)
    return Checkpoint(source.path, config, text_tokenizer, card, weights, image_weights)
