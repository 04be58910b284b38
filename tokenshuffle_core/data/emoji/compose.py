"""Composed pictures: subjects of the emoji data set on coloured backgrounds, in numbers and places.

The result is an ordinary image folder: RGB pictures and a `metadata.jsonl`. Each line also
describes the composition, so that a model's pictures can be scored against it.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import combinations, cycle
from pathlib import Path

from PIL import Image

from ..buckets import Size
from . import captions
from .build import read_manifest, render_all, write_lines
from .pictures import BACKGROUNDS, resize

FOLDER = "composed"  # in the folder of the data set
KINDS = ("single", "count", "single", "beside", "above")  # in turn: two of five are singles
COUNTS = (2, 3, 4)
WHITE_SHARE = 0.5  # share of the pictures of several subjects that are on white

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the picture
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
TOP, BOTTOM = (0, 0, 1, 0.5), (0, 0.5, 1, 1)
QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))
ROWS: dict[int, tuple[Box, ...]] = {  # several copies, row by row
    1: ((0, 0, 1, 1),),
    2: (LEFT, RIGHT),
    3: (TOP, *QUARTERS[2:]),
    4: QUARTERS,
}


@dataclass(frozen=True)
class Composition:
    """What a picture shows: `subjects` in `boxes`, all in one style, on a background of
    `BACKGROUNDS`. Each subject fills the largest square in the middle of its box.

    `kind` is "single", "count" (copies of one subject), "beside" or "above" (of two subjects the
    first is at the left or at the top).
    """

    kind: str
    subjects: tuple[str, ...]
    style: str
    background: str
    boxes: tuple[Box, ...]

    @classmethod
    def of(cls, entry: dict) -> "Composition":
        """From a line of `metadata.jsonl`."""
        parts = {field.name: entry[field.name] for field in fields(cls)}
        subjects, boxes = tuple(parts.pop("subjects")), tuple(map(tuple, parts.pop("boxes")))
        return cls(subjects=subjects, boxes=boxes, **parts)


Planned = tuple[Composition, Size, str]  # with its size and its split


def arrange(kind: str, subjects: tuple[str, ...], style: str, background: str) -> Composition:
    """The composition with the boxes for its kind and its number of subjects."""
    boxes = {"beside": (LEFT, RIGHT), "above": (TOP, BOTTOM)}.get(kind) or ROWS[len(subjects)]
    return Composition(kind, subjects, style, background, boxes)


def render(
    composition: Composition, pictures: Mapping[tuple[str, str], Image.Image], size: Size
) -> Image.Image:
    """An RGB picture of `size` (width, height) pixels; `pictures` has the RGBA cut-out of each
    (subject, style)."""
    canvas = Image.new("RGBA", size, BACKGROUNDS[composition.background])
    for subject, box in zip(composition.subjects, composition.boxes, strict=True):
        left, top, side = square_in(box, size)
        canvas.alpha_composite(resize(pictures[subject, composition.style], side), (left, top))
    return canvas.convert("RGB")


@lru_cache(maxsize=4096)
def square_in(box: Box, size: Size) -> tuple[int, int, int]:
    """Left, top and side in pixels of the largest square in the middle of a box."""
    width, height = size
    left, top = round(box[0] * width), round(box[1] * height)
    wide, high = round(box[2] * width) - left, round(box[3] * height) - top
    side = min(wide, high)
    return left + (wide - side) // 2, top + (high - side) // 2, side


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
        name = describe.file_name(composition, size)
        entries.append({"file_name": name, **describe(i, composition, size, split)})
        keys = [(subject, composition.style) for subject in composition.subjects]
        jobs.append((directory / name, size, composition, {key: paths[key] for key in keys}))
    render_all(_draw, jobs, workers, "composing")
    return write_lines(directory / "metadata.jsonl", entries)


def size_of(data: Path, records: list[dict]) -> Size:
    """That of the data set's pictures."""
    with Image.open(data / records[0]["image"]) as image:
        return image.size


@dataclass(frozen=True)
class Descriptions:
    """What is said of compositions: captions, repeats (how often an epoch visits the picture),
    split ("train" or "held-out") and the fields of `Composition`."""

    names: dict[str, dict[str, list[str]]]  # subject -> language -> names
    stems: dict[str, str]  # subject -> its part of a file name
    first: Size  # which file names leave out
    white_repeats: int  # of a single subject on white in the first size
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
        kind, subjects = composition.kind, composition.subjects
        texts = captions.variations(
            kind,
            [self.names[subject] for subject in subjects],
            composition.style,
            composition.background,
            random.Random(f"{self.seed} captions {i}"),
        )
        on_white = kind == "single" and composition.background == "white"
        repeats = self.white_repeats if on_white and size == self.first else 1
        return {"captions": texts, "repeats": repeats, "split": split, **vars(composition)}

    def file_name(self, composition: Composition, size: Size) -> str:
        """Such as "beside/cat_red-apple_flat_white_192x128.png"; without the size if it is the
        first."""
        parts = [self.stems[subject] for subject in composition.subjects]
        if composition.kind == "count":
            parts = [str(len(parts)), parts[0]]
        parts += [composition.style, composition.background]
        if size != self.first:
            parts.append(f"{size[0]}x{size[1]}")
        return f"{composition.kind}/{'_'.join(parts)}.png"


