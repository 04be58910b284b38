"""Retrieval: is the nearest reference of a generated picture the prompted subject?

The references of a style are all of the data set's pictures of that style, on white. The
distance is the mean squared error between the pictures area-averaged to 32 x 32 RGB pixels.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..bulk import pictures
from ..config import GenerationConfig
from ..data.emoji import captions
from ..data.emoji.build import read_manifest
from ..data.emoji.pictures import on_white
from ..pipeline import Pipeline
from .reconstruction import psnr

SIDE = 32


def features(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in 0..1 -> (N, 3 * 32 * 32)."""
    return F.adaptive_avg_pool2d(images, SIDE).flatten(1)


def nearest_first(generated: Tensor, references: Tensor) -> Tensor:
    """Features (N, F) and (M, F) -> reference indices (N, M), nearest first."""
    return torch.cdist(generated, references).argsort(dim=1)


def choose(records: list[dict], split: str, count: int | None, seed: int) -> list[dict]:
    """`count` records of a split in random order; all of them where None."""
    chosen = [record for record in records if record["split"] == split]
    random.Random(seed).shuffle(chosen)
    return chosen[:count]


def check_language(records: list[dict], language: str) -> None:
    """Raises ValueError where the manifest has no names in a language."""
    if language not in records[0]["names"]:
        raise ValueError(
            f"language {language!r} is not one of {', '.join(records[0]['names'])}, which the data "
            "set has names in"
        )


def retrieval(
    pipeline: Pipeline,
    data: Path,
    records: list[dict],
    settings: GenerationConfig,
    *,
    seed: int = 0,
    batch: int = 16,
    language: str = "en",
) -> tuple[dict[str, float], list[Tensor]]:
    """Generate each record's canonical prompt and look it up among its style's references.

    Returns top-1 and top-5 shares, and the images (3, H, W). `records` is a part of the
    manifest of the data set in `data`; picture i is drawn with seed + i. Raises ValueError for a
    language that the data set has no names in, or a prompt that is too long.
    """
    references = read_manifest(data)
    check_language(references, language)
    known = torch.cat([features(part) for part in on_white(data, references)])
    prompts = [
        captions.prompt(r["names"][language][0], r["style"], language=language) for r in records
    ]
    images = generate(pipeline, prompts, range(seed, seed + len(prompts)), settings, batch)
    found = {1: 0, 5: 0}
    for record, image in zip(records, images, strict=True):
        same_style = [i for i, r in enumerate(references) if r["style"] == record["style"]]
        order = nearest_first(features(image[None]), known[same_style])[0].tolist()
        subjects = [references[same_style[i]]["subject"] for i in order[:5]]
        for k in found:
            found[k] += record["subject"] in subjects[:k]
    count = max(1, len(records))
    return {f"top-{k}": hits / count for k, hits in found.items()}, images


def generate(
    pipeline: Pipeline,
    prompts: list[str],
    seeds: Sequence[int],
    settings: GenerationConfig,
    batch: int,
) -> list[Tensor]:
    """An image (3, H, W) float32 in 0..1 of each prompt. Raises ValueError for one that is too
    long."""
    ids = [pipeline.encode_prompt(prompt) for prompt in prompts]
    drawn = pictures(pipeline, ids, list(seeds), settings, batch=batch)
    bar = tqdm(drawn, "drawing", len(ids), unit="picture", disable=None)
    return [image.movedim(-1, 0) for image in bar]


@torch.inference_mode()
def reconstruction_psnr(pipeline: Pipeline, data: Path, records: list[dict]) -> float:
    """Mean PSNR in dB of the image tokenizer on the records' pictures, on white."""
    found = []
    for images in on_white(data, records):
        decoded = pipeline.image_tokenizer.decode(pipeline.image_tokenizer.encode(images))
        found.append(psnr(decoded, images))
    return torch.cat(found).mean().item()
