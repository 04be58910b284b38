"""Image codes, extracted once and stored in shards, and their reader.

The pictures of a source are divided, in order, into parts; each becomes `codes-00012.safetensors`:

    codes    the codes of its pictures one after another, flat, int16 or int32
    grid     rows and columns of each, int32 (N, 2)

and, in the metadata, JSON lines: a header, then a record per picture. The header has the checksum
of the shard and a fingerprint of its source, so an interrupted extraction knows which shards are
complete. `index.json` is written last.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import parse_sizes
from ..files import atomic_path, sha256, write_safetensors, write_text
from ..image_tokenizer import ImageTokenizer
from .buckets import Size

INDEX = "index.json"
RECORDS = "tokenshuffle.codes"  # a single key: safetensors writes several in a random order
HEADER_LIMIT = 90_000_000  # bytes; safetensors cannot read a header above 100 MB


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

    @classmethod
    def of(
        cls,
        codes: list[Tensor],
        records: list[str],
        broken: list[list[str]],
        source: str,
        codebook_size: int,
    ) -> "Shard":
        """From the codes (H, W) of each picture, of any integer type and on any device."""
        dtype = torch.int16 if codebook_size <= 2**15 else torch.int32
        grid = torch.tensor([picture.shape for picture in codes], dtype=torch.int32).view(-1, 2)
        flat = torch.cat([picture.flatten() for picture in codes]) if codes else torch.empty(0)
        return cls(flat.to("cpu", dtype), grid, records, broken, source)

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
        if len(text) + sum(map(text.count, '"\\\n')) > HEADER_LIMIT:  # escaped, as ASCII
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


def settings_of(image_tokenizer: ImageTokenizer, sizes: list[Size], background: str) -> dict:
    """What the index says of all shards. Raises ValueError for a size that the image tokenizer
    cannot encode."""
    stride = image_tokenizer.config.stride
    if not sizes:
        raise ValueError("sizes must contain at least one width and height")
    for width, height in sizes:
        if min(width, height) < 1 or width % stride or height % stride:
            raise ValueError(
                f"size {width}x{height} does not fit: both sides must be multiples of {stride}, "
                "the image tokenizer's stride"
            )
    return {
        "image_tokenizer": fingerprint(image_tokenizer.state_dict().items()),
        "stride": stride,
        "codebook_size": image_tokenizer.config.codebook_size,
        "sizes": [f"{width}x{height}" for width, height in sizes],
        "background": background,
    }


def write_shards(
    parts: Iterable[tuple[str, Callable[[tqdm], Shard]]],
    total: int,
    directory: str | Path,
    settings: dict,
    rank: int = 0,
    world: int = 1,
) -> Extraction:
    """Make the shards of `total` pictures in `directory` that are not complete, and the index.

    A part is the fingerprint of what a shard is made from, and the function that makes it and
    updates a progress bar. Every process goes through all `parts` and makes every world-th.
    """
    if world < 1:
        raise ValueError(f"world must be at least 1, not {world}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1} (world - 1), not {rank}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sources: dict[Path, str] = {}
    pictures = broken = written = kept = 0
    with (
        ThreadPoolExecutor(1) as writer,  # while the next shard is made
        tqdm(total=total, desc="encoding", unit="picture", disable=None) as bar,
    ):
        writing = None
        for number, (source, encode) in enumerate(parts):
            path = directory / f"codes-{number:05}.safetensors"
            sources[path] = source
            if number % world != rank:
                continue
            if shard := _complete(path, source):
                kept += 1
                bar.update(len(shard.records) + len(shard.broken))
            else:
                written += 1
                (directory / INDEX).unlink(missing_ok=True)
                for leftover in directory.glob(f".{path.name}.*"):  # of a killed run
                    leftover.unlink()
                shard = encode(bar)
                if writing:
                    writing.result()
                writing = writer.submit(_write, path, shard)
            pictures += len(shard.records)
            broken += len(shard.broken)
        if writing:
            writing.result()
    return Extraction(pictures, broken, written, kept, _write_index(directory, sources, settings))


def check_counts(shard_size: int, batch: int, held_out: float) -> None:
    """Raises ValueError for a setting out of range."""
    for name, value in (("shard_size", shard_size), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, not {held_out}")


def split_of(key: str, split: str, held_out: float) -> str:
    """The split of a picture, of which a share `held_out` is held out by its key alone."""
    number = int(sha256([key.encode(errors="surrogateescape")])[:16], 16)
    return "held-out" if number < held_out * 2**64 else split


def _complete(path: Path, source: str) -> Shard | None:
    """The shard at `path`, if it is intact and made from `source`."""
    try:
        shard, stored = read_shard(path)
    except ValueError:
        return None
    return shard if shard.source == source and shard.sha256 == stored else None


def _write(path: Path, shard: Shard) -> None:
    listing = path.with_name(f"broken-{path.stem.removeprefix('codes-')}.txt")
    listing.unlink(missing_ok=True)
    if shard.broken:
        text = "".join(f"{key}\t{reason}\n" for key, reason in shard.broken)
        with atomic_path(listing) as temporary:  # names on disk may be in any encoding
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    shard.write(path)


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
        for rows, columns in shard.grid.tolist():
            counts[f"{columns * settings['stride']}x{rows * settings['stride']}"] += 1
        for record in shard.records:  # most need not be parsed
            held_out += "held-out" in record and json.loads(record)["split"] == "held-out"
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
