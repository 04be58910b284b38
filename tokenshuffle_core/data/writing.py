"""Making the shards of a data set. Those that are complete are kept, and so are files of others."""

import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..files import atomic_path, remove_leftovers, sha256, write_text
from ..image_tokenizer import ImageTokenizer
from ..lock import is_left, lock
from .buckets import LARGEST, Size
from .shards import INDEX, NAMES, RECORDS, Shard, fingerprint, read_index, read_shard


class Extraction(NamedTuple):
    """The result of one process's part of an extraction."""

    pictures: int
    broken: int
    written: int  # shards
    kept: int  # shards that were already complete
    index: Path | None  # None while shards of other processes are missing


def settings_of(image_tokenizer: ImageTokenizer, sizes: list[Size], background: str) -> dict:
    """What the index says of all shards. Raises ValueError for a size that the image tokenizer
    cannot encode."""
    stride = image_tokenizer.config.stride
    if not sizes:
        raise ValueError("sizes must contain at least one width and height")
    for width, height in sizes:
        if max(width, height) > LARGEST:
            raise ValueError(f"size {width}x{height} is above {LARGEST} pixels a side")
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
    Raises ValueError for processes out of range and where no picture could be read;
    FileExistsError for another's file with a name that is needed; BlockingIOError where another
    process of this rank is at it.
    """
    if world < 1:
        raise ValueError(f"world must be at least 1, not {world}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1} (world - 1), not {rank}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(directory)
    sources: dict[Path, str] = {}
    pictures = broken = written = kept = 0
    with (
        lock(directory, rank),
        ThreadPoolExecutor(1) as writer,  # while the next shard is made
        tqdm(total=total, desc="encoding", unit="picture", disable=None) as bar,
    ):
        writing = None
        if world == 1:
            remove_leftovers([directory / INDEX])
        for number, (source, encode) in enumerate(parts):
            path = directory / f"codes-{number:05}.safetensors"
            sources[path] = source
            if number % world != rank:
                continue
            remove_leftovers([path, _listing(path)])
            if shard := _complete(path, source):
                kept += 1
                bar.update(len(shard.records) + len(shard.broken))
                if shard.broken and not _listing(path).exists():
                    _list_broken(path, shard)
            else:
                written += 1
                (directory / INDEX).unlink(missing_ok=True)
                shard = encode(bar)
                if writing:
                    writing.result()
                writing = writer.submit(_write, path, shard)
            pictures += len(shard.records)
            broken += len(shard.broken)
        if writing:
            writing.result()
        index = _write_index(directory, sources, settings)
    return Extraction(pictures, broken, written, kept, index)


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
    shard.write(path)
    _list_broken(path, shard)


def _list_broken(path: Path, shard: Shard) -> None:
    _listing(path).unlink(missing_ok=True)
    if shard.broken:
        text = "".join(f"{key}\t{reason}\n" for key, reason in shard.broken)
        with atomic_path(_listing(path)) as temporary:  # names on disk may be in any encoding
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _listing(path: Path) -> Path:
    return path.with_name(f"broken-{path.stem.removeprefix('codes-')}.txt")


def _write_index(directory: Path, sources: dict[Path, str], settings: dict) -> Path | None:
    """Write the index if there are all shards; its reader verifies their checksums. Raises
    ValueError where they have no picture."""
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
    if not sum(counts.values()):
        raise ValueError(
            f"none of the {broken} pictures can be read: {directory}/broken-*.txt say why"
        )
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


def _refuse_foreign(directory: Path) -> None:
    """Raises FileExistsError where a shard or the index would replace a file that is none.

    A damaged shard is replaced, if something else says that it was one.
    """
    index, valid, damaged = directory / INDEX, is_left(directory), []
    if index.exists():
        try:
            valid = bool(read_index(index))
        except (ValueError, FileNotFoundError):
            raise _foreign(index) from None
    for path in directory.glob("codes-*.safetensors"):
        if NAMES.fullmatch(path.name):
            try:
                if not path.is_file():
                    raise _foreign(path)
                with safe_open(path, framework="pt") as file:
                    if RECORDS not in (file.metadata() or {}):
                        raise _foreign(path)
                valid = True
            except SafetensorError:
                damaged.append(path)
    if not valid:
        damaged += [
            p for p in directory.glob("broken-*.txt") if re.fullmatch(r"\d{5,}", p.stem[7:])
        ]
        for path in damaged:
            raise _foreign(path)


def _foreign(path: Path) -> FileExistsError:
    return FileExistsError(
        f"{path} is not from `tokenshuffle data codes`, which would replace it: choose another "
        "folder, or move it away"
    )
