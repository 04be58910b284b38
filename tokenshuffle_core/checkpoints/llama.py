"""Any LLaMA, Qwen2, Qwen2.5 or Qwen3 of the `transformers` library as the start of a Token-Shuffle
model: its transformer, text embedding and text tokenizer; the layers for image codes are new."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config, GenerationConfig, ModelConfig
from ..model import TokenShuffleModel
from ..text_tokenizer import TextTokenizer, special_tokens
from . import image_tokenizers
from .checkpoint import Checkpoint, Weights
from .source import Source
from .tokenizer_files import text_tokenizer_of

MARKS = ("model.embed_tokens.weight",)
MAX_GRID, MAX_PROMPT = 256, 512
# With other values, the transformer would not be the one implemented here.
PLAIN = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False,
}  # fmt: skip


def is_one(source: Source) -> bool:
    return MARKS[0] in source


def read(
    source: Source,
    image_tokenizer: Path | None = None,
    side: int | None = None,
    windows: tuple[int, ...] = (2,),
) -> Checkpoint:
    """A folder with config.json, a text tokenizer and weights, and the file or folder of the image
    tokenizer, ours or a published one, whose codes the model will predict. Raises FileNotFoundError
    or ValueError."""
    if image_tokenizer is None:
        raise ValueError(f"{source.path} is a LLaMA: name the image tokenizer to use")
    images, image_weights = image_tokenizers.read(image_tokenizer)
    name = f"{source.path}: its text tokenizer"
    text_tokenizer = TextTokenizer.extended(
        text_tokenizer_of(source), special_tokens(MAX_GRID), name
    )
    shape = shape_from(source, source.config, "model.")
    shape["text_vocabulary"] = max(shape["text_vocabulary"], len(text_tokenizer))
    model = ModelConfig(
        **shape, codebook_size=images.codebook_size, windows=windows, max_prompt=MAX_PROMPT,
        max_grid=MAX_GRID, text_head="lm_head.weight" in source,
    )  # fmt: skip
    side = side or 256
    config = Config(images, model, GenerationConfig(side, side))
    weights: Weights = {name: lambda x=x: x for name, x in _new_layers(model).items()}
    weights |= llama_layers(source, "model.", model)
    weights["text_embedding.weight"] = lambda: _longer(source[MARKS[0]], model.text_vocabulary)
    if model.text_head:
        weights["text_head.weight"] = lambda: _longer(
            source["lm_head.weight"], model.text_vocabulary
        )
    card = {
        "modelspec.title": source.name,
        "modelspec.description": "A LLaMA not yet trained on image codes.",
    }
    return Checkpoint(source.path, config, text_tokenizer, card, weights, image_weights)


def shape_from(source: Source, hf_config: dict, prefix: str) -> dict:
    """Fields of ModelConfig from a LLaMA's config of the `transformers` library, checked against
    the weights. Raises ValueError for features that our transformer lacks."""
    for name, plain in PLAIN.items():
        if hf_config.get(name, plain) != plain:
            raise ValueError(f"{source.path}: {name} {hf_config[name]!r} is not supported")
    vocabulary, dim = source.shape_of(f"{prefix}embed_tokens.weight", 2)
    layers = source.count(f"{prefix}layers.{{}}.input_layernorm.weight")
    try:
        heads = int(hf_config.get("num_attention_heads", 32))
        kv_heads = int(hf_config.get("num_key_value_heads") or heads)
        context = int(hf_config.get("max_position_embeddings", 2048))
        norm_eps = float(hf_config.get("rms_norm_eps", 1e-6))
        head_dim = int(hf_config.get("head_dim") or dim // heads)
        theta, scaling = _rope(hf_config)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source.path}: config.json is not that of a LLaMA: {error}") from None
    attention = f"{prefix}layers.0.self_attn."
    # Checked here since new layers of this size may be made before the weights are read.
    size = heads * head_dim, dim
    if source.shape_of(f"{attention}q_proj.weight", 2) != size:
        raise ValueError(f"{source.path}: the query projection is not {size[0]} x {dim}")
    return {
        "text_vocabulary": vocabulary, "dim": dim, "layers": layers, "heads": heads,
        "kv_heads": kv_heads, "context": context, "norm_eps": norm_eps, "rope_theta": theta,
        "hidden": source.shape_of(f"{prefix}layers.0.mlp.gate_proj.weight", 2)[0],
        "rope_scaling": scaling, "head_dim": None if head_dim * heads == dim else head_dim,
        "qkv_bias": f"{attention}q_proj.bias" in source,
        "qk_norm": f"{attention}q_norm.weight" in source,
    }  # fmt: skip


def llama_layers(source: Source, prefix: str, model: ModelConfig) -> Weights:
    """The blocks and the final norm of a LLaMA or Qwen of the `transformers` library."""
    names = {"norm.weight": f"{prefix}norm.weight"}
    attention = [f"{part}_proj.weight" for part in "qkvo"]
    attention += [f"{part}_proj.bias" for part in "qkv" if model.qkv_bias]
    attention += [f"{part}_norm.weight" for part in "qk" if model.qk_norm]
    for i in range(model.layers):
        ours, theirs = f"blocks.{i}.", f"{prefix}layers.{i}."
        for part in attention:
            names[f"{ours}attention.{part}"] = f"{theirs}self_attn.{part}"
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
            raise ValueError(f"{source.path}: {name} does not belong in a LLaMA")
    return {f"transformer.{o}": lambda theirs=t: source[theirs] for o, t in names.items()}


def _rope(hf_config: dict) -> tuple[float, tuple[float, ...] | None]:
    """The base of the rotary embedding and its scaling, which newer files keep together."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10_000)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope scaling of the kind {kind!r} is not supported")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, tuple(float(rope[name]) for name in names)


def _new_layers(model: ModelConfig) -> dict[str, Tensor]:
    """The weights that a LLaMA lacks, initialised as in any new model."""
    new = TokenShuffleModel(replace(model, layers=1, hidden=1, text_vocabulary=1, text_head=False))
    new.config = model  # initialisation depends on the number of layers
    new.initialise()
    return {n: x for n, x in new.state_dict().items() if not n.startswith(("transformer", "text"))}


def _longer(table: Tensor, rows: int) -> Tensor:
    """The table with rows for new tokens, initialised as in a new model."""
    return torch.cat([table, torch.randn(rows - len(table), table.shape[1]).to(table) * 0.02])
