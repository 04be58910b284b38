"""Image codes, extracted once and stored in shards, and their reader.

The items of a source are divided, in order, into chunks; each becomes `codes-00012.safetensors`:

    codes    the codes of its pictures one after another, flat, int16 or int32
    grid     rows and columns of each, int32 (N, 2)

and, in the metadata, JSON lines: a header, then a record per picture. The header has the checksum
of the shard and a fingerprint of its source, so an interrupted extraction knows which shards are
complete. `index.json` is written last.
"""

import json
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageColor
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import parse_sizes
from ..files import atomic_path, sha256, write_safetensors, write_text
from ..image_tokenizer import ImageTokenizer
from .buckets import Size, nearest, scale_and_crop
from .sources import Item, read_items

CPU = torch.device("cpu")
INDEX = "index.json"
RECORDS = "tokenshuffle.codes"  # a single key: safetensors writes several in a random order
HEADER_LIMIT = 90_000_000  # bytes; safetensors cannot read a header above 100 MB
READERS = 8  # threads that decode and scale pictures, for which Pillow releases the GIL


class Extraction(NamedTuple):
    """The result of one process's part of an extraction."""

    pictures: int
    broken: int
    written: int  # shards
    kept: int  # shards that were already complete
    index: Path | None  # None while shards of other processes are missing


@dataclass
class Shard:
    """The content of one file. `broken` has the key of each omitted picture, and the reason."""

    codes: Tensor
    grid: Tensor
    records: list[str]  # JSON: key, captions, repeats, split, extra, bucket (width, height)
    broken: list[list[str]]
    source: str  # fingerprint of the items and settings that the shard is made from

    @property
    def sha256(self) -> str:
        records = json.dumps([self.broken, self.records])
        texts = [f"{self.codes.dtype} {self.source}".encode(), records.encode()]
        return sha256([*texts, self.grid.numpy(), self.codes.numpy()])

    def write(self, path: Path) -> None:
        """Raises ValueError for more records than safetensors can store, OSError where the disk is
        full."""
        head = {"sha256": self.sha256, "source": self.source, "broken": self.broken}
        text = "\n".join([json.dumps(head), *self.records])
        if len(json.dumps(text)) > HEADER_LIMIT:
            raise ValueError(
                f"the records of {path.name} take more than {HEADER_LIMIT // 10**6} MB: choose a "
                "smaller shard size"
            )
        write_safetensors(path, {"codes": self.codes, "grid": self.grid}, {RECORDS: text})


