"""Models whose image codes are tokens of one vocabulary with the text, such as SimpleAR and Emu3.5:
the codes come after all text tokens, and the layers for both are slices of two tables, or one."""

from collections.abc import Callable

from torch import Tensor

from ..config import ModelConfig
from .checkpoint import Weights
from .llama import llama_layers, shape_from
from .source import Source

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_named(source: Source, name: str) -> bool:
    """Whether a folder in the layout of a LLaMA calls itself so in its config.json."""
    if not source.path.is_dir() or EMBEDDING not in source:
        return False
    return name in f"{source.config.get('model_type')} {source.config.get('architectures')}".lower()


def shape_of(source: Source, text: int, codes: int, **fields) -> ModelConfig:
    """The shape of a model with so many text tokens and image codes, in the layout of a LLaMA of
    `transformers`. Raises ValueError if its vocabulary has too few rows."""
    shape = shape_from(source, source.config, "model.")
    if shape["text_vocabulary"] < text + codes:
        raise ValueError(
            f"{source.path}: {text} text tokens and {codes} image codes are more than the "
            f"{shape['text_vocabulary']} rows of {EMBEDDING}"
        )
    shape["text_vocabulary"] = text
    tied = HEAD not in source
    return ModelConfig(**shape, codebook_size=codes, windows=(1,), text_head=not tied, **fields)


def weights_of(source: Source, model: ModelConfig) -> Weights:
    """The weights of a model of this shape; tied ones have the embedding's rows as their head."""
    text, end = model.text_vocabulary, model.text_vocabulary + model.codebook_size
    head = HEAD if model.text_head else EMBEDDING

    def rows(name: str, first: int, last: int) -> Callable[[], Tensor]:
        return lambda: source[name][first:last]

    weights = llama_layers(source, "model.", model) | {
        "text_embedding.weight": rows(EMBEDDING, 0, text),
        "code_embedding.weight": rows(EMBEDDING, text, end),
        "head.weight": rows(head, text, end),
    }
    if model.text_head:
        weights["text_head.weight"] = rows(head, 0, text)
    return weights
