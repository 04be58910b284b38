"""Retrieval: is the nearest reference of a generated picture the prompted subject?

The references of a style are all pictures in that style in the data set, on white. The distance is
the mean squared error between the pictures area-averaged to 32 x 32 RGB pixels.
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
    """`count` records of a split in random order, or all if None."""
    part = [record for record in records if record["split"] == split]
    random.Random(seed).shuffle(part)
    return part[:count]


def check_language(records: list[dict], language: str) -> None:
    """Raises ValueError if the manifest has no names in a language."""
    if language not in records[0]["names"]:
        raise ValueError(
            f"language {language!r} is not one of {', '.join(records[0]['names'])}, the languages "
            "of the data set"
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
) -> tuple[list[dict[str, bool]], list[Tensor]]:
    """Generate each record's canonical prompt and look it up among its style's references.

    Returns for each record whether its subject is the nearest ("top-1") and one of the five nearest
    ("top-5"), and the images (3, H, W). `records` is a part of the manifest of the data set in
    `data`; picture i is drawn with seed + i. Raises ValueError for a language in which the data set
    has no names, or a prompt that is too long.
    """
    references = read_manifest(data)
    check_language(references, language)
    reference_features = torch.cat([features(part) for part in on_white(data, references)])
    prompts = [
        captions.prompt(r["names"][language][0], r["style"], language=language) for r in records
    ]
    images = generate(pipeline, prompts, range(seed, seed + len(prompts)), settings, batch)
    scores = []
    for record, image in zip(records, images, strict=True):
        same_style = [i for i, r in enumerate(references) if r["style"] == record["style"]]
        order = nearest_first(features(image[None]), reference_features[same_style])[0].tolist()
        subjects = [references[same_style[i]]["subject"] for i in order[:5]]
        scores.append({f"top-{k}": record["subject"] in subjects[:k] for k in (1, 5)})
    return scores, images


def generate(
    pipeline: Pipeline,
    prompts: list[str],
    seeds: Sequence[int],
    settings: GenerationConfig,
    batch: int,
) -> list[Tensor]:
    """An image (3, H, W) float32 in 0..1 for each prompt. Raises ValueError if one is too long."""
    ids = [pipeline.encode_prompt(prompt) for prompt in prompts]
    drawn = pictures(pipeline, ids, list(seeds), settings, batch)
    bar = tqdm(drawn, "drawing", len(ids), unit="picture", disable=None)
    return [image.movedim(-1, 0) for image in bar]


@torch.inference_mode()
def reconstruction_psnr(pipeline: Pipeline, data: Path, records: list[dict]) -> float:
    """Mean PSNR in dB of the image tokenizer on the records' pictures, on white."""
    tokenizer = pipeline.image_tokenizer
    values = [psnr(tokenizer.decode(tokenizer.encode(x)), x) for x in on_white(data, records)]
    return torch.cat(values).mean().item()
