"""Compositional scores: does a generated picture show what its prompt composes?

The prompts are those of the composed pictures of the kinds in `SCORES`; `understanding` scores
more. The scores compare with how these are composed:

- background: the palette's nearest colour to the mean of the border;
- count: the nearest of the pictures with one to five copies of the subject;
- subjects: in each box, the nearest of all subjects in that style. "position" requires the right
  subject in each box, "subjects" the right subjects in any order.

Distances are those of `retrieval`, to references on the background of the generated picture.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..config import GenerationConfig
from ..data.buckets import Size
from ..data.emoji import captions, compose, folder
from ..data.emoji.build import read_manifest
from ..data.emoji.compose import Composition
from ..data.emoji.pictures import BACKGROUNDS, read, resize
from ..images import to_tensor
from ..pipeline import Pipeline
from .items import choose
from .retrieval import check_language, features, generate, nearest_first

SCORES = {  # kind -> what is scored
    "single": ("background", "subjects"),
    "count": ("background", "count"),
    "beside": ("background", "subjects", "position"),
    "above": ("background", "subjects", "position"),
}


class References:
    """The cut-outs of a data set, (subject, style) -> RGBA, to compare pictures with."""

    def __init__(self, pictures: dict[tuple[str, str], Image.Image]):
        self.pictures = pictures
        self.pooled: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def subjects(self, style: str) -> list[str]:
        return [subject for subject, of in self.pictures if of == style]

    def features(self, style: str, background: str, side: int) -> Tensor:
        """Features (M, F) of every subject of a style, alone on `background`."""
        key = (style, side)
        if key not in self.pooled:
            cut_outs = [self.pictures[subject, style] for subject in self.subjects(style)]
            rgba = to_tensor([resize(cut_out, side) for cut_out in cut_outs])
            colour, alpha = rgba[:, :3], rgba[:, 3:]
            self.pooled[key] = features(colour * alpha), features((1 - alpha).expand_as(colour))
        # Compositing and averaging are linear, so their order does not matter.
        drawn, clear = self.pooled[key]
        behind = torch.tensor(BACKGROUNDS[background]) / 255
        return drawn + clear * behind.repeat_interleave(clear.shape[1] // 3)


def choose_compositions(data: Path, split: str, count: int, seed: int) -> list[Composition]:
    """At most `count` of each kind of a split, in random order, from `data emoji --compositions`.

    Raises as `items.choose`.
    """
    left, compositions = dict.fromkeys(SCORES, count), []
    for item in choose(data / folder.FOLDER, split, None, seed):
        composition = Composition.of(item.extra)
        if left.get(composition.kind, 0) > 0:
            left[composition.kind] -= 1
            compositions.append(composition)
    return compositions


def compositional(
    pipeline: Pipeline,
    data: Path,
    compositions: list[Composition],
    settings: GenerationConfig,
    *,
    seed: int = 0,
    batch: int = 16,
    language: str = "en",
    sizes: Sequence[Size] = (),
) -> tuple[list[dict[str, bool]], list[Tensor]]:
    """Generate each composition's canonical prompt and score the picture.

    Returns the scores of each (see `score`) and the images (3, H, W). `compositions` consist of
    subjects of the data set in `data`. Picture i is drawn with seed + i, in the one of `sizes` that
    gives its subjects the most room, or in the settings' size if there are no `sizes`. Raises
    ValueError for a language in which the data set has no names.
    """
    records = read_manifest(data)
    check_language(records, language)
    names = {record["subject"]: record["names"][language][0] for record in records}
    prompts = [
        captions.composed(c.kind, [names[s] for s in c.subjects], c.style, c.background, language)
        for c in compositions
    ]
    references = References({(r["subject"], r["style"]): read(data, r) for r in records})
    sizes = sizes or [(settings.width, settings.height)]
    by_size: dict[Size, list[int]] = {}
    for i, composition in enumerate(compositions):
        by_size.setdefault(compose.roomiest(composition, sizes), []).append(i)
    images: dict[int, Tensor] = {}
    for (width, height), places in by_size.items():
        sized = replace(settings, width=width, height=height)
        part, seeds = [prompts[i] for i in places], [seed + i for i in places]
        images |= zip(places, generate(pipeline, part, seeds, sized, batch), strict=True)
    in_order = [images[i] for i in range(len(compositions))]
    scores = [score(*pair, references) for pair in zip(in_order, compositions, strict=True)]
    return scores, in_order


def score(image: Tensor, composition: Composition, references: References) -> dict[str, bool]:
    """Whether an image (3, H, W) in 0..1 is right, for each score that SCORES has for its kind."""
    background = background_of(image)
    right = {"background": background == composition.background}
    if composition.kind == "count":
        count = count_of(image, composition, background, references)
        right["count"] = count == len(composition.subjects)
    else:
        subjects = subjects_of(image, composition, background, references)
        right["subjects"] = sorted(subjects) == sorted(composition.subjects)
        right["position"] = subjects == list(composition.subjects)
    return {name: right[name] for name in SCORES[composition.kind]}


def background_of(image: Tensor) -> str:
    """The nearest background to the mean of the border, which is 1/32 of the shorter side wide."""
    height, width = image.shape[-2:]
    inner = torch.zeros(height, width, dtype=torch.bool)
    edge = max(1, min(height, width) // 32)
    inner[edge:-edge, edge:-edge] = True
    mean = image[:, ~inner].mean(dim=1)
    colours = torch.tensor(list(BACKGROUNDS.values())) / 255
    return list(BACKGROUNDS)[int((colours - mean).norm(dim=1).argmin())]


def count_of(
    image: Tensor, composition: Composition, background: str, references: References
) -> int:
    """The most likely number of copies of the composition's subject in the image, 1 to 5."""
    subject, style = composition.subjects[0], composition.style
    size = (image.shape[-1], image.shape[-2])
    pictures = []
    for copies in compose.ROWS:
        shown = compose.arrange("count", (subject,) * copies, style, background)
        pictures.append(compose.render(shown, references.pictures, size))
    nearest = nearest_first(features(image[None]), features(to_tensor(pictures)))[0, 0]
    return list(compose.ROWS)[int(nearest)]


def subjects_of(
    image: Tensor, composition: Composition, background: str, references: References
) -> list[str]:
    """The most likely subject in each of the composition's boxes."""
    height, width = image.shape[-2:]
    subjects, shown = references.subjects(composition.style), []
    for box in composition.boxes:
        left, top, side = compose.square_in(box, (width, height))
        part = image[None, :, top : top + side, left : left + side]
        alone = references.features(composition.style, background, side)
        shown.append(subjects[int(nearest_first(features(part), alone)[0, 0])])
    return shown
