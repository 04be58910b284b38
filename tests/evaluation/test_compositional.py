"""Every score is 1 for the picture as it was composed, and 0 for a wrong one."""

import random
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.data.emoji.compose import Composition, arrange, render, roomiest
from tokenshuffle_core.data.emoji.folder import FOLDER, build
from tokenshuffle_core.data.emoji.pictures import BACKGROUNDS
from tokenshuffle_core.evaluation.compositional import (
    SCORES,
    References,
    compositional,
    score,
)
from tokenshuffle_core.evaluation.items import choose
from tokenshuffle_core.images import to_tensor

SUBJECTS = ("ball", "bar", "corner", "cross")
SIZE = 64


def drawing(subject: str, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    if subject == "ball":
        draw.ellipse((6, 6, 57, 57), (*colour, 255))
    if subject in ("bar", "cross"):
        draw.rectangle((24, 4, 39, 59), (*colour, 255))
    if subject in ("corner", "cross"):
        draw.rectangle((4, 30, 59, 45), (*colour, 255))
    if subject == "corner":
        draw.rectangle((4, 4, 19, 45), (*colour, 255))
    return image


PICTURES = {
    (subject, style): drawing(subject, colour)
    for subject in SUBJECTS
    for style, colour in (("3d", (200, 30, 60)), ("flat", (30, 90, 160)))
}
REFERENCES = References(PICTURES)


def rendered(composition: Composition, size: tuple[int, int] = (SIZE, SIZE)) -> torch.Tensor:
    return to_tensor([render(composition, PICTURES, size)])[0]


def every_composition():
    for style in ("3d", "flat"):
        for background in BACKGROUNDS:
            for first, second in (("ball", "bar"), ("corner", "cross"), ("cross", "ball")):
                yield arrange("single", (first,), style, background)
                yield arrange("beside", (first, second), style, background)
                yield arrange("above", (first, second), style, background)
                for copies in (2, 3, 4):
                    yield arrange("count", (first,) * copies, style, background)


@pytest.mark.parametrize(
    ("size", "noise"),
    [((64, 64), 0.0), ((96, 96), 0.05), ((128, 64), 0.0), ((64, 96), 0.0)],
)
def test_what_was_composed_is_right(size, noise):
    """Also in other sizes than the references', and somewhat blurred and noisy."""
    torch.manual_seed(0)
    seen = set()
    for composition in every_composition():
        image = rendered(composition, size)
        if noise:
            small = torch.nn.functional.avg_pool2d(image[None], 2)
            image = torch.nn.functional.interpolate(small, scale_factor=2)[0]
            image = (image + noise * torch.randn_like(image)).clamp(0, 1)
        found = score(image, composition, REFERENCES)
        assert tuple(found) == SCORES[composition.kind]
        assert all(found.values()), composition
        seen.add(composition.kind)
    assert seen == set(SCORES)


def test_a_wrong_background_is_wrong_and_nothing_else():
    for composition in every_composition():
        names = [name for name in BACKGROUNDS if name != composition.background]
        other = random.Random(0).choice(names)
        shown = arrange(composition.kind, composition.subjects, composition.style, other)
        found = score(rendered(shown), composition, REFERENCES)
        assert found.pop("background") is False
        assert all(found.values()), (composition, other)


def test_a_wrong_count_is_wrong():
    for copies in (2, 3, 4):
        composition = arrange("count", ("ball",) * copies, "3d", "white")
        for other in {1, 2, 3, 4} - {copies}:
            shown = arrange("count", ("ball",) * other, "3d", "white")
            found = score(rendered(shown), composition, REFERENCES)
            assert found == {"background": True, "count": False}


@pytest.mark.parametrize("kind", ["beside", "above"])
def test_swapped_and_wrong_subjects(kind):
    composition = arrange(kind, ("ball", "cross"), "flat", "blue")
    swapped = rendered(arrange(kind, ("cross", "ball"), "flat", "blue"))
    right = {"background": True, "subjects": True, "position": False}
    assert score(swapped, composition, REFERENCES) == right
    for shown in (("ball", "bar"), ("corner", "cross"), ("bar", "corner"), ("ball", "ball")):
        found = score(rendered(arrange(kind, shown, "flat", "blue")), composition, REFERENCES)
        assert found == {"background": True, "subjects": False, "position": False}


def test_a_wrong_single_subject():
    composition = arrange("single", ("ball",), "3d", "pink")
    found = score(rendered(arrange("single", ("bar",), "3d", "pink")), composition, REFERENCES)
    assert found == {"background": True, "subjects": False}


def test_pictures_are_those_of_the_canonical_prompts(data, tmp_path, pipeline):
    copy = shutil.copytree(data, tmp_path / "data")
    build(copy, 12, seed=3, workers=1)
    items = choose(copy / FOLDER, "train", None, 0)
    items = [item for item in items if item.extra["kind"] in SCORES][:4]
    compositions = [Composition.of(item.extra) for item in items]
    settings = GenerationConfig(width=32, height=32, cfg=1.0)
    scores, images = compositional(pipeline, copy, compositions, settings, seed=5, batch=3)
    for i, item in enumerate(items):
        expected = pipeline.generate(item.captions[0], settings=settings, seed=5 + i).images
        torch.testing.assert_close(images[i].movedim(0, -1)[None], expected, atol=1e-4, rtol=0)
    assert [tuple(found) for found in scores] == [SCORES[c.kind] for c in compositions]
    sizes = [(32, 32), (64, 32), (32, 64)]
    _, images = compositional(pipeline, copy, compositions, settings, seed=5, sizes=sizes)
    for i, (item, composition) in enumerate(zip(items, compositions, strict=True)):
        width, height = roomiest(composition, sizes)
        assert images[i].shape == (3, height, width)
        sized = replace(settings, width=width, height=height)
        expected = pipeline.generate(item.captions[0], settings=sized, seed=5 + i).images
        torch.testing.assert_close(images[i].movedim(0, -1)[None], expected, atol=1e-4, rtol=0)
    assert len({image.shape for image in images}) > 1
    with pytest.raises(ValueError, match="language 'xx' is not one of en, zh"):
        compositional(pipeline, copy, compositions, settings, language="xx")
