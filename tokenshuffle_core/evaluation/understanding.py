"""Understanding: does a picture show what its prompt asked for, as a person would say?

Each prompt says what it asks for: subjects in their places, their style and colours, how many, and
the background. A picture is right if all of it is there. The parts, for a prompt that has them:

- subject: in each place, the nearest of all subjects' references (see `matching`) is the right one;
  of several copies, in at least one place;
- clear: in every place, and little of the picture remains unexplained by that reference, at most
  `CLEAR` of what an empty place leaves: this is stricter, and not needed to be right;
- one of two: at least one of two different subjects is right in its place;
- small: the nearest reference is drawn small;
- colour: each thing has the colour asked for, by hue;
- count: the nearest arrangement of copies has that many, and none of its places is empty;
- background: as `compositional.background_of`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..config import GenerationConfig
from ..data.buckets import Size
from ..data.emoji.compose import ROWS, Box, roomiest
from ..data.emoji.pictures import BACKGROUNDS
from ..files import json_lines
from ..pipeline import Pipeline
from .compositional import background_of
from .intervals import Estimate, mean, proportion
from .matching import SCALES, SMALL, References, colour_of, pixels
from .retrieval import features, generate

BY_HAND = Path(__file__).with_name("prompts_by_hand.jsonl")
EXPECTED = 'an object such as {"prompt": "a cat", "subjects": ["cat"]}'
BORDER, LETTERS, SHEET = 3, 14, 2000  # pixels of a sheet: of its borders, its lines, its width
CLEAR = 0.25  # by eye: hardly any thing below is in doubt, and about half of those above
NARROWEST = 1 / 16  # side of a place, as a share of the picture's: it has some pixels
SEEDS = 8  # pictures of a prompt that are compared with each other


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it asks for.

    `subjects` has, for each place, the subjects that are right there: "an apple" may be red or
    green. `boxes` are the places, by default the first arrangement of so many. Any style is right
    if `style` is None; a colour None is the subject's own. `size` (width, height) is by default the
    model's that gives the subjects the most room. `kind` is a part of the group.
    """

    prompt: str
    group: str
    subjects: tuple[tuple[str, ...], ...]
    style: str | None = None
    background: str = "white"
    colours: tuple[str | None, ...] = ()
    boxes: tuple[Box, ...] = ()
    size: Size | None = None
    language: str = "en"
    any_order: bool = False
    small: bool = False
    kind: str = ""

    def __post_init__(self):
        n = len(self.subjects)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if not self.boxes:
            if n not in ROWS:
                raise ValueError(f"{n} subjects need boxes: there is no arrangement of so many")
            object.__setattr__(self, "boxes", ROWS[n])
        object.__setattr__(self, "colours", self.colours or (None,) * n)
        for name in ("boxes", "colours"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{n} subjects need as many {name}")
        if any(not (0 <= a < c <= 1 and 0 <= b < d <= 1) for a, b, c, d in self.boxes):
            raise ValueError("boxes are [left, top, right, bottom], as shares of the picture")
        if any(min(c - a, d - b) < NARROWEST for a, b, c, d in self.boxes):
            raise ValueError(
                "a box must have at least a sixteenth of the picture's width and height"
            )
        for colour in (self.background, *filter(None, self.colours)):
            if colour not in BACKGROUNDS:
                raise ValueError(f"{colour!r} is not a colour: choose of {', '.join(BACKGROUNDS)}")

    @property
    def copies(self) -> bool:
        """Several of the same, in the same colour."""
        things = set(zip(self.subjects, self.colours, strict=True))
        return len(self.subjects) > 1 and len(things) == 1

    @classmethod
    def of(cls, entry: dict) -> "Prompt":
        """From a line of a file. Raises ValueError."""
        if not {"prompt", "subjects"} <= entry.keys():
            raise ValueError(f"expected {EXPECTED}")
        names = [field.name for field in fields(cls)]
        if unknown := [key for key in entry if key not in names]:
            raise ValueError(f"there is no key {unknown[0]!r}, only {', '.join(names)}")
        found = {"group": "prompts"} | {k: v for k, v in entry.items() if v is not None}
        for key, kind in KINDS.items():
            if key in found and not isinstance(found[key], kind):
                raise ValueError(f"{key} must be {NAMES[kind]}, not {found[key]!r}")
        if not found.get("subjects"):
            raise ValueError("subjects is empty")
        each = [[s] if isinstance(s, str) else s for s in found["subjects"]]
        if any(not isinstance(s, list) or not s or not _are_names(s) for s in each):
            raise ValueError("subjects are names, or lists of names of which each is right")
        if not _are_names(filter(None, found.get("colours", []))):
            raise ValueError("colours are names, or null")
        boxes = found.get("boxes", [])
        numbers = [n for box in boxes for n in (box if isinstance(box, list) else [None])]
        if any(type(n) not in (int, float) for n in numbers) or any(len(b) != 4 for b in boxes):
            raise ValueError("boxes are [left, top, right, bottom], as shares of the picture")
        size = found.get("size")
        if size and (len(size) != 2 or any(type(n) is not int for n in size)):
            raise ValueError("size is [width, height]")
        found |= {"subjects": tuple(map(tuple, each)), "boxes": tuple(map(tuple, boxes))}
        return cls(**found | {k: tuple(found[k]) for k in ("colours", "size") if k in found})


KINDS: dict[str, type] = {
    **dict.fromkeys(("prompt", "group", "style", "background", "language", "kind"), str),
    **dict.fromkeys(("subjects", "colours", "boxes", "size"), list),
    **dict.fromkeys(("any_order", "small"), bool),
}
NAMES = {str: "text", list: "a list", bool: "true or false"}


def _are_names(values: Iterable) -> bool:
    return all(isinstance(value, str) for value in values)


def read_prompts(path: Path, references: References) -> list[Prompt]:
    """The prompts in a file of JSON lines, each with the keys of `Prompt`.

    Raises FileNotFoundError, or ValueError that names the line, also for subjects and styles that
    the data set does not have.
    """
    known = {"subject": set(references.subjects), "style": {*references.styles, None}}
    prompts = []
    for i, entry in json_lines(path, EXPECTED):
        try:
            prompt = Prompt.of(entry)
            asked = [("subject", s) for names in prompt.subjects for s in names]
            for what, name in [*asked, ("style", prompt.style)]:
                if name not in known[what]:
                    raise ValueError(f"the data set has no {what} {name!r}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {i + 1}: {error}") from None
        prompts.append(prompt)
    return prompts


def draw(
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    settings: GenerationConfig,
    *,
    seed: int = 0,
    batch: int = 16,
    sizes: Sequence[Size] = (),
) -> list[Tensor]:
    """A picture (3, H, W) in 0..1 for each prompt, picture i with seed + i: in the prompt's size,
    otherwise in the one of `sizes` that gives its subjects the most room, otherwise in that of the
    settings. Raises ValueError for a prompt that is too long."""
    sizes = sizes or [(settings.width, settings.height)]
    by_size: dict[Size, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_size.setdefault(prompt.size or roomiest(prompt, sizes), []).append(i)
    images: dict[int, Tensor] = {}
    for (width, height), places in by_size.items():
        sized = replace(settings, width=width, height=height)
        texts, seeds = [prompts[i].prompt for i in places], [seed + i for i in places]
        images |= zip(places, generate(pipeline, texts, seeds, sized, batch), strict=True)
    return [images[i] for i in range(len(prompts))]


def score(image: Tensor, prompt: Prompt, references: References) -> dict[str, bool]:
    """Whether an image (3, H, W) in 0..1 is right, and each part that the prompt asks for."""
    background = background_of(image)
    parts = [image[(..., *pixels(box, image))] for box in prompt.boxes]
    scales = (*SMALL, *SCALES) if prompt.small else SCALES

    def look(subjects, colours) -> dict[str, list[bool]]:
        found = {"subject": [], "clear": [], "small": [], "colour": []}
        for part, names, colour in zip(parts, subjects, colours, strict=True):
            nearest = references.nearest(part, prompt.style, background, colour, scales)
            found["subject"].append(nearest.subject in names)
            found["clear"].append(nearest.subject in names and nearest.remains <= CLEAR)
            found["small"].append(nearest.scale in SMALL)
            if colour:
                found["colour"].append(colour_of(part, background) == colour)
        return found

    asked = prompt.subjects, prompt.colours
    looks = [look(*asked)]
    if prompt.any_order and len(parts) == 2:
        looks.append(look(*(each[::-1] for each in asked)))
    found = max(looks, key=lambda each: sum(each["subject"]) + sum(each["colour"]))
    right = {"subject": all(found["subject"])}
    if prompt.copies:
        names, colour = prompt.subjects[0], prompt.colours[0]
        count = references.count(image, names, prompt.style, background, colour)
        right = {"subject": any(found["subject"]), "count": count == len(parts)}
    right["background"] = background == prompt.background
    if any(prompt.colours):
        right["colour"] = all(found["colour"])
    if prompt.small:
        right["small"] = all(found["small"])
    right = {"right": all(right.values()), **right, "clear": all(found["clear"])}
    if len(parts) == 2 and not prompt.copies:
        right["one of two"] = any(found["subject"])
    return right


def score_all(
    images: Sequence[Tensor], prompts: Sequence[Prompt], references: References
) -> list[dict[str, bool]]:
    """`score` of each, in the order in which references need not be prepared twice."""
    order = sorted(range(len(prompts)), key=lambda i: _prepared(prompts[i]))
    scores = {i: score(images[i], prompts[i], references) for i in order}
    return [scores[i] for i in range(len(prompts))]


def _prepared(prompt: Prompt) -> tuple[str, str]:
    return prompt.style or "", prompt.colours[0] or ""


def shares(
    prompts: Sequence[Prompt], scores: Sequence[dict[str, bool]], *, together: bool = False
) -> dict[str, Estimate]:
    """The share that is right of each group, of each of its parts and of each of its kinds; or,
    `together`, also of all prompts and of each language."""
    right: dict[str, list[bool]] = {}
    for prompt, found in zip(prompts, scores, strict=True):
        for name in ("all", f"all, {prompt.language}") if together else ():
            right.setdefault(name, []).append(found["right"])
        for part, value in found.items():
            name = prompt.group if part == "right" else f"{prompt.group}: {part}"
            right.setdefault(name, []).append(value)
        if prompt.kind:
            right.setdefault(f"{prompt.group}, {prompt.kind}", []).append(found["right"])
    # Each group's rows beside each other, the group itself first.
    groups = list(dict.fromkeys(name.partition(":")[0].partition(",")[0] for name in right))
    order = sorted(right, key=lambda name: groups.index(name.partition(":")[0].partition(",")[0]))
    return {name: proportion(sum(right[name]), len(right[name])) for name in order}


def diversity(images: Sequence[Tensor], seeds: int = SEEDS) -> Estimate:
    """How far apart `seeds` consecutive images (3, H, W) of one prompt are: the root mean squared
    error of two of them at 32 x 32 pixels, averaged over the pairs, and over the prompts."""
    distances = []
    for start in range(0, len(images), seeds):
        pooled = features(torch.stack(list(images[start : start + seeds])))
        pairs = combinations(pooled, 2)
        each = [(a - b).square().mean().sqrt().item() for a, b in pairs]
        distances.append(sum(each) / len(each))
    return mean(distances)


def marked_sheet(
    images: Sequence[Tensor], prompts: Sequence[Prompt], scores: Sequence[dict[str, bool]]
) -> Image.Image:
    """All images (3, H, W) in rows, with a green border where they are right and a red one where
    not, over their numbers and as much of their prompts as has room and a letter in the font."""
    marked = []
    for i, (image, prompt, found) in enumerate(zip(images, prompts, scores, strict=True)):
        colour = (40, 160, 60) if found["right"] else (220, 50, 40)
        height, width = image.shape[1:]
        cell = Image.new("RGB", (width + 2 * BORDER, height + 2 * BORDER + LETTERS), "white")
        cell.paste(colour, (0, 0, width + 2 * BORDER, height + 2 * BORDER))
        pixels = (image.movedim(0, -1).clamp(0, 1) * 255).round().byte().numpy()
        cell.paste(Image.fromarray(pixels), (BORDER, BORDER))
        text = f"{i + 1} {prompt.prompt.strip()}"
        text = text if text.isascii() else f"{i + 1} ({prompt.language})"
        ImageDraw.Draw(cell).text((BORDER, height + 2 * BORDER), text, "black")
        marked.append(cell)
    # Row by row, as a text: a row is as high as its highest picture.
    places, left, top, row = [], 0, 0, 0
    for cell in marked:
        if left and left + cell.width > SHEET:
            left, top, row = 0, top + row, 0
        places.append((left, top))
        left, row = left + cell.width, max(row, cell.height)
    right = max(x + cell.width for (x, _), cell in zip(places, marked, strict=True))
    sheet = Image.new("RGB", (right, top + row), "white")
    for cell, place in zip(marked, places, strict=True):
        sheet.paste(cell, place)
    return sheet
