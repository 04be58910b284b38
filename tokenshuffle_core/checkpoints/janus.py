"""Janus-Pro (arXiv 2501.17811) and Janus (arXiv 2410.13848), the parts that generate pictures: a
LLaMA with window 1 and a chat template. Reads the authors' layout and that of `transformers`.

The layers between a code's vector and the LLaMA depend on the code alone, so they become a table of
embeddings.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config, GenerationConfig, ModelConfig, PromptConfig
from ..text_tokenizer import TextTokenizer
from . import vq
from .checkpoint import Checkpoint
from .llama import llama_layers, shape_from
from .source import Source
from .tokenizer_files import text_tokenizer_of

# Our names for the parts -> theirs.
ORIGINAL = {
    "language": "language_model.model.",
    "codes": "gen_embed.weight",
    "aligner": ("gen_aligner.layers.0", "gen_aligner.layers.2"),
    "head": ("gen_head.output_mlp_projector", "gen_head.vision_head"),
    "vq": "gen_vision_model.",
    "config": "language_config",
}
TRANSFORMERS = {
    "language": "model.language_model.",
    "codes": "model.generation_embeddings.weight",
    "aligner": ("model.generation_aligner.fc1", "model.generation_aligner.hidden_layers.0"),
    "head": ("model.generation_head.proj_out", "model.generation_head.vision_head"),
    "vq": "model.vqmodel.",
    "config": "text_config",
}
MARKS = (ORIGINAL["codes"], TRANSFORMERS["codes"])  # tensors that only these models have
PROMPT = PromptConfig(  # Janus-Pro's
    ("<｜begin▁of▁sentence｜>", "<|User|>: {prompt}\n\n<|Assistant|>:", "<begin_of_image>"),
    pad="<｜▁pad▁｜>",
    padded_negative=True,
)
JANUS_PROMPT = replace(
    PROMPT, template=("<｜begin▁of▁sentence｜>", "User: {prompt}\n\nAssistant:", "<begin_of_image>")
)
SIDE = 384  # size of the training pictures in pixels
MAX_PROMPT = 1024


def is_one(source: Source) -> bool:
    return any(mark in source for mark in MARKS)


def read(
    source: Source, image_tokenizer: Path | None = None, side: int | None = None
) -> Checkpoint:
    """A folder with config.json, tokenizer.json and weights. Raises FileNotFoundError or
    ValueError."""
    if image_tokenizer:
        raise ValueError("Janus includes its image tokenizer: do not name another")
    layout = ORIGINAL if ORIGINAL["codes"] in source else TRANSFORMERS
    source.shape_of(layout["codes"], 2)
    images, image_weights = vq.image_tokenizer(source, layout["vq"])
    hidden, codes = (source.shape_of(f"{layout['head'][i]}.weight", 2)[0] for i in (0, 1))
    hf_config = source.config.get(layout["config"])
    if not isinstance(hf_config, dict):
        raise ValueError(f"{source.path / 'config.json'} has no {layout['config']}")
    shape = shape_from(source, hf_config, layout["language"])
    model = ModelConfig(
        **shape, codebook_size=codes, windows=(1,), head_hidden=hidden, max_prompt=MAX_PROMPT,
        max_grid=64,
    )  # fmt: skip
    text = text_tokenizer_of(source)
    pro = '"<|User|>"' in text or "pro" in source.name.lower()
    prompt = PROMPT if pro else JANUS_PROMPT
    text_tokenizer = TextTokenizer.from_json(text, prompt)
    side = side or SIDE
    card = {
        "modelspec.title": source.name,
        "modelspec.author": "DeepSeek",
        "modelspec.description": "Janus: the prompt describes the picture.",
        "modelspec.resolution": f"{side}x{side}",
    }
    generation = GenerationConfig(side, side, cfg=5.0, schedule="constant")
    language = layout["language"]
    weights = llama_layers(source, language, model) | {
        "text_embedding.weight": lambda: source[f"{language}embed_tokens.weight"],
        "code_embedding.weight": lambda: adapted(
            source[layout["codes"]], source, layout["aligner"]
        ),
    }
    for ours, theirs in zip(("head_input", "head"), layout["head"], strict=True):
        for part in ("weight", "bias"):
            weights[f"{ours}.{part}"] = lambda name=f"{theirs}.{part}": source[name]
    config = Config(images, model, generation, prompt)
    return Checkpoint(source.path, config, text_tokenizer, card, weights, image_weights)


@torch.inference_mode(False)
def adapted(x: Tensor, source: Source, names: tuple[str, str]) -> Tensor:
    """The LLaMA's input for each code (codes, d), from its vector by two layers with GELU."""
    first, second = (
        [source[f"{name}.{part}"].float() for part in ("weight", "bias")] for name in names
    )
    with torch.no_grad():
        return F.linear(F.gelu(F.linear(x.float(), *first)), *second).to(x.dtype)
