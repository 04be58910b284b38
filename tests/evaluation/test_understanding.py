"""Pictures of what a prompt asks for are right, and pictures of anything else wrong."""

import colorsys
import json
import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from PIL import Image, ImageDraw

from tokenshuffle_core.data.emoji import build as emoji
from tokenshuffle_core.data.emoji.compose import BOTTOM, LEFT, RIGHT, ROWS, TOP
from tokenshuffle_core.data.emoji.phrases import PHRASES
from tokenshuffle_core.data.emoji.pictures import BACKGROUNDS, stacked
from tokenshuffle_core.data.emoji.plan import coloured, held_out_combinations, plan
from tokenshuffle_core.evaluation import prompt_groups
from tokenshuffle_core.evaluation.matching import References, behind, colour_of, placed
from tokenshuffle_core.evaluation.understanding import (
    BY_HAND,
    Prompt,
    diversity,
    marked_sheet,
    read_prompts,
    score,
    shares,
)
from tokenshuffle_core.images import to_tensor

SUBJECTS = ("ball", "bar", "corner", "cross")
STYLES = {"3d": 0.97, "flat": 0.6}  # and the hue of their subjects
HUES = {"red": 0.99, "orange": 0.08, "yellow": 0.15, "green": 0.34, "blue": 0.6, "purple": 0.76}
SIZE = 64


def drawing(subject: str, hue: float, side: int = SIZE) -> Image.Image:
    image = Image.new("RGBA", (4 * side, 4 * side), (0, 0, 0, 0))
    draw, unit = ImageDraw.Draw(image), side / 16
    colour = (*(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.8, 0.85)), 255)
    if subject == "ball":
        draw.ellipse((6 * unit, 6 * unit, 58 * unit, 58 * unit), colour)
    if subject in ("bar", "cross"):
        draw.rectangle((24 * unit, 4 * unit, 40 * unit, 60 * unit), colour)
    if subject in ("corner", "cross"):
        draw.rectangle((4 * unit, 30 * unit, 60 * unit, 46 * unit), colour)
    if subject == "corner":
        draw.rectangle((4 * unit, 4 * unit, 20 * unit, 46 * unit), colour)
    return image.convert("RGBa").reduce(4).convert("RGBA")


KEYS = [(subject, style) for subject in SUBJECTS for style in STYLES]
REFERENCES = References(
    stacked(drawing(subject, STYLES[style]) for subject, style in KEYS), *zip(*KEYS, strict=True)
)


def asked(*subjects: str, **more) -> Prompt:
    return Prompt("text", "group", tuple((s,) for s in subjects), **{"style": "3d", **more})


