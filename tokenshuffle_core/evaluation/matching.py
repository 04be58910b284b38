"""What a part of a picture shows: the nearest reference wherever it lies, its colour, its count.

A reference may be drawn smaller than its place, anywhere in it, and mirrored. The squared error of
every such drawing D of it, on the background b, comes from one convolution per size:
||I - D||^2 = ||I - b||^2 - 2 <I - b, D - b> + ||D - b||^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.emoji.build import read_manifest
from ..data.emoji.compose import ROWS, Box
from ..data.emoji.pictures import BACKGROUNDS, load_rgba
from ..data.emoji.recolour import THINGS, distance, hsv, recoloured, tone_of

SIDE = 32  # pixels of the shorter side of a place, in which it is compared
SCALES = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # of a reference's side to its place's shorter side
SMALL = (0.4, 0.45, 0.5, 0.55, 0.6)  # those of what a prompt calls small
SEEN = 0.12  # root mean squared difference from the background that a person sees
FILLED = 0.25  # share of its subject's area by which a place is more than noise
DULL = 0.15  # chroma up to which a pixel is black, grey or white
BROWN = 0.6  # mean value below which a red, an orange or a yellow is brown
COLOURED = 1 / 3  # share of a thing's pixels that are not, if it is not black, grey or white


@dataclass(frozen=True)
class Found:
    """The subject that is nearest to a place, its scale there, and what remains: its squared error
    as a share of an empty place's."""

    subject: str
    scale: float
    remains: float


class References:
    """The cut-outs of a data set as uint8 (N, 4, H, W), with their subjects and styles."""

    def __init__(self, cut_outs: Tensor, subjects: Sequence[str], styles: Sequence[str]):
        self.cut_outs, self.subjects, self.styles = cut_outs, list(subjects), list(styles)
        self.tones = [tone_of(cut_out) for cut_out in cut_outs]
        self.last: tuple = ()  # the key of `pooled`
        self.pooled: dict[float, Tensor] = {}
        self.names: list[str] = []  # of what is in `pooled`

    @classmethod
    def read(cls, data: Path) -> "References":
        records = read_manifest(data)
        rgba = load_rgba(data, records)
        return cls(rgba, [r["subject"] for r in records], [r["style"] for r in records])

    def rows(self, style: str | None, subjects: Sequence[str] = ()) -> list[int]:
        """Those of a style or, if None, of all, and of some subjects or, if empty, of all."""
        return [
            i
            for i, (subject, of) in enumerate(zip(self.subjects, self.styles, strict=True))
            if style in (None, of) and (not subjects or subject in subjects)
        ]

    def drawn(self, rows: list[int], colour: str | None) -> tuple[Tensor, list[str]]:
        """Cut-outs float32 (M, 4, H, W) in 0..1, premultiplied, and their subjects: in their own
        colours and, where they have a dominant one, also in `colour`."""
        shown, names = [self.cut_outs[rows]], [self.subjects[i] for i in rows]
        toned = [i for i in rows if self.tones[i]] if colour else []
        if toned:
            tones = [self.tones[i] for i in toned]
            shown.append(recoloured(self.cut_outs[toned], tones, [colour] * len(toned)))
            names += [self.subjects[i] for i in toned]
        rgba = torch.cat(shown).float() / 255
        return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1), names

    def nearest(
        self,
        part: Tensor,
        style: str | None,
        background: str,
        colour: str | None = None,
        scales: Sequence[float] = SCALES,
    ) -> Found:
        """The nearest of all subjects to a part (3, H, W) in 0..1 of a picture."""
        if self.last != (style, colour):  # one at a time: all together are gigabytes
            drawn, self.names = self.drawn(self.rows(style), colour)
            self.pooled = {
                scale: F.adaptive_avg_pool2d(drawn, round(scale * SIDE))
                for scale in (*SMALL, *SCALES)
            }
            self.last = (style, colour)
        part = _pooled(part, SIDE)
        errors = torch.stack([placed(part, self.pooled[s], background) for s in scales])
        scale, row = divmod(int(errors.argmin()), errors.shape[1])
        empty = (part - behind(background)).square().mean().clamp(min=1e-9)
        return Found(self.names[row], scales[scale], (errors.min() / empty).item())

    def count(
        self,
        image: Tensor,
        subjects: Sequence[str],
        style: str | None,
        background: str,
        colour: str | None = None,
    ) -> int:
        """How many copies of one of `subjects` an image (3, H, W) shows: the arrangement that it is
        nearest to, or 0 if a place of that one is empty."""
        image = _pooled(image, 2 * SIDE)
        drawn, _ = self.drawn(self.rows(style, subjects), colour)
        difference = (image - behind(background)).square().mean(0)
        errors = {}
        for copies, boxes in ROWS.items():
            outside, error = torch.ones_like(difference), 0.0
            for box in boxes:
                place = pixels(box, image)
                outside[place] = 0
                part = image[(..., *place)]
                sides = [round(scale * min(part.shape[1:])) for scale in SCALES]
                fits = [placed(part, F.adaptive_avg_pool2d(drawn, k), background) for k in sides]
                error += torch.stack(fits).min().item() * part[0].numel()
            errors[copies] = error + (difference * outside).sum().item()
        found = min(errors, key=errors.get)
        area = drawn[:, 3].mean() * FILLED
        seen = difference.sqrt() > SEEN
        squares = [(seen[pixels(box, image)], area) for box in ROWS[found]]
        filled = (s.sum() >= area * min(s.shape) ** 2 for s, area in squares)
        return found if all(filled) else 0


