"""Which compositions a data set gets: their subjects, colours, places, sizes and splits."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, cycle, repeat

from ..buckets import Size
from .compose import COUNTS, Composition, arrange, roomiest, square_in
from .pictures import BACKGROUNDS

# In turn. What most prompts ask for, a single subject, comes most often.
KINDS = (
    "single", "coloured", "beside", "single", "count", "above", "single", "coloured", "beside",
    "single", "sized", "above", "coloured", "single", "corners", "beside", "single", "coloured",
    "count", "above", "single", "row", "coloured", "single",
)  # fmt: skip
WHITE, *COLOURS = BACKGROUNDS
HELD_OUT = 0.05  # share of the combinations
WHITE_SHARE = 0.5  # share of the pictures of several subjects that are on white
ALONE = 0.85  # share of the coloured subjects on white
SCALES = (1, 0.875, 0.75)  # of jittered subjects; few, because each is resized once
MIRRORED = 0.3  # share of the jittered subjects
WITH_WRITING = {  # or with a direction that matters: these are never mirrored
    "alarm clock", "ambulance", "bubble tea", "bus", "coin", "dartboard", "fire truck",
    "floppy disk", "game controller", "globe", "laptop", "mobile phone", "money bag",
    "musical note", "open book", "police car", "recycling symbol", "scroll", "sleeping face",
    "taxi", "telephone", "television", "yin yang",
}  # fmt: skip

Planned = tuple[Composition, Size, str]  # with its size and its split


@dataclass(frozen=True)
class Jitter:
    """Subjects smaller, elsewhere in their boxes, or mirrored. Their sides and places are multiples
    of `step` pixels, the image tokenizer's stride: what a model learns of a subject in one place
    then holds in the others. A `share` of the compositions is jittered."""

    share: float = 0.0
    step: int = 8

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share that is jittered must be from 0 to 1, not {self.share}")

    def __call__(self, composition: Composition, size: Size, rng: random.Random) -> Composition:
        """The composition, or a jittered one."""
        if rng.random() >= self.share:
            return composition
        boxes, mirrored, scale = [], [], rng.choice(SCALES)
        for subject, box in zip(composition.subjects, composition.boxes, strict=True):
            _, _, whole = square_in(box, size)
            side = max(self.step, int(whole * scale) // self.step * self.step)
            place = []
            for low, high, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
                first = -(-round(low * length) // self.step)
                last = max(first, (round(high * length) - side) // self.step)
                place.append(self.step * rng.randint(first, last))
            ends = [start + side for start in place]
            fits = all(end <= length for end, length in zip(ends, size, strict=True))
            sides = (*size, *size)
            shares = tuple(x / of for x, of in zip((*place, *ends), sides, strict=True))
            boxes.append(shares if fits else box)
            mirrored.append(subject not in WITH_WRITING and rng.random() < MIRRORED)
        return replace(composition, boxes=tuple(boxes), mirrored=tuple(mirrored))


def plan(
    records: list[dict],
    count: int,
    sizes: list[Size],
    *,
    kinds: tuple[str, ...] = KINDS,
    held_out: float = HELD_OUT,
    first_share: float | None = None,
    jitter: Jitter | None = None,
    seed: int = 0,
) -> list[Planned]:
    """`count` different compositions of the pictures in the manifest, with their sizes and splits.

    Their kinds are `kinds` in turn. A single subject on white comes in all `sizes` (width, height),
    the first of them first, because it is what most prompts ask for. Any other picture has half of
    the time the size that gives its subjects the most room (the first such size), otherwise a
    random one. With `first_share`, that share of the random ones has the first size, and all
    pictures of one subject have random ones. With `jitter`, the same ones come again and again,
    each time elsewhere.

    A subject-style pair that the data set holds out is held out here, and appears only as a single.
    A share `held_out` of the pairs of subjects, of the pairs of a subject and a count, and of those
    of a subject and a colour is held out in every style and order. A larger `count` with the same
    seed only adds pictures. Raises ValueError for a bad setting, or if there are not so many
    different ones.
    """
    if count < 1:
        raise ValueError(f"the number of compositions must be at least 1, not {count}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, not {held_out}")
    if first_share is not None and not 0 <= first_share <= 1:
        raise ValueError(f"first_share must be from 0 to 1, not {first_share}")
    jitter = jitter or Jitter()
    size_for = partial(_size, sizes, first_share)
    subjects = sorted({record["subject"] for record in records})
    apart = held_out_combinations(subjects, held_out, seed)
    sources: dict[str, Iterator[Planned]] = {}
    for kind in kinds:
        draws = random.Random(f"{seed} {kind}")
        if kind == "single":
            sources[kind] = _singles(records, sizes, size_for, jitter, draws)
        else:
            sources[kind] = _others(kind, records, size_for, apart, jitter, draws)
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


def held_out_combinations(
    subjects: list[str], share: float = HELD_OUT, seed: int = 0
) -> set[tuple[str, ...]]:
    """The combinations that are held out, sorted: copies, pairs, and a subject and its colour."""
    rng = random.Random(f"{seed} held-out")
    copies = [(subject,) * n for subject in subjects for n in COUNTS]
    groups = [copies, list(combinations(subjects, 2))]
    groups.append([coloured(subject, name) for subject in subjects for name in BACKGROUNDS])
    return {
        tuple(sorted(combination))
        for group in groups
        for combination in rng.sample(group, round(share * len(group)))
    }


def held_out_parts(composition: Composition) -> set[tuple[str, ...]]:
    """The combinations of a composition that may be held out: all copies, each pair of different
    subjects, each subject with its colour."""
    subjects = composition.subjects
    parts = {tuple(sorted(pair)) for pair in combinations(subjects, 2) if pair[0] != pair[1]}
    if composition.kind == "count":
        parts.add(subjects)
    for subject, colour in zip(subjects, composition.colours, strict=True):
        if colour:
            parts.add(coloured(subject, colour))
    return parts


def coloured(subject: str, colour: str) -> tuple[str, ...]:
    """A subject and its colour, which may be held out, sorted."""
    return tuple(sorted((subject, f"colour {colour}")))


def _singles(
    records: list[dict],
    sizes: list[Size],
    size_for: Callable,
    jitter: Jitter,
    rng: random.Random,
) -> Iterator[Planned]:
    """Every picture on white in the first size, then on white in the other sizes and on every
    other background in one size; jittered ones again and again."""
    first = [(record, WHITE, sizes[0]) for record in records]
    more = [(record, WHITE, size) for record in records for size in sizes[1:]]
    more += [(record, colour, None) for record in records for colour in COLOURS]
    again = [(record, WHITE, None) for record in records for _ in COLOURS] + more
    always = replace(jitter, share=1.0)
    for placed in chain((first, more), repeat(again) if jitter.share else ()):
        rng.shuffle(placed)
        for record, colour, size in placed:
            composition = arrange("single", (record["subject"],), record["style"], colour)
            size = size or size_for(composition, rng)
            moved = composition
            if placed is not first:
                moved = (always if placed is again else jitter)(composition, size, rng)
            if placed is not again or moved != composition:
                yield moved, size, record["split"]


def _others(
    kind: str,
    records: list[dict],
    size_for: Callable,
    apart: set[tuple[str, ...]],
    jitter: Jitter,
    rng: random.Random,
) -> Iterator[Planned]:
    """Random different compositions of a kind, until there are no more; jittered ones again and
    again."""
    trained: dict[str, list[str]] = {}  # style -> subjects
    for record in records:
        if record["split"] == "train" and (kind != "coloured" or record.get("tone")):
            trained.setdefault(record["style"], []).append(record["subject"])
    styles = [style for style, subjects in trained.items() for _ in subjects]
    possible = sum(_possible(kind, len(subjects)) for subjects in trained.values())
    always = replace(jitter, share=1.0)
    drawn = set()
    while len(drawn) < possible or (possible and jitter.share):
        style = rng.choice(styles)
        composition = _random(kind, style, trained[style], rng)
        again = composition in drawn
        if composition is None or (again and not jitter.share):
            continue
        drawn.add(composition)
        split = "held-out" if held_out_parts(composition) & apart else "train"
        size = size_for(composition, rng)
        moved = (always if again else jitter)(composition, size, rng)
        if again and moved == composition:
            continue
        yield moved, size, split


def _random(
    kind: str, style: str, subjects: Sequence[str], rng: random.Random
) -> Composition | None:
    """A random composition of a kind; None for one that does not count."""
    background = WHITE if rng.random() < WHITE_SHARE else rng.choice(COLOURS)
    if kind == "count":
        return arrange(kind, (rng.choice(subjects),) * rng.choice(COUNTS), style, background)
    if kind == "sized":
        extent = rng.choice(("small", "big"))
        return arrange(kind, (rng.choice(subjects),), style, background, extent=extent)
    if kind == "coloured":
        colour = rng.choice(list(BACKGROUNDS))
        background = WHITE if rng.random() < ALONE else rng.choice(COLOURS)
        if colour == background:  # which would hide the subject
            background = rng.choice([each for each in BACKGROUNDS if each != colour])
        return arrange(kind, (rng.choice(subjects),), style, background, colours=(colour,))
    several = tuple(rng.choices(subjects, k=3 if kind == "row" else 2))
    if len(set(several)) < len(several):
        return None
    corners = rng.sample(range(4), 2) if kind == "corners" else ()
    return arrange(kind, several, style, background, corners=tuple(corners))


def _possible(kind: str, subjects: int) -> int:
    """How many compositions of a kind there are of `subjects` subjects in one style."""
    pairs = subjects * (subjects - 1)
    return {
        "count": len(BACKGROUNDS) * subjects * len(COUNTS),
        "sized": len(BACKGROUNDS) * subjects * 2,
        "coloured": len(BACKGROUNDS) * (len(BACKGROUNDS) - 1) * subjects,
        "row": len(BACKGROUNDS) * pairs * max(0, subjects - 2),
        "corners": len(BACKGROUNDS) * pairs * 12,
    }.get(kind, len(BACKGROUNDS) * pairs)


def _size(
    sizes: list[Size], first_share: float | None, composition: Composition, rng: random.Random
) -> Size:
    """Half of the time the one with the most room for the subjects, which does not matter to a
    single one; otherwise, with its share, the first of `sizes`, or any other."""
    if (first_share is None or len(composition.subjects) > 1) and rng.random() < 0.5:
        return roomiest(composition, sizes)
    if first_share is None or len(sizes) == 1:
        return rng.choice(sizes)
    return sizes[0] if rng.random() < first_share else rng.choice(sizes[1:])