def shown(prompt: Prompt, size=(64, 64), rng: random.Random | None = None, scale=None):
    """A picture as the prompt says, and with `rng` jittered, mirrored and noisy."""
    canvas = Image.new("RGBA", size, BACKGROUNDS[prompt.background])
    scale = scale or (rng.choice((0.75, 0.8, 0.9, 1)) if rng else 1)
    for (subject, *_), colour, box in zip(
        prompt.subjects, prompt.colours, prompt.boxes, strict=True
    ):
        left, top, right, bottom = (round(b * size[i % 2]) for i, b in enumerate(box))
        side = int(scale * min(right - left, bottom - top))
        cut_out = drawing(subject, HUES[colour] if colour else STYLES[prompt.style], side)
        free = right - left - side, bottom - top - side
        x, y = (rng.randint(0, f) if rng else f // 2 for f in free)
        if rng and rng.random() < 0.5:
            cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas.alpha_composite(cut_out, (left + x, top + y))
    image = to_tensor([canvas.convert("RGB")])[0]
    if rng:
        image = image + 0.04 * torch.randn(image.shape, generator=torch.manual_seed(rng.random()))
    return image.clamp(0, 1)


def test_the_convolution_is_the_smallest_error_of_all_places():
    torch.manual_seed(0)
    part, rgba = torch.rand(3, 7, 9), torch.rand(4, 4, 5, 5)
    cut_outs = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    expected = []
    for cut_out in (*rgba, *rgba.flip(-1)):
        errors = []
        for top in range(3):
            for left in range(5):
                whole = behind("pink").expand(3, 7, 9).clone()
                place = whole[:, top : top + 5, left : left + 5]
                place.copy_(cut_out[:3] * cut_out[3] + place * (1 - cut_out[3]))
                errors.append((part - whole).square().mean())
        expected.append(min(errors))
    expected = torch.stack(expected).view(2, 4).amin(0)
    torch.testing.assert_close(placed(part, cut_outs, "pink"), expected)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
def test_singles(size):
    rng = random.Random(0)
    for (subject, style), background in zip(KEYS * 2, [*BACKGROUNDS] * 2, strict=False):
        prompt = asked(subject, style=style, background=background)
        for image in (shown(prompt, size), shown(prompt, size, rng)):
            found = score(image, prompt, REFERENCES)
            assert found == dict.fromkeys(("right", "subject", "background", "clear"), True)
            other = rng.choice([each for each in SUBJECTS if each != subject])
            found = score(image, asked(other, style=style, background=background), REFERENCES)
            assert found == {
                "right": False, "subject": False, "background": True, "clear": False
            }  # fmt: skip
            of_any_style = replace(prompt, style=None, subjects=((other, subject),))
            assert score(image, of_any_style, REFERENCES)["right"]
            other = rng.choice([each for each in BACKGROUNDS if each != background])
            found = score(image, replace(prompt, background=other), REFERENCES)
            assert (found["right"], found["subject"], found["background"]) == (False, True, False)


def test_colours():
    rng = random.Random(1)
    for colour in HUES:
        for subject in SUBJECTS:
            prompt = asked(subject, colours=(colour,))
            right = score(shown(prompt, rng=rng), prompt, REFERENCES)
            assert right == dict.fromkeys(
                ("right", "subject", "background", "colour", "clear"), True
            )
            other = rng.choice([each for each in HUES if each != colour])
            image = shown(replace(prompt, colours=(other,)), rng=rng)
            assert score(image, prompt, REFERENCES)["colour"] is False
            other = rng.choice([each for each in SUBJECTS if each != subject])
            image = shown(asked(other, colours=(colour,)), rng=rng)
            found = score(image, prompt, REFERENCES)
            assert (found["right"], found["subject"], found["colour"]) == (False, False, True)
    # In its own colour, which was not asked for, it is still that thing.
    found = score(shown(asked("bar"), rng=rng), asked("bar", colours=("blue",)), REFERENCES)
    assert (found["right"], found["subject"], found["colour"]) == (False, True, False)


def test_colours_without_a_hue():
    for colour, level in (("black", 0.1), ("grey", 0.6), ("white", 0.98)):
        part = behind("blue").expand(3, 20, 20).clone()
        part[:, 5:15, 5:15] = level
        assert colour_of(part, "blue") == colour
    assert colour_of(behind("blue").expand(3, 20, 20), "blue") is None


def test_a_dark_orange_is_brown():
    for value, name in ((0.95, "orange"), (0.45, "brown")):
        part = behind("white").expand(3, 20, 20).clone()
        part[:, 5:15, 5:15] = torch.tensor(colorsys.hsv_to_rgb(0.07, 0.8, value))[:, None, None]
        assert colour_of(part, "white") == name


@pytest.mark.parametrize("boxes", [(LEFT, RIGHT), (TOP, BOTTOM)])
def test_two_subjects(boxes):
    size = (128, 64) if boxes[0] == LEFT else (64, 128)
    rng = random.Random(2)
    for first, second in combinations(SUBJECTS, 2):
        prompt = asked(first, second, boxes=boxes, background="yellow")
        right = score(shown(prompt, size, rng), prompt, REFERENCES)
        names = ("right", "subject", "background", "clear", "one of two")
        assert right == dict.fromkeys(names, True)
        swapped = shown(replace(prompt, subjects=prompt.subjects[::-1]), size, rng)
        found = score(swapped, prompt, REFERENCES)
        assert (found["right"], found["subject"], found["one of two"]) == (False, False, False)
        assert score(swapped, replace(prompt, any_order=True), REFERENCES)["right"]
        twice = shown(replace(prompt, subjects=prompt.subjects[:1] * 2), size, rng)
        for order in (False, True):
            found = score(twice, replace(prompt, any_order=order), REFERENCES)
            assert (found["right"], found["subject"], found["one of two"]) == (False, False, True)


def test_two_of_the_same_in_two_colours():
    prompt = asked("bar", "bar", colours=("red", "blue"), any_order=True)
    image = shown(prompt, (128, 64))
    assert score(image, prompt, REFERENCES)["right"]
    assert score(image.flip(-1), prompt, REFERENCES)["right"]
    assert not score(image.flip(-1), replace(prompt, any_order=False), REFERENCES)["right"]
    both = shown(replace(prompt, colours=("red", "red")), (128, 64))
    assert not score(both, prompt, REFERENCES)["right"]


@pytest.mark.parametrize("copies", [n for n in ROWS if n > 1])
def test_counts(copies):
    rng = random.Random(copies)
    size = (128, 64) if copies == 2 else (96, 96)
    for subject in SUBJECTS:
        prompt = asked(*[subject] * copies)
        image = shown(prompt, size, rng)
        right = score(image, prompt, REFERENCES)
        assert right == dict.fromkeys(("right", "subject", "count", "background", "clear"), True)
        for other in {*ROWS} - {1, copies}:
            found = score(image, asked(*[subject] * other), REFERENCES)
            assert found["right"] is False
        left, top, right, bottom = (round(b * size[i % 2]) for i, b in enumerate(prompt.boxes[-1]))
        image[:, top:bottom, left:right] = 1  # one of them is missing
        found = score(image, prompt, REFERENCES)
        assert (found["right"], found["count"]) == (False, False)
        wrong = asked(*[next(each for each in SUBJECTS if each != subject)] * copies)
        assert score(shown(wrong, size, rng), prompt, REFERENCES)["right"] is False


def test_a_rough_drawing_is_right_but_not_clear():
    prompt = asked("cross")
    image = shown(prompt)
    image[:, 8:24, :24] = image[:, 8:24, 40:] = image[:, 32, 32, None, None]
    found = score(image, prompt, REFERENCES)
    assert (found["right"], found["clear"]) == (True, False)


def test_small():
    for subject in SUBJECTS:
        prompt = asked(subject, small=True)
        small = shown(prompt, rng=random.Random(3), scale=0.5)
        names = ("right", "subject", "background", "small", "clear")
        assert score(small, prompt, REFERENCES) == dict.fromkeys(names, True)
        found = score(shown(prompt), prompt, REFERENCES)
        assert (found["right"], found["subject"], found["small"]) == (False, True, False)


def test_shares():
    prompts = [asked("bar", kind="a"), asked("bar", kind="b"), asked("bar", language="de")]
    scores = [{"right": n < 1, "subject": n < 2} for n in range(3)]
    found = {name: (e.value, e.n) for name, e in shares(prompts, scores, together=True).items()}
    assert found == {
        "all": (1 / 3, 3), "all, en": (0.5, 2), "all, de": (0, 1),
        "group": (1 / 3, 3), "group: subject": (2 / 3, 3), "group, a": (1, 1), "group, b": (0, 1),
    }  # fmt: skip
    assert [*found][:3] == ["all", "all, en", "all, de"]


def test_diversity():
    images = [torch.full((3, 64, 64), level) for level in (0.0, 0.3, 0.6, 0.5, 0.5, 0.5)]
    found = diversity(images, seeds=3)
    assert found.value == pytest.approx(((0.3 + 0.6 + 0.3) / 3 + 0) / 2)
    assert found.n == 2


def test_the_sheet_marks_what_is_right():
    prompts = [asked("bar"), asked("bar", language="ja")]
    images = [torch.zeros(3, 32, 64), torch.zeros(3, 64, 32)]
    sheet = marked_sheet(images, prompts, [{"right": True}, {"right": False}])
    red, green, _ = sheet.getpixel((0, 0))
    assert green > red
    red, green, _ = sheet.getpixel((sheet.width - 1, 0))
    assert red > green
    assert sheet.getpixel((20, 20)) == (0, 0, 0)


LINE = {"prompt": "two bars", "subjects": ["bar", ["bar", "ball"]], "style": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not JSON"),
        ([], "expected an object"),
        ({"subjects": None}, "subjects is empty"),
        ({"subjects": []}, "subjects is empty"),
        ({"subjects": ["bar", 1]}, "subjects are names"),
        ({"subjects": ["bar", [["bar"]]]}, "subjects are names"),
        ({"subjects": ["bar", "tree"]}, "the data set has no subject 'tree'"),
        ({"subjects": ["bar"] * 9}, "9 subjects need boxes"),
        ({"style": "oil"}, "the data set has no style 'oil'"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt must be text, not 3"),
        ({"places": 3}, "there is no key 'places', only prompt, group"),
        ({"background": "mauve"}, "'mauve' is not a colour"),
        ({"colours": ["mauve", None]}, "'mauve' is not a colour"),
        ({"colours": [["red"], None]}, "colours are names"),
        ({"colours": ["red"]}, "2 subjects need as many colours"),
        ({"boxes": [[0, 0, 1, 1]]}, "2 subjects need as many boxes"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, 2, 1]]}, r"boxes are \[left, top"),
        ({"boxes": [[0, 0, 1, 1], "ab"]}, r"boxes are \[left, top"),
        ({"boxes": [[0, 0, 1, 1], [0, 0]]}, r"boxes are \[left, top"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, 0.01, 1]]}, "a box must have at least a sixteenth"),
        ({"size": [64]}, r"size is \[width, height\]"),
        ({"any_order": 1}, "any_order must be true or false, not 1"),
    ],
)
def test_bad_prompt_files(tmp_path, change, message):
    path = tmp_path / "prompts.jsonl"
    line = change if isinstance(change, str) else json.dumps(change and LINE | change)
    path.write_text(f"{json.dumps(LINE)}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, line 2:? .*({message})") as raised:
        read_prompts(path, REFERENCES)
    assert "\n" not in str(raised.value)
    path.write_text(json.dumps(LINE), encoding="utf-8")
    (prompt,) = read_prompts(path, REFERENCES)
    assert prompt.subjects == (("bar",), ("bar", "ball"))
    assert prompt.boxes == ROWS[2]


