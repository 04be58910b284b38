"""LlamaGen's image tokenizers (arXiv 2406.06525), which Janus uses too, in the layouts of LlamaGen
and `transformers`."""

import re
from functools import partial
from pathlib import Path

from ..config import ImageTokenizerConfig
from .checkpoint import Weights, check_parts, skeleton
from .source import WRAPPERS, Source

MARKS = ("quantize.embedding.weight",)  # in a file of its own
# Parts of names, ours -> LlamaGen's, and ours -> those of the `transformers` library.
LLAMAGEN = {
    "encoder": "conv_blocks", "decoder": "conv_blocks", "block": "res",
    "mid": ("mid.0", "mid.1", "mid.2"),
}  # fmt: skip
TRANSFORMERS = {
    "encoder": "down", "decoder": "up", "block": "block",
    "mid": ("mid.block_1", "mid.attn_1", "mid.block_2"),
}  # fmt: skip


def read(path: str | Path) -> tuple[ImageTokenizerConfig, Weights]:
    """An image tokenizer in its own file; with averaged (EMA) weights if the file has them. Raises
    FileNotFoundError or ValueError."""
    return image_tokenizer(Source(path, ("ema", *WRAPPERS)))


def image_tokenizer(source: Source, prefix: str = "") -> tuple[ImageTokenizerConfig, Weights]:
    """Its shape, inferred from the weights, and the weights. Raises ValueError."""
    names = {name.removeprefix(prefix) for name in source.shapes if name.startswith(prefix)}
    layout = LLAMAGEN if any(".conv_blocks." in name for name in names) else TRANSFORMERS
    config = _config(source, prefix, layout)
    check_parts(config, names)
    weights: Weights = {}
    for name in skeleton(config).state_dict():
        theirs = prefix + _theirs(name, config, layout)
        weights[name] = partial(source.__getitem__, theirs)
    return config, weights


def _config(source: Source, prefix: str, layout: dict) -> ImageTokenizerConfig:
    start = f"{prefix}encoder.{layout['encoder']}."
    conv = f"{{}}.{layout['block']}.0.conv2.weight"
    outputs = [
        source.shape_of(start + conv.format(i), 4)[0] for i in range(source.count(start + conv))
    ]
    channels = source.shape_of(f"{prefix}encoder.conv_in.weight", 4)[0]
    size, dim = source.shape_of(f"{prefix}quantize.embedding.weight", 2)
    return ImageTokenizerConfig(
        channels=channels,
        channel_multipliers=tuple(output // channels for output in outputs),
        res_blocks=source.count(f"{start}0.{layout['block']}.{{}}.conv2.weight"),
        latent_channels=source.shape_of(f"{prefix}quant_conv.weight", 4)[1],
        codebook_size=size,
        codebook_dim=dim,
    )


def _theirs(name: str, config: ImageTokenizerConfig, layout: dict) -> str:
    """The published name of one of our weights."""
    name = name.replace("quantizer.codebook", "quantize.embedding")
    name = name.replace("shortcut", "nin_shortcut")
    if match := re.match(r"(encoder|decoder)\.mid\.(\d)\.(.*)", name):
        side, number, rest = match.groups()
        return f"{side}.{layout['mid'][int(number)]}.{rest}"
    if not (match := re.match(r"(encoder|decoder)\.levels\.(\d+)\.(\d+)\.(.*)", name)):
        return name
    side, level, number, rest = match.groups()
    start = f"{side}.{layout[side]}.{level}"
    blocks = config.res_blocks + (side == "decoder")
    lowest = len(config.channel_multipliers) - 1 if side == "encoder" else 0
    kind, place = layout["block"], int(number)
    if int(level) == lowest:  # attention after each block
        kind, place = ("attn" if place % 2 else kind), place // 2
    if place >= blocks:
        return f"{start}.{'downsample' if side == 'encoder' else 'upsample'}.{rest}"
    return f"{start}.{kind}.{place}.{rest}"
