"""Composed pictures against pictures pasted by hand, and their captions."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data.emoji import captions
from tokenshuffle_core.data.emoji.build import LANGUAGES, read_manifest
from tokenshuffle_core.data.emoji.compose import Composition, arrange, render
from tokenshuffle_core.data.emoji.english import plural
from tokenshuffle_core.data.emoji.folder import build
from tokenshuffle_core.data.emoji.phrases import PHRASES
from tokenshuffle_core.data.emoji.pictures import BACKGROUNDS
from tokenshuffle_core.data.emoji.plan import KINDS
from tokenshuffle_core.data.sources import read_items

COLOURS = {"cat": (250, 0, 0, 255), "dog": (0, 0, 250, 255)}
PICTURES = {(name, "flat"): Image.new("RGBA", (40, 40), c) for name, c in COLOURS.items()}


def pixel(image: Image.Image, x: float, y: float) -> str:
    """The subject at a place (x, y as shares of the picture); "" for the background."""
    found = image.getpixel((int(x * image.width), int(y * image.height)))
    return next((name for name, colour in COLOURS.items() if found == colour[:3]), "")


@pytest.fixture(scope="module")
def composed(data, tmp_path_factory):
    """A copy of the data set with a hundred compositions, a third of the combinations held out."""
    copy = shutil.copytree(data, tmp_path_factory.mktemp("composed") / "data")
    build(copy, 100, held_out=0.34, seed=1)
    return copy


def bare(subject: str, colour: str | None) -> str:
    return captions.BARE.get(subject, {}).get("en", subject) if colour else subject


def entries_of(folder) -> list[dict]:
    text = (folder / "composed" / "metadata.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("kind", "subjects", "places"),
    [
        ("single", ("cat",), {(0.02, 0.02): "cat", (0.98, 0.98): "cat"}),
        ("count", ("cat",) * 2, {(0.25, 0.5): "cat", (0.75, 0.5): "cat", (0.5, 0.1): ""}),
        ("count", ("dog",) * 3, {(0.5, 0.2): "dog", (0.1, 0.2): "", (0.1, 0.9): "dog"}),
        ("count", ("dog",) * 4, {(0.1, 0.1): "dog", (0.9, 0.1): "dog", (0.1, 0.9): "dog"}),
        ("beside", ("cat", "dog"), {(0.25, 0.5): "cat", (0.75, 0.5): "dog", (0.5, 0.1): ""}),
        ("above", ("cat", "dog"), {(0.5, 0.25): "cat", (0.5, 0.75): "dog", (0.1, 0.5): ""}),
    ],
)
def test_subjects_are_where_the_kind_says(kind, subjects, places):
    image = render(arrange(kind, subjects, "flat", "green"), PICTURES, (64, 64))
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert {place: pixel(image, *place) for place in places} == places
    if "" in places.values():
        empty = next(place for place, subject in places.items() if not subject)
        assert image.getpixel((int(empty[0] * 64), int(empty[1] * 64))) == BACKGROUNDS["green"]


def test_a_cut_out_is_blended_without_a_fringe():
    """Transparent pixels are black underneath, which must not darken the edge."""
    disc = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    disc.paste((255, 255, 255, 255), (16, 16, 48, 48))
    image = render(arrange("count", ("x",) * 2, "3d", "white"), {("x", "3d"): disc}, (32, 32))
    assert image.getextrema() == ((255, 255),) * 3


def test_a_single_is_the_data_sets_own_picture(composed):
    records = {(r["subject"], r["style"]): r for r in read_manifest(composed)}
    singles = [entry for entry in entries_of(composed) if entry["kind"] == "single"]
    assert len(singles) >= 30
    for entry in singles:
        record = records[entry["subjects"][0], entry["style"]]
        cut_out = Image.open(composed / record["image"])
        canvas = Image.new("RGB", cut_out.size, BACKGROUNDS[entry["background"]])
        canvas.paste(cut_out, mask=cut_out)
        found = np.asarray(Image.open(composed / "composed" / entry["file_name"]), np.int16)
        assert np.abs(found - np.asarray(canvas, np.int16)).max() <= 1  # a blend's rounding


def test_the_folder_is_an_image_folder_that_training_reads(composed):
    items = read_items(composed / "composed")
    entries = {entry["file_name"]: entry for entry in entries_of(composed)}
    assert len(items) == len(entries) == 100
    for item in items:
        entry = entries[f"{item.key}.png"]
        assert list(item.captions) == entry["captions"]
        assert (item.split, item.repeats) == (entry["split"], entry["repeats"])
        composition = Composition.of(item.extra)
        assert composition.subjects == tuple(entry["subjects"])
        assert composition == arrange(
            composition.kind, composition.subjects, composition.style, composition.background,
            colours=composition.colours, extent=composition.extent, corners=composition.corners,
        )  # fmt: skip


def test_kinds_repeats_and_whites(composed):
    entries = entries_of(composed)
    assert Counter(e["kind"] for e in entries) == Counter(KINDS[i % len(KINDS)] for i in range(100))
    singles = [e for e in entries if e["kind"] == "single"]
    white = {(*e["subjects"], e["style"]) for e in singles if e["background"] == "white"}
    assert len(white) == len(read_manifest(composed))  # every picture, before any is coloured
    for e in entries:
        often = {"single": 8, "coloured": 2} if e["background"] == "white" else {}
        assert e["repeats"] == often.get(e["kind"], 1)
    assert len({e["background"] for e in singles}) > 5


def test_what_is_held_out_is_never_trained(composed):
    entries = entries_of(composed)
    pairs = {(r["subject"], r["style"]) for r in read_manifest(composed) if r["split"] != "train"}
    assert len(pairs) == 1
    for e in entries:
        shown = {(subject, e["style"]) for subject in e["subjects"]}
        if e["kind"] == "single":
            assert (e["split"] == "held-out") == bool(shown & pairs)
        else:
            assert not shown & pairs
    for kinds in (("count",), ("beside", "above", "corners"), ("coloured",)):
        combinations = {"train": set(), "held-out": set()}
        for e in entries:
            if e["kind"] in kinds:
                shown = sorted(e["subjects"]) + [c for c in e["colours"] if c]
                combinations[e["split"]].add(tuple(shown))
        assert len(combinations["train"]) > 0
        assert len(combinations["held-out"]) > 0
        assert not combinations["train"] & combinations["held-out"]


def test_more_pictures_only_add_to_fewer_and_nothing_is_made_twice(composed, tmp_path):
    copy = shutil.copytree(composed, tmp_path / "copy")
    before = entries_of(copy)
    lost = copy / "composed" / before[7]["file_name"]
    content = lost.read_bytes()
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("composed/*/*.png")}
    build(copy, 120, held_out=0.34, seed=1, workers=1)
    after = entries_of(copy)
    assert after[:100] == before
    assert len({entry["file_name"] for entry in after}) == 120
    assert lost.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert [e["subjects"] for e in before] != [e["subjects"] for e in entries_seeded(copy, 2)]


def entries_seeded(folder, seed) -> list[dict]:
    build(folder, 100, held_out=0.34, seed=seed)
    return entries_of(folder)


@pytest.mark.slow
def test_all_compositions_there_are_and_not_one_more(data, tmp_path):
    """Nine pictures, one of them held out, on ten backgrounds: 90 singles, 8 * 4 * 10 counts, 8 * 2
    * 10 small or big ones; two styles of three subjects and one of two make 6 + 6 + 2 ordered
    pairs, beside, above and in twelve pairs of corners, and 6 + 6 rows. A subject has ten colours,
    each on nine backgrounds."""
    copy = shutil.copytree(data, tmp_path / "copy")
    trained = [r for r in read_manifest(copy) if r["split"] == "train"]
    coloured = sum(bool(record["tone"]) for record in trained)
    assert coloured > 3
    total = 90 + 320 + 160 + (2 + 12) * 14 * 10 + 12 * 10 + 90 * coloured
    build(copy, total, workers=1)
    assert len({entry["file_name"] for entry in entries_of(copy)}) == total
    with pytest.raises(ValueError, match=f"{total + 1} compositions are more than the {total}"):
        build(copy, total + 1)


def test_every_caption_says_what_the_picture_shows(composed):
    names = {r["subject"]: r["names"] for r in read_manifest(composed)}
    languages = set()
    for entry in entries_of(composed):
        texts = entry["captions"]
        assert 12 <= len(texts) == len(set(texts)) <= 24
        assert texts[0] == captions.composed(
            entry["kind"],
            [bare(s, c) for s, c in zip(entry["subjects"], entry["colours"], strict=True)],
            entry["style"],
            entry["background"],
            colours=entry["colours"],
            extent=entry["extent"],
            corners=Composition.of(entry).corners,
        )
        named = 0
        for text in texts:
            said = [
                language
                for language in LANGUAGES
                if all(
                    any(
                        name in text or (plural(name) or name) in text
                        for name in [
                            *names[s][language],
                            *(
                                [captions.BARE[s][language]]
                                if colour and s in captions.BARE
                                else []
                            ),
                        ]
                    )
                    for s, colour in zip(entry["subjects"], entry["colours"], strict=True)
                )
            ]
            assert said, text
            languages |= set(said)
            known = [PHRASES[language] for language in said]
            named += any(entry["style"] in text or p.styles[entry["style"]] in text for p in known)
            for colour in filter(None, entry["colours"]):
                assert any(form in text for p in known for form in p.adjectives[colour]), text
            if entry["background"] != "white":
                colours = [p.backgrounds[entry["background"]] for p in known]
                assert any(c in text for c in [*colours, entry["background"]]), text
        assert named > 0
    assert languages == set(LANGUAGES)


def test_bad_settings_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="compositions must be at least 1, not 0"):
        build(data, 0)
    with pytest.raises(ValueError, match="white_repeats must be at least 1, not 0"):
        build(data, 1, white_repeats=0)
    with pytest.raises(ValueError, match="held_out must be"):
        build(data, 1, held_out=1)
    with pytest.raises(FileNotFoundError, match="tokenshuffle data emoji"):
        build(tmp_path, 1)


def test_the_command_composes(data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "copy")
    command = ["data", "emoji", str(copy), "--size", "32", "--held-out", "0.1"]
    subjects = ["--subjects", str(copy / "subjects.txt"), "--languages", "en,fr"]
    assert main([*command, *subjects, "--compositions", "20"]) == 0
    assert capsys.readouterr().out.split()[-1] == str(copy / "composed" / "metadata.jsonl")
    entries = entries_of(copy)
    assert len(entries) == 20
    assert any("style plat" in text for e in entries for text in e["captions"])
    assert not any("扁平" in text for e in entries for text in e["captions"])


@pytest.mark.parametrize(
    ("kind", "size", "pasted"),
    [
        ("single", (96, 64), {(16, 0, 64)}),
        ("beside", (128, 64), {(0, 0, 64), (64, 0, 64)}),
        ("beside", (96, 64), {(0, 8, 48), (48, 8, 48)}),
        ("beside", (64, 64), {(0, 16, 32), (32, 16, 32)}),
        ("above", (64, 128), {(0, 0, 64), (0, 64, 64)}),
        ("above", (64, 96), {(8, 0, 48), (8, 48, 48)}),
        ("above", (128, 64), {(48, 0, 32), (48, 32, 32)}),
    ],
)
def test_subjects_fill_squares_in_the_middle_of_their_boxes(kind, size, pasted):
    subjects = ("cat",) if kind == "single" else ("cat", "dog")
    expected = Image.new("RGB", size, BACKGROUNDS["green"])
    for subject, (left, top, side) in zip(subjects, sorted(pasted), strict=True):
        expected.paste(COLOURS[subject][:3], (left, top, left + side, top + side))
    image = render(arrange(kind, subjects, "flat", "green"), PICTURES, size)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_a_pair_often_has_the_size_that_suits_it(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    build(copy, 200, sizes=[(32, 32), (64, 32), (32, 64)], held_out=0)
    sizes: dict[str, Counter] = {}
    for entry in entries_of(copy):
        with Image.open(copy / "composed" / entry["file_name"]) as image:
            sizes.setdefault(entry["kind"], Counter())[image.size] += 1
    for kind, best in (("beside", (64, 32)), ("above", (32, 64))):
        assert sizes[kind].most_common(1)[0][0] == best
        assert 0.5 < sizes[kind][best] / sizes[kind].total() < 0.85  # 2/3 are expected


def test_singles_on_white_come_in_all_sizes(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    records = read_manifest(copy)
    sizes = [(64, 64), (96, 64), (64, 96)]
    wanted = (len(sizes) + len(BACKGROUNDS) - 1) * len(records)  # all singles
    build(copy, wanted, kinds=("single",), sizes=sizes, white_repeats=5)
    entries = entries_of(copy)
    assert len({entry["file_name"] for entry in entries}) == len(entries)
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for entry in entries:
        with Image.open(copy / "composed" / entry["file_name"]) as image:
            size = image.size
        assert size in sizes
        if entry["kind"] == "single" and entry["background"] == "white":
            found.setdefault((entry["subjects"][0], entry["style"]), []).append(size)
            assert entry["repeats"] == (5 if size == sizes[0] else 1)
    assert found.keys() == {(record["subject"], record["style"]) for record in records}
    assert all(sorted(of_one) == sorted(sizes) for of_one in found.values())


def test_colours_are_drawn_in_processes_while_torch_has_threads(data, tmp_path):
    """A fork of a process whose threads have computed: its own must not wait for them."""
    copy = shutil.copytree(data, tmp_path / "data")
    script = (
        "import sys, torch\n"
        "from tokenshuffle_core.data.emoji.folder import build\n"
        "torch.set_num_threads(4)\n"
        "torch.randn(1000, 1000) @ torch.randn(1000, 1000)\n"
        "torch.rand(10**6).sqrt().sum()\n"
        "build(sys.argv[1], 60, kinds=('coloured',), sizes=[(256, 256)])\n"
    )
    command = [sys.executable, "-c", script, str(copy)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run(command, check=True, timeout=100, capture_output=True, env=environment)
    assert len(list((copy / "composed" / "coloured").iterdir())) == 60
