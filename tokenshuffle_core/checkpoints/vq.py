"""VQGAN image tokenizers: LlamaGen's (arXiv 2406.06525), which Janus uses too, in the layouts of
LlamaGen and `transformers`, and what `ibq` reads, in that of VQGAN itself."""

import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..config import ImageTokenizerConfig
from .checkpoint import Weights, check_parts, skeleton
from .source import WRAPPERS, Source

MARKS = ("quantize.embedding.weight",)  # in a file of its own
# Parts of names, ours -> LlamaGen's, those of the `transformers` library, and VQGAN's, whose
# decoder counts its levels from the highest resolution.
LLAMAGEN = {
    "encoder": "conv_blocks", "decoder": "conv_blocks", "block": "res",
    "mid": ("mid.0", "mid.1", "mid.2"), "reversed": False,
}  # fmt: skip
TRANSFORMERS = {
    "encoder": "down", "decoder": "up", "block": "block",
    "mid": ("mid.block_1", "mid.attn_1", "mid.block_2"), "reversed": False,
}  # fmt: skip
VQGAN = TRANSFORMERS | {"reversed": True}


def read(path: str | Path) -> tuple[ImageTokenizerConfig, Weights]:
    """An image tokenizer in its own file; with averaged (EMA) weights if the file has them. Raises
    FileNotFoundError or ValueError."""
    return image_tokenizer(Source(path, ("ema", *WRAPPERS)))


def image_tokenizer(
    source: Source, prefix: str = "", quantizer: str = "normalised"
) -> tuple[ImageTokenizerConfig, Weights]:
    """Its shape, inferred from the weights, and the weights. Raises ValueError."""
    names = {name.removeprefix(prefix) for name in source.shapes if name.startswith(prefix)}
    layout = layout_of(names)
    if (layout is VQGAN) != (quantizer == "dot"):
        family, other = ("ibq", "vq") if layout is VQGAN else ("vq", "ibq")
        raise ValueError(f"{source.path}: its weights are named as in {family}, not as in {other}")
    config = replace(_config(source, prefix, layout), quantizer=quantizer)
    check_parts(config, names)
    theirs = {name: _theirs(name, config, layout) for name in skeleton(config).state_dict()}
    for name in sorted(names - set(theirs.values())):
        if name.startswith(("encoder.", "decoder.")):  # and not what trained it
            raise ValueError(f"{source.path}: {prefix}{name:.200} has no place beside the others")
    return config, {name: partial(source.__getitem__, prefix + n) for name, n in theirs.items()}


def layout_of(names: Collection[str]) -> dict:
    if any(".conv_blocks." in name for name in names):
        return LLAMAGEN
    # The highest resolution is the one that is not made larger.
    first, second = (f"decoder.up.{i}.upsample.conv.weight" in names for i in (0, 1))
    return VQGAN if second and not first else TRANSFORMERS


def _config(source: Source, prefix: str, layout: dict) -> ImageTokenizerConfig:
    start = f"{prefix}encoder.{layout['encoder']}."
    conv = f"{{}}.{layout['block']}.0.conv2.weight"
    outputs = [
        source.shape_of(start + conv.format(i), 4)[0] for i in range(source.count(start + conv))
    ]
    channels = source.shape_of(f"{prefix}encoder.conv_in.weight", 4)[0]
    attention = f"{start}{{}}.attn.0.q.weight"
    size, dim = source.shape_of(f"{prefix}{MARKS[0]}", 2)
    return ImageTokenizerConfig(
        channels=channels,
        channel_multipliers=tuple(output // channels for output in outputs),
        res_blocks=source.count(f"{start}0.{layout['block']}.{{}}.conv2.weight"),
        latent_channels=source.shape_of(f"{prefix}quant_conv.weight", 4)[1],
        codebook_size=size,
        codebook_dim=dim,
        attention_levels=tuple(
            level
            for level, i in enumerate(reversed(range(len(outputs))))
            if attention.format(i) in source
        ),
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
    last = len(config.channel_multipliers) - 1
    from_lowest = int(level) if side == "decoder" else last - int(level)
    index = last - int(level) if side == "decoder" and layout["reversed"] else level
    start = f"{side}.{layout[side]}.{index}"
    blocks = config.res_blocks + (side == "decoder")
    kind, place = layout["block"], int(number)
    if from_lowest in config.attention_levels and place < 2 * blocks:  # after each block
        kind, place = ("attn" if place % 2 else kind), place // 2
    if place >= blocks:
        return f"{start}.{'downsample' if side == 'encoder' else 'upsample'}.{rest}"
    return f"{start}.{kind}.{place}.{rest}"
