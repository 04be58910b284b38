"""Composed pictures: subjects of the emoji data set on coloured backgrounds, in other colours, in
numbers and places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

from PIL import Image

from ..buckets import Size
from .pictures import BACKGROUNDS, resize, stacked
from .recolour import Tone, recoloured, tone_of

COUNTS = (2, 3, 4, 5)
SMALL = 0.5  # the side of a small subject, as a share of the box

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the picture
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
TOP, BOTTOM = (0, 0, 1, 0.5), (0, 0.5, 1, 1)
THIRDS = tuple((i / 3, 0, (i + 1) / 3, 1) for i in range(3))
QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))
ROWS: dict[int, tuple[Box, ...]] = {  # several copies, row by row
    1: ((0, 0, 1, 1),),
    2: (LEFT, RIGHT),
    3: (TOP, *QUARTERS[2:]),
    4: QUARTERS,
    5: (
        (1 / 6, 0, 1 / 2, 0.5), (1 / 2, 0, 5 / 6, 0.5),
        *((i / 3, 0.5, (i + 1) / 3, 1) for i in range(3)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Composition:
    """What a picture shows: `subjects` in `boxes`, all in one style, on a background of
    `BACKGROUNDS`. Each subject fills the largest square in the middle of its box.

    `kind` is "single", "coloured" (a single in another colour), "sized" (a small or big single, as
    `extent` says), "count" (copies of one subject), "beside" or "above" (of two subjects the first
    is at the left or at the top), "corners" (two subjects) or "row" (three different subjects, from
    left to right). `colours` are names of `BACKGROUNDS`, or None for a subject's own colour.
    """

    kind: str
    subjects: tuple[str, ...]
    style: str
    background: str
    boxes: tuple[Box, ...]
    colours: tuple[str | None, ...]
    mirrored: tuple[bool, ...]
    extent: str | None = None

    @property
    def corners(self) -> tuple[int, ...]:
        """The corner of each subject, as an index of `QUARTERS`, where the kind is "corners"."""
        if self.kind != "corners":
            return ()
        return tuple(
            2 * (top + bottom > 1) + (left + right > 1) for left, top, right, bottom in self.boxes
        )

    @classmethod
    def of(cls, entry: dict) -> "Composition":
        """From a line of `metadata.jsonl`."""
        parts = {field.name: entry[field.name] for field in fields(cls)}
        parts["boxes"] = map(tuple, parts["boxes"])
        lists = ("subjects", "boxes", "colours", "mirrored")
        return cls(**parts | {name: tuple(parts[name]) for name in lists})


def arrange(
    kind: str,
    subjects: tuple[str, ...],
    style: str,
    background: str,
    *,
    colours: tuple[str | None, ...] = (),
    extent: str | None = None,
    corners: tuple[int, ...] = (),
) -> Composition:
    """The composition with the boxes for its kind and its number of subjects. `corners` are those
    of `QUARTERS`, for each subject one."""
    count = len(subjects)
    boxes = {"beside": (LEFT, RIGHT), "above": (TOP, BOTTOM), "row": THIRDS}.get(kind)
    if corners:
        boxes = tuple(QUARTERS[corner] for corner in corners)
    if extent == "small":
        margin = (1 - SMALL) / 2
        boxes = ((margin, margin, 1 - margin, 1 - margin),)
    return Composition(
        kind, subjects, style, background, boxes or ROWS[count], colours or (None,) * count,
        (False,) * count, extent,
    )  # fmt: skip


def render(
    composition: Composition, pictures: Mapping[tuple[str, str], Image.Image], size: Size
) -> Image.Image:
    """An RGB picture of `size` (width, height) pixels; `pictures` has the RGBA cut-out of each
    (subject, style)."""
    canvas = Image.new("RGBA", size, BACKGROUNDS[composition.background])
    parts = (composition.subjects, composition.boxes, composition.colours, composition.mirrored)
    for subject, box, colour, mirrored in zip(*parts, strict=True):
        original = pictures[subject, composition.style]
        left, top, side = square_in(box, size)
        cut_out = resize(original, side)
        if colour:
            cut_out = _recoloured(cut_out, tone_of(stacked([original])[0]), colour)
        if mirrored:
            cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas.alpha_composite(cut_out, (left, top))
    return canvas.convert("RGB")


def _recoloured(cut_out: Image.Image, tone: Tone, colour: str) -> Image.Image:
    found = recoloured(stacked([cut_out]), [tone], [colour])[0]
    return Image.fromarray(found.movedim(0, -1).contiguous().numpy(), "RGBA")


@lru_cache(maxsize=4096)
def square_in(box: Box, size: Size) -> tuple[int, int, int]:
    """Left, top and side in pixels of the largest square in the middle of a box."""
    width, height = size
    left, top = round(box[0] * width), round(box[1] * height)
    wide, high = round(box[2] * width) - left, round(box[3] * height) - top
    side = min(wide, high)
    return left + (wide - side) // 2, top + (high - side) // 2, side


def roomiest(composition: Composition, sizes: Sequence[Size]) -> Size:
    """The first of `sizes` that gives the smallest subject the most room."""
    return max(sizes, key=lambda size: min(square_in(box, size)[2] for box in composition.boxes))