@pytest.fixture(scope="module")
def known():
    """The names in the list of subjects that the pack comes with."""
    lines = emoji.POPULAR.read_text(encoding="utf-8").splitlines()
    return {line.split(" ", 1)[1].split(",")[0] for line in lines if not line.startswith("#")}


def test_prompts_by_hand_ask_for_what_there_is(known):
    entries = [json.loads(line) for line in BY_HAND.read_text(encoding="utf-8").splitlines()]
    prompts = [Prompt.of(entry) for entry in entries]
    assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 100
    assert {name for p in prompts for names in p.subjects for name in names} <= known
    assert {prompt.style for prompt in prompts} == {None, "3d", "flat", "noto"}
    languages = [prompt.language for prompt in prompts]
    assert 40 <= languages.count("en") <= 60
    assert len(set(languages)) == 10


def test_every_language_has_its_articles(known):
    header, *lines = prompt_groups.WITH_ARTICLES.read_text(encoding="utf-8").splitlines()
    _, *languages = header.split("\t")
    rows = [line.split("\t") for line in lines]
    assert len(languages) == 10
    assert {*languages} <= {*PHRASES}
    assert {len(row) for row in rows} == {11}
    assert all(cell.strip() == cell != "" for row in rows for cell in row)
    assert len({row[0] for row in rows}) == len(rows) >= 22
    assert {row[0] for row in rows} <= known


