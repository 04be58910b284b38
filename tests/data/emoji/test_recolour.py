"""Recoloured cut-outs against `colorsys`, and which cut-outs have a tone at all."""

import colorsys

import numpy as np
import pytest
import torch

from tokenshuffle_core.data.emoji.pictures import BACKGROUNDS
from tokenshuffle_core.data.emoji.recolour import (
    THINGS,
    distance,
    from_hsv,
    hsv,
    recoloured,
    tone_of,
)


def filled(*colours: tuple[int, int, int], alpha: int = 255) -> torch.Tensor:
    """A cut-out (4, 12, 12) with vertical stripes of equal width."""
    stripes = np.repeat(np.array(colours, np.uint8), 12 // len(colours), axis=0)
    rgb = np.broadcast_to(stripes, (12, 12, 3))
    rgba = np.concatenate([rgb, np.full((12, 12, 1), alpha, np.uint8)], -1)
    return torch.from_numpy(rgba).movedim(-1, 0).contiguous()


def test_conversions_are_colorsys():
    torch.manual_seed(0)
    rgb = torch.rand(3, 5, 7)
    rgb[:, 0, 0] = 0.5  # grey has no hue
    found = torch.stack(hsv(rgb)).flatten(1).T
    expected = [colorsys.rgb_to_hsv(*pixel) for pixel in rgb.flatten(1).T.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(from_hsv(*hsv(rgb)), rgb, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hue", [0.0, 0.02, 0.33, 0.61, 0.98])
def test_the_tone_is_the_dominant_colours(hue):
    colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.8, 0.9))
    tone = tone_of(filled(colour, colour, (250, 250, 250)))
    assert float(distance(torch.tensor(tone.hue), hue)) < 0.01
    assert tone.saturation == pytest.approx(0.8, abs=0.01)
    assert tone.value == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    "cut_out",
    [
        filled((250, 250, 250), (30, 30, 30)),  # no colour
        filled((250, 20, 20), (20, 250, 20)),  # two of them
        filled((250, 20, 20), *[(240, 240, 240)] * 5),  # a little of one
        filled((250, 20, 20), alpha=0),  # nothing
    ],
)
def test_without_one_dominant_colour_there_is_no_tone(cut_out):
    assert tone_of(cut_out) is None


def test_only_the_dominant_colour_changes():
    red, leaf, white = (230, 30, 40), (20, 200, 60), (250, 250, 250)
    cut_out = filled(red, red, red, leaf, white, (150, 20, 30))
    tone = tone_of(cut_out)
    for colour, (hue, saturation, value) in THINGS.items():
        (found,) = recoloured(cut_out[None], [tone], [colour])
        assert torch.equal(found[:, :, 6:10], cut_out[:, :, 6:10])  # leaf and white
        assert torch.equal(found[3], cut_out[3])
        pixel, darker = (found[:3, 0, x].tolist() for x in (0, 11))
        h, s, v = colorsys.rgb_to_hsv(*(each / 255 for each in pixel))
        assert s == pytest.approx(saturation, abs=0.1)
        assert v == pytest.approx(value, abs=0.12)
        if hue is not None:
            assert float(distance(torch.tensor(h), hue)) < 0.02
        assert max(darker) < max(pixel)  # shading stays


def test_each_cut_out_has_its_own_colour():
    cut_outs = torch.stack([filled((230, 30, 40)), filled((40, 60, 220))])
    tones = [tone_of(each) for each in cut_outs]
    both = recoloured(cut_outs, tones, ["green", "pink"])
    for i, colour in enumerate(("green", "pink")):
        assert torch.equal(both[i : i + 1], recoloured(cut_outs[i : i + 1], [tones[i]], [colour]))
    assert set(THINGS) == set(BACKGROUNDS)
