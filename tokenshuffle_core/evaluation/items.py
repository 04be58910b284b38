"""The pictures with captions that a model is scored on: part of a training source."""

import random
from pathlib import Path

from torch import Tensor

from ..data.buckets import Size, scale_and_crop
from ..data.sources import Item, read_items
from ..images import to_tensor


def choose(source: Path, split: str, count: int | None, seed: int) -> list[Item]:
    """`count` items of a split in random order, or all if None.

    Raises ValueError if the split is empty, and as `read_items`.
    """
    everything = read_items(source)
    items = [item for item in everything if item.split == split]
    if not items:
        raise ValueError(
            f"{source} holds no picture of the split {split!r}, all {len(everything)} are of the "
            "other one"
        )
    random.Random(seed).shuffle(items)
    return items[:count]


def load(items: list[Item], size: Size) -> Tensor:
    """The pictures, scaled and cropped to `size` (width, height), as float32 (N, 3, H, W) in 0..1.

    Raises ValueError for a file that is not a readable picture.
    """
    return to_tensor([scale_and_crop(item.picture(), size) for item in items])
