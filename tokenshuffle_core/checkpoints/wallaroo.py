"""Wallaroo (arXiv 2603.04980): a Qwen2.5-VL, of whose three axes of positions a picture uses one,
with LlamaGen's image tokenizer. The prompt tells the size in pixels, and a token follows each row.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config, GenerationConfig, ModelConfig, PromptConfig
from ..text_tokenizer import TextTokenizer
from . import image_tokenizers, native
from .checkpoint import Checkpoint, Weights
from .janus import adapted
from .llama import llama_layers, shape_from
from .source import Source
from .tokenizer_files import text_tokenizer_of

PREFIX, EMBEDDING, HEAD = "wallaroo.model.", "wallaroo.model.embed_tokens.weight", "gen_image_head"
ADAPTER = ("gen_input_adpater.0", "gen_input_adpater.2")  # spelt so in the published file
FRAME = (
    "<|im_start|>", "system\nYou are a helpful assistant.", "<|im_end|>", "\n",
    "<|im_start|>", "user\nGenerate an image with resolution {width}x{height}",
    ' based on the prompt: "{prompt}"', "<|im_end|>", "\n ", "<indicator:{height}>",
    "<indicator:{width}>", "<|im_start|>", "assistant\n", "<|generate_start|>",
)  # fmt: skip
# Without a prompt, the quotation marks stay.
PROMPT = PromptConfig(FRAME, pad="<|endoftext|>", negative=FRAME)
ROW_END = "<|end_of_line>|"
SIDES = (352, 640, 384, 672, 704, 416, 608, 576, 448, 480, 544, 512)
SPECIAL = [  # what the authors append to the text tokenizer, in this order
    "<|generate_start|>", "<|generate_end|>", "<|pixel_start|>", "<|pixel_end|>", ROW_END,
    "<|generate_image_pad|>", *(f"<indicator:{side}>" for side in SIDES),
]  # fmt: skip
SIZES = (  # (width, height) in pixels, of the training
    (512, 512), (704, 352), (672, 352), (672, 384), (640, 384), (608, 416), (576, 416), (576, 448),
    (544, 448), (544, 480), (512, 480), (480, 544), (448, 544), (448, 576), (416, 576), (416, 608),
    (384, 640), (384, 672), (352, 704),
)  # fmt: skip
MAX_PROMPT = 1024
HEAD_SIZE = 128  # of any Qwen2.5 of this size
IMAGE_TOKENIZERS = ("vq_ds16_t2i.pt", "vq_ds16_c2i.pt")


def is_one(source: Source) -> bool:
    return f"{ADAPTER[0]}.weight" in source


def read(
    source: Source, image_tokenizer: Path | None = None, side: int | None = None
) -> Checkpoint:
    """The published file, or its folder, with Qwen2.5-VL's text tokenizer and LlamaGen's image
    tokenizer beside it; config.json as well, if it is not the published shape. Raises
    FileNotFoundError or ValueError."""
    images, image_weights = image_tokenizers.read(
        image_tokenizer or source.beside(*IMAGE_TOKENIZERS)
    )
    text_tokenizer = TextTokenizer.extended(
        text_tokenizer_of(source), SPECIAL, f"{source.path}: its text tokenizer", PROMPT
    )
    shape = shape_from(source, _hf_config(source), PREFIX)
    shape["text_vocabulary"] = max(shape["text_vocabulary"], len(text_tokenizer))
    hidden, codes = (source.shape_of(f"{HEAD}.{i}.weight", 2)[0] for i in (0, 2))
    model = ModelConfig(
        **shape, codebook_size=codes, windows=(1,), head_hidden=hidden, max_prompt=MAX_PROMPT,
        max_grid=max(SIDES) // 16, row_end=text_tokenizer.tokenizer.token_to_id(ROW_END),
        text_head="wallaroo.lm_head.weight" in source,
    )  # fmt: skip
    sizes = [(side, side)] if side else SIZES
    card = {
        "modelspec.title": "Wallaroo 7B",
        "modelspec.author": "Jie Zhu et al.",
        "modelspec.description": "Wallaroo: the prompt describes the picture, in English or "
        "Chinese.",
        "modelspec.license": "Apache-2.0 (code)",
        **native.card_of_sizes(sizes),
    }
    generation = GenerationConfig(*sizes[0], cfg=3.0, schedule="constant", top_k=1000)
    weights = _weights(source, model, image_weights)
    config = Config(images, model, generation, PROMPT)
    return Checkpoint(source.path, config, text_tokenizer, card, weights, image_weights)


def _weights(source: Source, model: ModelConfig, images: Weights) -> Weights:
    def table() -> Tensor:
        vectors = F.normalize(images["quantizer.codebook.weight"]().float(), dim=-1)
        return adapted(vectors, source, ADAPTER).to(source[EMBEDDING].dtype)

    weights = llama_layers(source, PREFIX, model) | {
        "text_embedding.weight": lambda: source[EMBEDDING],
        "code_embedding.weight": table,
        "head_input.weight": lambda: source[f"{HEAD}.0.weight"],
        "head_input.bias": lambda: source[f"{HEAD}.0.bias"],
        "head.weight": lambda: source[f"{HEAD}.2.weight"],
        "head.bias": lambda: torch.zeros(model.codebook_size),
    }
    if model.text_head:
        weights["text_head.weight"] = lambda: source["wallaroo.lm_head.weight"]
    return weights


def _hf_config(source: Source) -> dict:
    """The language model's config.json, without the axes of its positions."""
    if not (source.folder / "config.json").is_file():
        heads, kv_heads = (
            source.shape_of(f"{PREFIX}layers.0.self_attn.{part}_proj.weight", 2)[0] // HEAD_SIZE
            for part in "qk"
        )
        return {
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "max_position_embeddings": 32_768,
        }  # fmt: skip
    found = source.json("config.json")
    found = found.get("text_config", found)
    if not isinstance(found, dict):
        raise ValueError(f"{source.folder / 'config.json'} has no text_config")
    for name in ("rope_scaling", "rope_parameters"):
        rope = found.get(name)
        if isinstance(rope, dict) and "mrope_section" in rope:
            found = found | {name: {"rope_theta": rope.get("rope_theta", found.get("rope_theta"))}}
    return found