def read_shard(path: Path) -> tuple[Shard, str]:
    """A shard, its tensors memory-mapped, and its stored checksum, which is not yet verified.

    Raises ValueError for a file that is missing, truncated or not a shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            head, *records = file.metadata()[RECORDS].split("\n")
            stored = json.loads(head)
            tensors = file.get_tensor("codes"), file.get_tensor("grid")
        return Shard(*tensors, records, stored["broken"], stored["source"]), stored["sha256"]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is missing, damaged or not a shard of codes: {error}") from None


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of named weights; those of the image tokenizer define what a code means."""
    return sha256(n.encode() + weight.cpu().float().numpy().tobytes() for n, weight in weights)


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
    Raises as `read_items`, and ValueError for a setting out of range.
    """
    stride = image_tokenizer.config.stride
    colour = _check_settings(sizes, stride, background, shard_size, batch, held_out, rank, world)
    items = [_held_out(item, held_out) for item in read_items(source)]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "image_tokenizer": fingerprint(image_tokenizer.state_dict().items()),
        "stride": stride,
        "codebook_size": image_tokenizer.config.codebook_size,
        "sizes": [f"{width}x{height}" for width, height in sizes],
        "background": background,
    }
    chunks = {
        directory / f"codes-{k:05}.safetensors": items[i : i + shard_size]
        for k, i in enumerate(range(0, len(items), shard_size))
    }
    sources = {path: _source(chunk, settings) for path, chunk in chunks.items()}
    part = list(chunks.items())[rank::world]
    image_tokenizer.to(device)
    load = partial(_load, colour=colour, sizes=sizes)
    pictures = broken = kept = 0
    total = sum(len(chunk) for _, chunk in part)
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=total, desc="encoding", unit="picture", disable=None) as bar,
    ):
        for path, chunk in part:
            if shard := _complete(path, sources[path]):
                kept += 1
                bar.update(len(chunk))
            else:
                (directory / INDEX).unlink(missing_ok=True)
                for leftover in directory.glob(f".{path.name}.*"):  # of a killed run
                    leftover.unlink()
                pairs = zip(chunk, _ahead(pool, load, chunk, 2 * batch), strict=True)
                shard = _encode(pairs, image_tokenizer, batch, sources[path], bar)
                _list_broken(path, shard)
                shard.write(path)
            pictures += len(shard.records)
            broken += len(shard.broken)
    index = _write_index(directory, sources, settings)
    return Extraction(pictures, broken, len(part) - kept, kept, index)


def _check_settings(sizes, stride, background, shard_size, batch, held_out, rank, world):
    """Returns the RGB of the background. Raises ValueError for a setting out of range."""
    for name, value in (("shard_size", shard_size), ("batch", batch), ("world", world)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, not {held_out}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1} (world - 1), not {rank}")
    if not sizes:
        raise ValueError("sizes must contain at least one width and height")
    for width, height in sizes:
        if min(width, height) < 1 or width % stride or height % stride:
            raise ValueError(
                f"size {width}x{height} does not fit: both sides must be multiples of {stride}, "
                "the image tokenizer's stride"
            )
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        raise ValueError(f"background {background!r} is not a colour") from None


def _held_out(item: Item, share: float) -> Item:
    number = int(sha256([item.key.encode(errors="surrogateescape")])[:16], 16)
    return replace(item, split="held-out") if number < share * 2**64 else item


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


def _complete(path: Path, source: str) -> Shard | None:
    """The shard at `path`, if it is intact and made from `source`."""
    try:
        shard, stored = read_shard(path)
    except ValueError:
        return None
    return shard if shard.source == source and shard.sha256 == stored else None


def _load(item: Item, colour, sizes: list[Size]) -> tuple[Size, Tensor] | ValueError:
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
    dtype = torch.int16 if image_tokenizer.config.codebook_size <= 2**15 else torch.int32
    device = image_tokenizer.quantizer.codebook.weight.device
    codes: list[Tensor] = []
    records, broken = [], []
    waiting = defaultdict(list)

    def flush(places: list[int], pictures: list[Tensor]) -> None:
        images = torch.stack(pictures).to(device).movedim(-1, 1).contiguous().float() / 255
        encoded = image_tokenizer.encode(images).to("cpu", dtype)
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
    grid = torch.tensor([picture.shape for picture in codes], dtype=torch.int32).view(-1, 2)
    flat = torch.cat([torch.empty(0, dtype=dtype), *(picture.flatten() for picture in codes)])
    return Shard(flat, grid, records, broken, source)


def _list_broken(path: Path, shard: Shard) -> None:
    listing = path.with_name(f"broken-{path.stem.removeprefix('codes-')}.txt")
    listing.unlink(missing_ok=True)
    if shard.broken:
        text = "".join(f"{key}\t{reason}\n" for key, reason in shard.broken)
        with atomic_path(listing) as temporary:  # names on disk may be in any encoding
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_index(directory: Path, sources: dict[Path, str], settings: dict) -> Path | None:
    """Write the index if there are all shards; its reader verifies their checksums."""
    if not all(path.exists() for path in sources):
        return None
    shards, counts = {}, dict.fromkeys(settings["sizes"], 0)
    broken = held_out = 0
    for path, source in sources.items():
        try:
            shard, shards[path.name] = read_shard(path)
        except ValueError:
            return None
        if shard.source != source:
            return None
        broken += len(shard.broken)
        for record in map(json.loads, shard.records):
            counts["{}x{}".format(*record["bucket"])] += 1
            held_out += record["split"] == "held-out"
    index = {
        **settings,
        "pictures": sum(counts.values()),
        "held_out": held_out,
        "broken": broken,
        "counts": counts,
        "shards": shards,
    }
    write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
    return directory / INDEX


class CodeShards:
    """The pictures of a complete extraction, in the order of the source.

    `sizes` (width, height) are the buckets; `indices` has the int64 (N,) indices of the pictures in
    each. Codes stay on disk, memory-mapped; records are kept as text. `verify` reads each shard
    completely, once, and compares its checksum with the index; without it only the stored checksums
    are compared, because another process verifies. Raises FileNotFoundError where there is no
    index, ValueError that names a shard which is damaged or not in the index.
    """

    def __init__(self, directory: str | Path, verify: bool = True):
        path = Path(directory) / INDEX
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: create or complete the codes with "
                f"`tokenshuffle data codes SOURCE -o {directory}`"
            )
        try:
            self.index = json.loads(path.read_text(encoding="utf-8"))
            names = self.index["shards"]
            self.stride = self.index["stride"]
            self.sizes = parse_sizes(",".join(self.index["sizes"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not an index of code shards: {error}") from None
        self._codes: list[Tensor] = []
        self._records: list[str] = []
        grids = [torch.empty(0, 2, dtype=torch.int32)]
        for name, expected in names.items():
            shard, stored = read_shard(path.with_name(name))
            if (shard.sha256 if verify else stored) != expected:
                raise ValueError(
                    f"{path.with_name(name)} is damaged or from another extraction than {INDEX}: "
                    "run `tokenshuffle data codes` again, which replaces only such shards"
                )
            self._codes.append(shard.codes)
            self._records += shard.records
            grids.append(shard.grid)
        self._grid = torch.cat(grids)
        self._first = list(accumulate((len(grid) for grid in grids[1:]), initial=0))
        self._end = torch.cat([grid.prod(1).cumsum(0) for grid in grids])
        pixels = self._grid.flip(1) * self.stride
        self.indices = {
            size: (pixels == torch.tensor(size)).all(1).nonzero().flatten() for size in self.sizes
        }

    def __len__(self) -> int:
        return len(self._records)

    def codes(self, index: int) -> Tensor:
        """Codes int64 (H, W) of picture `index`, from 0 to len(self) - 1."""
        rows, columns = self._grid[index].tolist()
        end = self._end[index].item()
        shard = bisect_right(self._first, index) - 1
        return self._codes[shard][end - rows * columns : end].long().view(rows, columns)

    def gather(self, indices: Tensor | list[int]) -> Tensor:
        """Codes (N, H, W) of pictures of one size, in the dtype in which they are stored."""
        indices = torch.as_tensor(indices)
        rows, columns = self._grid[indices[0]].tolist()
        count, codes = rows * columns, []
        for index, end in zip(indices.tolist(), self._end[indices].tolist(), strict=True):
            shard = bisect_right(self._first, index) - 1
            codes.append(self._codes[shard].numpy()[end - count : end])
        return torch.from_numpy(np.stack(codes)).view(-1, rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes."""
        return sum(codes.nbytes for codes in self._codes)

    def record(self, index: int) -> dict:
        """key, captions, repeats, split, extra and bucket (width, height) of picture `index`."""
        return json.loads(self._records[index])

    def check(self, image_tokenizer: ImageTokenizer) -> None:
        """Raises ValueError if the codes are from another image tokenizer."""
        if self.index["image_tokenizer"] != fingerprint(image_tokenizer.state_dict().items()):
            raise ValueError(
                "the codes are from another image tokenizer: run `tokenshuffle data codes` again "
                "with this one"
            )
