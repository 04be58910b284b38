"""Pictures for many prompts, in batches."""

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import GenerationConfig
from ..pipeline import Pipeline


def generate(
    pipeline: Pipeline,
    prompts: list[str],
    settings: GenerationConfig,
    *,
    seed: int | list[int] = 0,
    batch: int = 16,
) -> Tensor:
    """Images (N, 3, H, W) float32 in 0..1 on the CPU; picture i is drawn with seed + i, or with its
    own of a list of seeds.

    Raises ValueError for a prompt that is too long.
    """
    seeds = seed if isinstance(seed, list) else [seed + i for i in range(len(prompts))]
    ids = [pipeline.encode_prompt(prompt) for prompt in prompts]
    images = [torch.empty(0, 3, settings.height, settings.width)]
    bar = tqdm(total=len(prompts), desc="sampling", unit="picture", disable=None)
    for start in range(0, len(prompts), batch):
        part = ids[start : start + batch]
        own = seeds[start : start + batch]
        *_, last = pipeline.sample(part, [], settings, seed=own, count=len(part))
        images.append(pipeline.decode(last.codes).movedim(-1, 1))
        bar.update(len(part))
    bar.close()
    return torch.cat(images)
