"""Image codes of your own pictures, extracted once."""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import sha256
from ..image_tokenizer import ImageTokenizer
from ..images import Colour, colour_of
from .buckets import Size, nearest, scale_and_crop
from .shards import Shard
from .sources import Item, read_items
from .writing import Extraction, check_counts, settings_of, split_of, write_shards

CPU = torch.device("cpu")
READERS = 8  # threads that decode and scale pictures, for which Pillow releases the GIL


def extract(
    source: str | Path,
    directory: str | Path,
    image_tokenizer: ImageTokenizer,
    sizes: list[Size],
    *,
    background: str = "white",
    shard_size: int = 1024,
    batch: int = 16,
    held_out: float = 0.0,
    device: torch.device = CPU,
    rank: int = 0,
    world: int = 1,
) -> Extraction:
    """Encode the pictures of `source`, each at the nearest of `sizes` (width, height in pixels),
    into shards in `directory`.

    Of `world` processes, process `rank` encodes every world-th chunk of `shard_size` items; the
    last one to finish writes the index. Shards that are complete and up to date are kept. A picture
    that cannot be read is omitted and listed in `broken-00012.txt`. A share `held_out` of the
    training pictures is held out; this depends only on the key of each, not on the other pictures.
    Raises as `read_items` and `write_shards`, and ValueError for a setting out of range.
    """
    settings = settings_of(image_tokenizer, sizes, background)
    check_counts(shard_size, batch, held_out)
    colour = colour_of(background)
    items = [
        replace(item, split=split_of(item.key, item.split, held_out)) for item in read_items(source)
    ]
    image_tokenizer.to(device)
    load = partial(_load, colour=colour, sizes=sizes)

    def parts(pool: Executor) -> Iterator[tuple[str, Callable]]:
        for i in range(0, len(items), shard_size):
            chunk = items[i : i + shard_size]
            made_from = _source(chunk, settings)

            def encode(bar, chunk=chunk, made_from=made_from) -> Shard:
                pairs = zip(chunk, _ahead(pool, load, chunk, 2 * batch), strict=True)
                return _encode(pairs, image_tokenizer, batch, made_from, bar)

            yield made_from, encode

    pool = ThreadPoolExecutor(READERS)
    try:
        return write_shards(parts(pool), len(items), directory, settings, rank, world)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C no picture is read any more


def _source(items: list[Item], settings: dict) -> str:
    """Fingerprint of a chunk. Like `make`, it uses the size and time of a picture, not its content:
    to check whether terabytes are complete it should not read all of them."""
    texts = [json.dumps(settings)]
    for item in items:
        record = _record(item) | {"picture": [item.offset, item.size, item.modified]}
        texts.append(json.dumps(record, sort_keys=True))
    return sha256(text.encode() for text in texts)


def _record(item: Item) -> dict:
    return {name: getattr(item, name) for name in ("key", "captions", "repeats", "split", "extra")}


def _load(item: Item, colour: Colour, sizes: list[Size]) -> tuple[Size, Tensor] | ValueError:
    """The bucket of a picture and uint8 (H, W, 3) of that size, or the error in reading it."""
    try:
        picture = item.picture(colour)
    except ValueError as error:
        return error
    bucket = nearest(picture.size, sizes)
    return bucket, torch.from_numpy(np.array(scale_and_crop(picture, bucket)))


def _ahead(pool: Executor, function: Callable, items: Iterable, count: int) -> Iterator:
    """function(item) for the items in order, computed up to `count` items ahead."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@torch.inference_mode()
def _encode(pairs, image_tokenizer: ImageTokenizer, batch: int, source: str, bar) -> Shard:
    """The shard of pairs (item, result of `_load`); pictures of one size are encoded in batches."""
    device = image_tokenizer.quantizer.codebook.weight.device
    codes: list[Tensor] = []
    records, broken = [], []
    waiting = defaultdict(list)

    def flush(places: list[int], pictures: list[Tensor]) -> None:
        images = torch.stack(pictures).to(device).movedim(-1, 1).contiguous().float() / 255
        encoded = image_tokenizer.encode(images).cpu()
        for place, picture in zip(places, encoded, strict=True):
            codes[place] = picture
        bar.update(len(places))

    for item, loaded in pairs:
        if isinstance(loaded, ValueError):
            broken.append([item.key, " ".join(str(loaded).split())])
            bar.update()
            continue
        bucket, pixels = loaded
        waiting[bucket].append((len(codes), pixels))
        codes.append(torch.empty(0))
        records.append(json.dumps(_record(item) | {"bucket": bucket}))
        if len(waiting[bucket]) == batch:
            flush(*zip(*waiting.pop(bucket), strict=True))
    for part in waiting.values():
        flush(*zip(*part, strict=True))
    return Shard.of(codes, records, broken, source, image_tokenizer.config.codebook_size)