def plan(
    records: list[dict],
    count: int,
    sizes: list[Size],
    *,
    kinds: tuple[str, ...] = KINDS,
    held_out: float = 0.05,
    first_share: float | None = None,
    seed: int = 0,
) -> list[Planned]:
    """`count` different compositions of the pictures in the manifest, with their sizes and splits.

    Their kinds are `kinds` in turn. A single subject on white comes in all `sizes` (width, height),
    the first of them first, because it is what most prompts ask for. A share `first_share` of the
    other pictures has the first size. Any other picture, by default each, has half of the time the
    size that gives its subjects the most room (the first such size), otherwise a random one.

    A subject-style pair that the data set holds out is held out here, and appears only as a single.
    A share `held_out` of the pairs of subjects, and of the pairs of a subject and a count, is held
    out in every style and order. A larger `count` with the same seed only adds pictures. Raises
    ValueError for a bad setting, or if there are not so many different ones.
    """
    if count < 1:
        raise ValueError(f"the number of compositions must be at least 1, not {count}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, not {held_out}")
    if first_share is not None and not 0 <= first_share <= 1:
        raise ValueError(f"first_share must be from 0 to 1, not {first_share}")
    size_for = partial(_size, sizes, first_share)
    trained: dict[str, list[str]] = {}  # style -> subjects
    for record in records:
        if record["split"] == "train":
            trained.setdefault(record["style"], []).append(record["subject"])
    subjects = sorted({record["subject"] for record in records})
    copies = [(subject,) * n for subject in subjects for n in COUNTS]
    pairs = list(combinations(subjects, 2))
    rng = random.Random(f"{seed} held-out")
    apart = {
        combination
        for group in (copies, pairs)
        for combination in rng.sample(group, round(held_out * len(group)))
    }
    sources: dict[str, Iterator] = {}
    for kind in kinds:
        draws = random.Random(f"{seed} {kind}")
        sources[kind] = (
            _singles(records, sizes, size_for, draws)
            if kind == "single"
            else _several(kind, trained, size_for, apart, draws)
        )
    planned: list[Planned] = []
    for kind in cycle(kinds):
        if len(planned) == count:
            return planned
        if kind in sources and (drawn := next(sources[kind], None)):
            planned.append(drawn)
        else:
            sources.pop(kind, None)
        if not sources:
            raise ValueError(
                f"{count} compositions are more than the {len(planned)} that these pictures allow: "
                "choose fewer"
            )


def _singles(
    records: list[dict], sizes: list[Size], size_for: Callable, rng: random.Random
) -> Iterator[Planned]:
    """Every picture on white in the first size, then on white in the other sizes and on every
    other background in one size."""
    white, *others = BACKGROUNDS
    first = [(record, white, sizes[0]) for record in records]
    more = [(record, white, size) for record in records for size in sizes[1:]]
    more += [(record, colour, None) for record in records for colour in others]
    for placed in (first, more):
        rng.shuffle(placed)
        for record, colour, size in placed:
            composition = arrange("single", (record["subject"],), record["style"], colour)
            yield composition, size or size_for(composition, rng), record["split"]


def _several(
    kind: str,
    trained: dict[str, list[str]],
    size_for: Callable,
    apart: set[tuple[str, ...]],
    rng: random.Random,
) -> Iterator[Planned]:
    """Random different compositions of several subjects, until there are no more."""
    white, *others = BACKGROUNDS
    styles = [style for style, subjects in trained.items() for _ in subjects]
    possible = len(BACKGROUNDS) * sum(
        len(subjects) * (len(COUNTS) if kind == "count" else len(subjects) - 1)
        for subjects in trained.values()
    )
    drawn = set()
    while len(drawn) < possible:
        style = rng.choice(styles)
        if kind == "count":
            subjects = (rng.choice(trained[style]),) * rng.choice(COUNTS)
        else:
            subjects = tuple(rng.choices(trained[style], k=2))
        background = white if rng.random() < WHITE_SHARE else rng.choice(others)
        composition = arrange(kind, subjects, style, background)
        if composition in drawn or (kind != "count" and subjects[0] == subjects[1]):
            continue
        drawn.add(composition)
        split = "held-out" if tuple(sorted(subjects)) in apart else "train"
        yield composition, size_for(composition, rng), split


def _size(
    sizes: list[Size], first_share: float | None, composition: Composition, rng: random.Random
) -> Size:
    """Half of the time the one with the most room for the subjects, otherwise any of `sizes`."""
    if first_share is not None and len(sizes) > 1:
        if rng.random() < first_share:
            return sizes[0]
        sizes = sizes[1:]
    if len(sizes) == 1 or rng.random() < 0.5:
        return roomiest(composition, sizes)
    return rng.choice(sizes)


def roomiest(composition: Composition, sizes: Sequence[Size]) -> Size:
    """The first of `sizes` that gives the smallest subject the most room."""
    return max(sizes, key=lambda size: min(square_in(box, size)[2] for box in composition.boxes))


def _draw(
    size: Size, composition: Composition, sources: dict[tuple[str, str], Path]
) -> Image.Image:
    return render(composition, {key: _read(path) for key, path in sources.items()}, size)


@lru_cache(maxsize=256)
def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA")
