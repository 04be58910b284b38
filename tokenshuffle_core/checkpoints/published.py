"""What a family of published checkpoints is read as."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..class_names import ClassNames
from ..config import Config
from ..text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from .source import Source

Weights = dict[str, Callable[[], Tensor]]  # our name -> reads it


@dataclass
class Published:
    path: Path
    config: Config
    text_tokenizer: TextTokenizer | ClassNames
    card: dict[str, str]
    model: Weights
    image_tokenizer: Weights


def meta(module: Callable[..., nn.Module], config) -> dict[str, torch.Size]:
    """Name -> shape of the weights of such a module, of which none is made."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in module(config).state_dict().items()}


def shape_of(source: "Source", name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there. Raises ValueError."""
    if name not in source:
        raise ValueError(f"{source.path}: {name} is missing")
    if len(source.shapes[name]) != dimensions or 0 in source.shapes[name]:
        raise ValueError(f"{source.path}: {name} has the shape {source.shapes[name]}")
    return source.shapes[name]


def count(source: "Source", pattern: str) -> int:
    """How many layers there are, with {} for their number in the pattern. Raises ValueError."""
    layers = 0
    while pattern.format(layers) in source:
        layers += 1
    if not layers:
        raise ValueError(f"{source.path}: {pattern.format(0)} is missing")
    return layers


def llama_layers(source: "Source", prefix: str, layers: int) -> Weights:
    """The blocks and the norm of `transformers`' LLaMA."""
    names = {"norm.weight": f"{prefix}norm.weight"}
    for i in range(layers):
        ours, theirs = f"blocks.{i}.", f"{prefix}layers.{i}."
        for part in ("q", "k", "v", "o"):
            names[f"{ours}attention.{part}_proj.weight"] = f"{theirs}self_attn.{part}_proj.weight"
        for part in ("gate", "up", "down"):
            names[f"{ours}mlp.{part}_proj.weight"] = f"{theirs}mlp.{part}_proj.weight"
        names[f"{ours}attention_norm.weight"] = f"{theirs}input_layernorm.weight"
        names[f"{ours}mlp_norm.weight"] = f"{theirs}post_attention_layernorm.weight"
    for name in names.values():
        if name not in source:
            raise ValueError(f"{source.path}: {name} is missing")
    others = {name for name in source.shapes if name.startswith(f"{prefix}layers.")}
    for name in sorted(others - set(names.values())):
        if not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{source.path}: {name} has no place in a LLaMA")
    return {f"transformer.{o}": lambda theirs=t: source[theirs] for o, t in names.items()}
