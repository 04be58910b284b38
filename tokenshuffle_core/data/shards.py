"""Image codes, extracted once and stored in shards, and their reader.

The pictures of a source are divided, in order, into parts; each becomes `codes-00012.safetensors`:

    codes    the codes of its pictures one after another, flat, int16 or int32
    grid     rows and columns of each, int32 (N, 2)

and, in the metadata, JSON lines: a header, then a record per picture. The header has the checksum
of the shard and a fingerprint of its source, so an interrupted extraction knows which shards are
complete. `index.json` is written last.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import parse_sizes
from ..files import sha256, write_safetensors
from ..image_tokenizer import ImageTokenizer
from .buckets import LARGEST
from .captions import MOST, SPLITS

INDEX = "index.json"
RECORDS = "tokenshuffle.codes"  # a single key: safetensors writes several in a random order
NAMES = re.compile(r"codes-\d{5,}\.safetensors")  # of shards
FIELDS = {  # of the index, with their types
    "shards": dict, "stride": int, "codebook_size": int, "sizes": list, "image_tokenizer": str,
    "pictures": int, "held_out": int,
}  # fmt: skip
HEADER_LIMIT = 90_000_000  # bytes; safetensors cannot read a header above 100 MB


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
        if not path.is_file():
            raise ValueError("it is not a file")
        with safe_open(path, framework="pt") as file:
            head, *records = file.metadata()[RECORDS].split("\n")
            stored = json.loads(head)
            codes, grid = file.get_tensor("codes"), file.get_tensor("grid")
        shard = Shard(codes, grid, records, stored["broken"], stored["source"])
        if codes.dtype not in (torch.int16, torch.int32) or codes.ndim != 1:
            raise ValueError("its codes are not integers in one row")
        if grid.dtype != torch.int32 or grid.shape != (len(records), 2):
            raise ValueError("its grid is not the rows and columns of each record")
        areas = grid.long().prod(1)
        if (grid < 1).any() or (areas > len(codes)).any() or areas.sum() != len(codes):
            raise ValueError("its grid does not fit its codes")
        if type(shard.broken) is not list or type(shard.source) is not str:
            raise ValueError("its header is not one of a shard")
        return shard, stored["sha256"]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing, damaged or not a shard of codes: {error}") from None


def read_index(path: Path) -> dict:
    """The index of an extraction. Raises FileNotFoundError, or ValueError for a file that is none.

    What it says of the shards is not yet compared with them.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: create or complete the codes with "
            f"`tokenshuffle data codes SOURCE -o {path.parent}`"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in FIELDS.items():
            if type(index[name]) is not kind:
                raise ValueError(f"{name} is not what it should be")
        shards = index["shards"].items()
        if not all(NAMES.fullmatch(name) and type(sum_) is str for name, sum_ in shards):
            raise ValueError("its shards are not names with checksums")
        sizes = parse_sizes(",".join(index["sizes"]))
        sides = [index["stride"], *(side for size in sizes for side in size)]
        if not sizes or not 1 <= min(sides) <= max(sides) <= LARGEST:
            raise ValueError("stride and sizes are not those of pictures")
    except KeyError as error:
        raise ValueError(f"{path} is not an index of code shards: {error} is missing") from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error)[:200]
        raise ValueError(f"{path} is not an index of code shards: {reason}") from None
    return index


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of named weights; those of the image tokenizer define what a code means."""
    return sha256(n.encode() + weight.cpu().float().numpy().tobytes() for n, weight in weights)


class CodeShards:
    """The pictures of a complete extraction, in the order of the source.

    `sizes` (width, height) are the buckets; `indices` has the int64 (N,) indices of the pictures in
    each. Codes stay on disk, memory-mapped; records are kept as text. `verify` reads each shard
    completely, once, and compares its checksum with the index; without it only the stored checksums
    are compared, because another process verifies. Raises FileNotFoundError where there is no
    index, ValueError that names an index or a shard which is damaged or does not fit the other.
    """

    def __init__(self, directory: str | Path, verify: bool = True):
        path = Path(directory) / INDEX
        self.index = read_index(path)
        self.stride = self.index["stride"]
        self.sizes = parse_sizes(",".join(self.index["sizes"]))
        self._codes: list[Tensor] = []
        self._records: list[str] = []
        grids = [torch.empty(0, 2, dtype=torch.int32)]
        for name, expected in self.index["shards"].items():
            shard, stored = read_shard(path.with_name(name))
            if (shard.sha256 if verify else stored) != expected:
                raise ValueError(
                    f"{path.with_name(name)} is damaged or from another extraction than {INDEX}: "
                    "run `tokenshuffle data codes` again, which replaces only such shards"
                )
            codes, most = shard.codes, self.index["codebook_size"]
            if verify and len(codes) and (codes.min().item() < 0 or codes.max().item() >= most):
                raise ValueError(f"{path.with_name(name)} has codes outside a codebook of {most}")
            self._codes.append(codes)
            self._records += shard.records
            grids.append(shard.grid)
        self._grid = torch.cat(grids)
        self._first = list(accumulate((len(grid) for grid in grids[1:]), initial=0))
        self._end = torch.cat([grid.prod(1).cumsum(0) for grid in grids])
        pixels = self._grid.long().flip(1) * self.stride
        self.indices = {
            size: (pixels == torch.tensor(size)).all(1).nonzero().flatten() for size in self.sizes
        }
        if not sum(map(len, self.indices.values())) == len(self) == self.index["pictures"] > 0:
            raise ValueError(
                f"{path} does not fit its shards: their pictures have other sizes, or are not as "
                "many"
            )

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
        """key, captions, repeats, split, extra and bucket (width, height) of picture `index`.

        Raises ValueError where the shard's maker wrote something else.
        """
        try:
            record = json.loads(self._records[index])
            rows, columns = self._grid[index].tolist()
            if (
                record["bucket"] != [columns * self.stride, rows * self.stride]
                or type(record["key"]) is not str
                or type(record["captions"]) is not list
                or not all(type(caption) is str for caption in record["captions"])
                or type(record["repeats"]) is not int
                or not 1 <= record["repeats"] <= MOST
                or record["split"] not in SPLITS
            ):
                raise ValueError
            "".join(record["captions"]).encode()  # half of a surrogate pair is no text
        except (ValueError, KeyError, TypeError, RecursionError):
            text = self._records[index][:80]
            raise ValueError(
                f"picture {index} of the codes has a record that is none: {text}"
            ) from None
        return record

    def check(self, image_tokenizer: ImageTokenizer) -> None:
        """Raises ValueError if the codes are from another image tokenizer."""
        shape = image_tokenizer.config.stride, image_tokenizer.config.codebook_size
        weights = fingerprint(image_tokenizer.state_dict().items())
        given = self.index["stride"], self.index["codebook_size"]
        if self.index["image_tokenizer"] != weights or given != shape:
            raise ValueError(
                "the codes are from another image tokenizer: run `tokenshuffle data codes` again "
                "with this one"
            )
