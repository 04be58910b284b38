"""Subjects in other colours: where a cut-out has one dominant hue, its pixels get another one.

The pixels keep their saturation and value relative to the tone, the mean of the dominant pixels, so
that shading and highlights stay. HSV as in Smith, Color Gamut Transform Pairs (SIGGRAPH 1978).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .pictures import sent


class Tone(NamedTuple):
    """Hue in turns, saturation and value in 0..1."""

    hue: float
    saturation: float
    value: float


THINGS: dict[str, Tone | tuple[None, float, float]] = {  # None: the hue stays
    "white": (None, 0.03, 0.97),
    "black": (None, 0.15, 0.22),
    "grey": (None, 0.04, 0.62),
    "red": Tone(0.995, 0.82, 0.9),
    "orange": Tone(0.075, 0.85, 0.98),
    "yellow": Tone(0.14, 0.8, 1.0),
    "green": Tone(0.35, 0.65, 0.72),
    "blue": Tone(0.6, 0.75, 0.92),
    "purple": Tone(0.755, 0.6, 0.82),
    "pink": Tone(0.92, 0.42, 1.0),
}
INNER, OUTER = 1 / 12, 1 / 8  # distances of hues, in turns: part of the tone, and no longer
DULL, VIVID = 0.08, 0.2  # chroma: no part of the tone, and part of it
BINS = 36
AREA, COLOUR = 0.4, 0.75  # what the tone takes at least of the opaque pixels, and of their chroma
SPREAD = 0.6  # how much of the differences in hue stays


def tone_of(cut_out: Tensor) -> Tone | None:
    """The tone of an RGBA cut-out, uint8 (4, H, W); None where there is no dominant one."""
    rgba = cut_out.float() / 255
    hue, saturation, value = hsv(rgba[:3])
    opaque = rgba[3] > 0.5
    chroma = (saturation * value)[opaque]
    if not len(chroma) or chroma.sum() < AREA * VIVID * len(chroma):
        return None
    hue, saturation, value = hue[opaque], saturation[opaque], value[opaque]
    bins = torch.bincount((hue * BINS).long() % BINS, chroma.double(), minlength=BINS)
    smooth = sum(bins.roll(shift) for shift in (-1, 0, 1))
    angles = 2 * torch.pi * hue
    near = distance(hue, (int(smooth.argmax()) + 0.5) / BINS) < INNER
    x, y = ((chroma * part(angles))[near].sum() for part in (torch.cos, torch.sin))
    centre = float(torch.atan2(y, x) / (2 * torch.pi)) % 1
    near = distance(hue, centre) < INNER
    vivid = near & (chroma > VIVID)
    if vivid.float().mean() < AREA or chroma[near].sum() < COLOUR * chroma.sum():
        return None
    tone = centre, saturation[vivid].mean().item(), value[vivid].mean().item()
    return Tone(*(round(each, 4) for each in tone))  # as a manifest has it


def recoloured(cut_outs: Tensor, tones: list[Tone], colours: list[str]) -> Tensor:
    """Cut-outs uint8 (N, 4, H, W) with their tones, in `colours` of `THINGS` -> the same."""
    rgba = cut_outs.float() / 255
    rgb = rgba[:, :3]
    hue, saturation, value = hsv(rgb)
    targets = [
        Tone(tone.hue, *THINGS[colour][1:]) if THINGS[colour][0] is None else THINGS[colour]
        for tone, colour in zip(tones, colours, strict=True)
    ]
    of, to = (sent(each, rgb.device).T[..., None, None] for each in (tones, targets))
    apart = distance(hue, of[0])
    share = ((OUTER - apart) / (OUTER - INNER)).clamp(0, 1)
    share = share * ((saturation * value - DULL) / (VIVID - DULL)).clamp(0, 1)
    turned = to[0] + SPREAD * ((hue - of[0] + 0.5) % 1 - 0.5)
    saturated = (to[1] * saturation / of[1]).clamp(0, 1)
    lit = (to[2] * value / of[2]).clamp(0, 1)
    mixed = torch.lerp(rgb, from_hsv(turned, saturated, lit), share[:, None])
    return torch.cat([(255 * mixed).round().byte(), cut_outs[:, 3:]], 1)


def hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RGB (..., 3, H, W) in 0..1 -> hue in turns, saturation and value, each (..., H, W)."""
    red, green, blue = rgb.unbind(-3)
    value, low = rgb.amax(-3), rgb.amin(-3)
    chroma = value - low
    safe = chroma.clamp(min=1e-6)
    sixth = torch.where(
        value == red,
        (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return sixth / 6 * (chroma > 0), chroma / value.clamp(min=1e-6), value


def from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `hsv`, stacked before the last two dimensions."""
    channels = []
    for n in (5, 3, 1):
        k = (n + 6 * hue) % 6
        channels.append(value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1)))
    return torch.stack(channels, -3)


def distance(hue: Tensor, centre: float | Tensor) -> Tensor:
    """Of hues on their circle, at most 0.5."""
    return ((hue - centre + 0.5) % 1 - 0.5).abs()