@pytest.mark.parametrize("group", prompt_groups.GROUPS)
def test_prompts_are_made_of_the_data_set(data, group):
    references, records = References.read(data), emoji.read_manifest(data)
    prompts = prompt_groups.made(records, references, group, 24, 0)
    if group == "held-out pairs":  # three subjects have too few pairs
        assert prompts == []
        return
    assert len(prompts) == 24
    assert prompts == prompt_groups.made(records, references, group, 24, 0)
    assert prompts != prompt_groups.made(records, references, group, 24, 1) or group.startswith(
        "held-out"
    )
    split = "held-out" if group == "held-out" else "train"
    of_split = {(r["subject"], r["style"]) for r in records if r["split"] == split}
    for prompt in prompts:
        subjects = [name for names in prompt.subjects for name in names]
        assert any((subject, prompt.style) in of_split for subject in subjects)
        named = {name for r in records for name in r["names"]["en"] if r["subject"] in subjects}
        text = prompt.prompt.casefold()
        nouns = {name.removeprefix("red ").split()[0] for name in named}
        if prompt.kind not in ("full width",) and prompt.language == "en":
            assert any(noun in " ".join(text.split()) for noun in nouns)
        if any(prompt.colours):
            assert prompt.colours[0] in text
        assert prompt.background in ("white", prompt.kind)
        assert len(prompt.subjects) == {"pairs": 2, "five": 5}.get(group, len(prompt.subjects))
        if group == "held-out colours":
            pair = coloured(subjects[0], prompt.colours[0])
            assert pair in held_out_combinations(sorted({r["subject"] for r in records}))
    kinds = {"variations": prompt_groups.VARIATIONS, "languages": range(10)}
    assert len({prompt.kind for prompt in prompts}) >= len(kinds.get(group, [0]))


def test_held_out_pairs_are_what_a_training_holds_out():
    subjects = [f"thing {i}" for i in range(30)]
    records = [
        {"subject": each, "style": style, "split": "train", "names": {"en": [each]}, "tone": None}
        for each in subjects
        for style in ("3d", "flat")
    ]
    apart = held_out_combinations(sorted(subjects))
    prompts = prompt_groups.made(records, None, "held-out pairs", 40, 0)
    assert len(prompts) == 40
    shown = [tuple(sorted(name for (name,) in prompt.subjects)) for prompt in prompts]
    assert set(shown) <= apart
    assert len(set(shown)) > 10
    trained = [
        composition for composition, _, split in plan(records, 500, [(64, 64)]) if split == "train"
    ]
    together = {tuple(sorted(c.subjects)) for c in trained if len(set(c.subjects)) == 2}
    assert together
    assert not together & set(shown)