def placed(part: Tensor, drawn: Tensor, background: str) -> Tensor:
    """The smallest mean squared error (M) between a part (3, H, W) and each of the premultiplied
    cut-outs (M, 4, k, k) on a background, over all places in the part, mirrored or not."""
    b = behind(background)
    subject = drawn[:, :3] - drawn[:, 3:] * b
    rest = part - b
    both = torch.stack([rest, rest.flip(-1)])
    common = F.conv2d(both, subject).amax(dim=(0, 2, 3))
    return (rest.square().sum() - 2 * common + subject.square().sum(dim=(1, 2, 3))) / part.numel()


def colour_of(part: Tensor, background: str) -> str | None:
    """The colour of what a part (3, H, W) in 0..1 shows, whatever it is: a name in `THINGS`, or
    "brown", which is a dark orange or red.

    None where it shows nothing. Of several colours, the one with the most chroma.
    """
    seen = (part - behind(background)).square().mean(0).sqrt() > SEEN
    if not seen.any():
        return None
    hue, saturation, value = (each[seen] for each in hsv(part))
    chroma = saturation * value
    dull = chroma < DULL
    if dull.float().mean() > 1 - COLOURED:
        names = [name for name, tone in THINGS.items() if tone[0] is None]
        return min(names, key=lambda name: abs(THINGS[name][2] - value[dull].mean()))
    hues = {name: tone[0] for name, tone in THINGS.items() if tone[0] is not None}
    nearest = torch.stack([distance(hue, centre) for centre in hues.values()]).argmin(0)
    weights = torch.bincount(nearest, chroma.double(), minlength=len(hues))
    most = weights.argmax()
    name = list(hues)[int(most)]
    dark = value[(nearest == most) & ~dull].mean() < BROWN
    return "brown" if dark and name in ("red", "orange", "yellow") else name


def behind(background: str) -> Tensor:
    """A colour of `BACKGROUNDS` as (3, 1, 1) in 0..1."""
    return torch.tensor(BACKGROUNDS[background])[:, None, None] / 255


def pixels(box: Box, image: Tensor) -> tuple[slice, slice]:
    """The rows and columns of a box in an image (..., H, W)."""
    height, width = image.shape[-2:]
    left, top, right, bottom = box
    return (
        slice(round(top * height), round(bottom * height)),
        slice(round(left * width), round(right * width)),
    )


def _pooled(image: Tensor, side: int) -> Tensor:
    """An image (3, H, W) area-averaged so that its shorter side has `side` pixels."""
    factor = side / min(image.shape[-2:])
    return F.adaptive_avg_pool2d(image, [max(side, round(n * factor)) for n in image.shape[-2:]])
