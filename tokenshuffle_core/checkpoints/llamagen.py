"""LlamaGen's class-conditional models (arXiv 2406.06525): window 1, two axes of positions, and a
class as the prompt."""

import re
from pathlib import Path

import torch
from torch import Tensor

from ..class_names import ClassNames, imagenet
from ..config import Config, GenerationConfig, ModelConfig
from . import vq
from .checkpoint import Checkpoint, Weights
from .source import Source

HEADS = {3200: 32, 4096: 32}  # by dim; the other models have a head size of 64
TOKENIZERS = ("vq_ds16_c2i.pt", "vq_ds8_c2i.pt")
MARKS = ("cls_embedding.embedding_table.weight",)  # only these models have it


def is_one(source: Source) -> bool:
    return any(mark in source for mark in MARKS)


def read(
    source: Source, image_tokenizer: Path | None = None, side: int | None = None
) -> Checkpoint:
    """A model and the file of its image tokenizer, by default a published one beside it; `side` is
    the size in pixels of its training pictures, by default taken from the file's name.

    Raises FileNotFoundError or ValueError.
    """
    images, image_weights = vq.read(image_tokenizer or source.beside(*TOKENIZERS))
    codes, dim = source.shape_of("tok_embeddings.weight", 2)
    classes = source.shape_of(MARKS[0], 2)[0] - 1
    layers = source.count("layers.{}.attention.wqkv.weight")
    side = side or int((re.findall(r"(?:_|\b)(256|384|512)(?:_|\b)", source.path.stem) or [256])[0])
    heads = HEADS.get(dim) or dim // 64
    model = ModelConfig(
        text_vocabulary=classes + 1, codebook_size=codes, dim=dim, layers=layers, heads=heads,
        kv_heads=heads, hidden=source.shape_of("layers.0.feed_forward.w1.weight", 2)[0],
        windows=(1,), rope_axes=2, context=64**2 + 5, max_prompt=1, max_grid=64,
    )  # fmt: skip
    generation = GenerationConfig(side, side, cfg=4.0, schedule="constant", top_k=2000)
    names = imagenet() if classes == len(imagenet()) else [f"class {i}" for i in range(classes)]
    card = {
        "modelspec.title": source.path.stem,
        "modelspec.author": "FoundationVision",
        "modelspec.description": "LlamaGen, class-conditional: the prompt is the number or the "
        "name of an ImageNet class.",
        "modelspec.resolution": f"{side}x{side}",
    }
    config = Config(images, model, generation)
    return Checkpoint(
        source.path, config, ClassNames(names), card, _model(source, model), image_weights
    )


def _model(source: Source, model: ModelConfig) -> Weights:
    names = {
        "text_embedding.weight": MARKS[0],
        "code_embedding.weight": "tok_embeddings.weight",
        "transformer.norm.weight": "norm.weight",
        "head.weight": "output.weight",
    }
    weights: Weights = {}
    for i in range(model.layers):
        ours, theirs = f"transformer.blocks.{i}.", f"layers.{i}."
        names |= {
            f"{ours}attention_norm.weight": f"{theirs}attention_norm.weight",
            f"{ours}mlp_norm.weight": f"{theirs}ffn_norm.weight",
            f"{ours}attention.o_proj.weight": f"{theirs}attention.wo.weight",
            f"{ours}mlp.gate_proj.weight": f"{theirs}feed_forward.w1.weight",
            f"{ours}mlp.up_proj.weight": f"{theirs}feed_forward.w3.weight",
            f"{ours}mlp.down_proj.weight": f"{theirs}feed_forward.w2.weight",
        }
        for part, letter in enumerate("qkv"):
            weights[f"{ours}attention.{letter}_proj.weight"] = (
                lambda name=f"{theirs}attention.wqkv.weight", part=part: _projection(
                    source[name], part, model
                )
            )
    return weights | {ours: lambda name=theirs: source[name] for ours, theirs in names.items()}


def _projection(qkv: Tensor, part: int, model: ModelConfig) -> Tensor:
    """One of the three projections in a matrix. Rotary pairs of queries and keys are (2 i, 2 i + 1)
    there and (i, i + head_size / 2) here."""
    if qkv.shape != (3 * model.dim, model.dim):
        raise ValueError(f"attention.wqkv.weight has the shape {tuple(qkv.shape)}")
    weight = qkv.chunk(3)[part]
    if part == 2:
        return weight
    order = torch.arange(model.head_size).view(-1, 2).T.flatten()
    return weight.view(model.heads, model.head_size, -1)[:, order].flatten(0, 1)
