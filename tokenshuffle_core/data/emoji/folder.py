"""Compositions as an image folder: RGB pictures and a `metadata.jsonl`, whose lines also describe
the compositions, so that a model's pictures can be scored against them."""

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..buckets import Size
from . import captions
from .build import read_manifest, render_all, write_lines
from .compose import Composition, arrange, render
from .pictures import read, read_rgba
from .plan import KINDS, plan

FOLDER = "composed"  # in the folder of the data set


def build(
    data: str | Path,
    count: int,
    *,
    kinds: tuple[str, ...] = KINDS,
    sizes: list[Size] | None = None,
    held_out: float = 0.05,
    white_repeats: int = 8,
    seed: int = 0,
    workers: int = 2,
) -> Path:
    """Compose `count` pictures from the data set in `data`, as the image folder `data`/composed.

    Returns the path of `metadata.jsonl`, a line of `Descriptions` for each picture. For the
    pictures see `plan`; those already rendered are kept. Raises as `plan`.
    """
    data = Path(data)
    records = read_manifest(data)
    paths = {(r["subject"], r["style"]): data / r["image"] for r in records}
    sizes = sizes or [size_of(data, records)]
    planned = plan(records, count, sizes, kinds=kinds, held_out=held_out, seed=seed)
    describe = Descriptions.of(records, sizes, white_repeats, seed)
    directory = data / FOLDER
    entries, jobs = [], []
    for i, (composition, size, split) in enumerate(planned):
        name = describe.file_name(i, composition, size)
        entries.append({"file_name": name, **describe(i, composition, size, split)})
        keys = [(subject, composition.style) for subject in composition.subjects]
        jobs.append((directory / name, size, composition, {key: paths[key] for key in keys}))
    render_all(_draw, jobs, workers, "composing")
    return write_lines(directory / "metadata.jsonl", entries)


def size_of(data: Path, records: list[dict]) -> Size:
    """That of the data set's pictures."""
    return read(data, records[0]).size


@dataclass(frozen=True)
class Descriptions:
    """What is said of compositions: captions, repeats (how often an epoch visits the picture),
    split ("train" or "held-out") and the fields of `Composition`."""

    names: dict[str, dict[str, list[str]]]  # subject -> language -> names
    stems: dict[str, str]  # subject -> its part of a file name
    first: Size  # which file names leave out
    white_repeats: int  # of a single subject on white in the first size; a quarter in new colours
    seed: int

    @classmethod
    def of(
        cls, records: list[dict], sizes: list[Size], white_repeats: int, seed: int
    ) -> "Descriptions":
        """Raises ValueError for repeats below 1."""
        if white_repeats < 1:
            raise ValueError(f"white_repeats must be at least 1, not {white_repeats}")
        names = {r["subject"]: {"en": [r["subject"]]} | r["names"] for r in records}
        stems = {r["subject"]: Path(r["image"]).stem for r in records}
        return cls(names, stems, sizes[0], white_repeats, seed)

    def __call__(self, i: int, composition: Composition, size: Size, split: str) -> dict:
        """Of the composition number `i`; the number and the seed decide its captions."""
        names = [self.names[subject] for subject in composition.subjects]
        rng = random.Random(f"{self.seed} captions {i}")
        texts = captions.variations(composition, names, rng)
        often = {"single": self.white_repeats, "coloured": max(1, self.white_repeats // 4)}
        on_white = composition.background == "white" and size == self.first
        repeats = often.get(composition.kind, 1) if on_white else 1
        return {"captions": texts, "repeats": repeats, "split": split, **vars(composition)}

    def file_name(self, i: int, composition: Composition, size: Size) -> str:
        """Such as "beside/cat_red-apple_flat_white_192x128.png"; without the size if it is the
        first. Of the composition number `i`, which is only in the names of jittered ones."""
        parts = [self.stems[subject] for subject in composition.subjects]
        if composition.kind == "count":
            parts = [str(len(parts)), parts[0]]
        parts += map(str, composition.corners)
        parts += filter(None, (*composition.colours, composition.extent))
        parts += [composition.style, composition.background]
        if size != self.first:
            parts.append(f"{size[0]}x{size[1]}")
        plain = arrange(
            composition.kind, composition.subjects, composition.style, composition.background,
            colours=composition.colours, extent=composition.extent, corners=composition.corners,
        )  # fmt: skip
        if composition != plain:
            parts.append(str(i))
        return f"{composition.kind}/{'_'.join(parts)}.png"


def _draw(
    size: Size, composition: Composition, sources: dict[tuple[str, str], Path]
) -> Image.Image:
    return render(composition, {key: _read(path) for key, path in sources.items()}, size)


_read = lru_cache(maxsize=256)(read_rgba)
