"""Compositions encoded on a device against the same ones drawn by Pillow, saved and extracted."""

import itertools
import json
import random
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tokenshuffle_core import checkpoints
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data import CodeShards, extract
from tokenshuffle_core.data.emoji.build import read_manifest
from tokenshuffle_core.data.emoji.codes import Composer, encoders, extract_compositions
from tokenshuffle_core.data.emoji.compose import Composition, arrange, render, square_in
from tokenshuffle_core.data.emoji.folder import build
from tokenshuffle_core.data.emoji.pictures import BACKGROUNDS, stacked
from tokenshuffle_core.data.emoji.plan import Jitter, plan
from tokenshuffle_core.data.emoji.recolour import tone_of
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.presets import PRESETS

SIZES = [(64, 64), (96, 64), (64, 96)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    module = ImageTokenizer(PRESETS["tiny"].image_tokenizer).eval()
    torch.nn.init.normal_(module.quantizer.codebook.weight)
    return module


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def records_of(directory) -> list[dict]:
    shards = CodeShards(directory)
    return [shards.record(i) for i in range(len(shards))]


def test_it_makes_what_pictures_on_disk_make(data, image_tokenizer, tmp_path):
    """The same records in the same order, and the same codes but for the rounding of batches."""
    copy = shutil.copytree(data, tmp_path / "data")
    build(copy, 150, sizes=SIZES, white_repeats=3, seed=4)
    expected, found = tmp_path / "expected", tmp_path / "found"
    extract(copy / "composed", expected, image_tokenizer, SIZES, held_out=0.2)
    settings = {"white_repeats": 3, "seed": 4, "held_out": 0.2, "shard_size": 40, "batch": 7}
    summary = extract_compositions(data, 150, found, image_tokenizer, SIZES, **settings)
    assert summary[:4] == (150, 0, 4, 0)
    assert records_of(found) == records_of(expected)
    assert len({tuple(record["bucket"]) for record in records_of(found)}) == 3
    first, second = CodeShards(expected), CodeShards(found)
    codes = [torch.cat([s.codes(i).flatten() for i in range(150)]) for s in (first, second)]
    assert (codes[0] != codes[1]).float().mean() < 0.001
    assert codes[0].unique().numel() > 20
    for index in (first.index, second.index):
        del index["shards"]
    assert first.index == second.index


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (50, 90)])
def test_pictures_are_pillows(data, size, tmp_path):
    """Every pixel, also where edges are half transparent and subjects are scaled."""
    records = read_manifest(data)
    # Alpha of every strength, over colours.
    rng = np.random.default_rng(0)
    for i, record in enumerate(records):
        path = tmp_path / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (8, 8, 4), np.uint8)
        noise[..., :3] = noise[..., :3] // 8 + np.roll(np.uint8([210, 20, 40]), i)
        noise = Image.fromarray(noise)
        noise.resize((32, 32), Image.Resampling.BICUBIC).save(path)
        tone = tone_of(stacked([Image.open(path)])[0])
        records[i] = record | {"split": "train", "tone": tone}
    pictures = {
        (r["subject"], r["style"]): Image.open(tmp_path / r["image"]).convert("RGBA")
        for r in records
    }
    planned = plan(records, 60, [size])
    first, *rest = planned[0]
    moved = {"boxes": ((0.1, 0.2, 0.7, 0.8),), "mirrored": (True,)}
    planned[0] = (replace(first, **moved), *rest)
    planned = planned[:50] + [
        (replace(c, mirrored=(True, *c.mirrored[1:])), *rest) for c, *rest in planned[50:]
    ]
    shown = [composition for composition, *_ in planned]
    assert {len(composition.subjects) for composition in shown} >= {1, 2, 3, 4}
    assert sum(any(composition.colours) for composition in shown) > 5
    drawn = Composer(tmp_path, records, planned, CPU)(shown, size)
    assert drawn.shape == (60, 3, size[1], size[0])
    for picture, composition in zip(drawn, shown, strict=True):
        expected = np.asarray(render(composition, pictures, size), np.float32)
        np.testing.assert_array_equal((picture * 255).round().movedim(0, -1), expected)


def test_jitter_moves_shrinks_and_mirrors(data, image_tokenizer, tmp_path):
    for name, share, seed in (("plain", 0, 0), ("jitter", 1, 0), ("again", 1, 0), ("other", 1, 1)):
        extract_compositions(
            data, 160, tmp_path / name, image_tokenizer, [(128, 64)], jitter=share, seed=seed
        )
    assert files_of(tmp_path / "jitter") == files_of(tmp_path / "again")
    plain, found, other = (records_of(tmp_path / name) for name in ("plain", "jitter", "other"))
    assert Counter(r["extra"]["kind"] for r in found) == Counter(r["extra"]["kind"] for r in plain)
    assert [r["extra"]["boxes"] for r in found] != [r["extra"]["boxes"] for r in other]
    assert not any(any(record["extra"]["mirrored"]) for record in plain)
    mirrored = [each for record in found for each in record["extra"]["mirrored"]]
    assert 0.1 < sum(mirrored) / len(mirrored) < 0.5
    step = image_tokenizer.config.stride
    sides, places = Counter(), set()
    for record in found:
        shown = Composition.of(record["extra"])
        for left, top, right, bottom in shown.boxes:
            pixels = [128 * left, 64 * top, 128 * right, 64 * bottom]
            assert pixels == pytest.approx([round(x) for x in pixels])
            assert 0 <= pixels[0] < pixels[2] <= 128
            assert 0 <= pixels[1] < pixels[3] <= 64
            if shown.boxes != ((0, 0, 1, 1),) and shown.kind == "single":
                assert all(round(x) % step == 0 for x in pixels)
                side = round(pixels[2] - pixels[0])
                assert side == round(pixels[3] - pixels[1])
                sides[side] += 1
                places.add((left, top))
    assert sides.keys() == {64, 56, 48}
    assert len(places) > 20


def test_jittered_subjects_stay_in_their_boxes():
    """And apart, so that they can be drawn at once."""
    rng, jitter = random.Random(0), Jitter(1.0, 8)
    for size in ((128, 128), (256, 128), (128, 256)):
        for kind, count in (("count", 5), ("count", 3), ("row", 3), ("beside", 2), ("corners", 2)):
            corners = (0, 3) if kind == "corners" else ()
            subjects = ("cat",) * 5 if kind == "count" else ("cat", "dog", "owl")
            shown = arrange(kind, subjects[:count], "flat", "white", corners=corners)
            found = set()
            for _ in range(20):
                moved = jitter(shown, size, rng)
                found.add(moved.boxes)
                for old, new in zip(shown.boxes, moved.boxes, strict=True):
                    assert old[0] - 1e-9 <= new[0] < new[2] <= old[2] + 0.03
                    assert old[1] - 1e-9 <= new[1] < new[3] <= old[3] + 0.03
                squares = [square_in(box, size) for box in moved.boxes]
                for (x, y, side), (u, v, other) in itertools.combinations(squares, 2):
                    assert x + side <= u or u + other <= x or y + side <= v or v + other <= y
            assert len(found) > 3


def test_writing_is_not_mirrored():
    rng, jitter = random.Random(0), Jitter(1.0, 8)
    for subject, some in (("police car", False), ("cat", True)):
        shown = arrange("single", (subject,), "3d", "white")
        moved = [jitter(shown, (128, 128), rng) for _ in range(40)]
        assert any(any(each.mirrored) for each in moved) == some


def test_a_jittered_subject_is_where_its_box_says(data):
    records = read_manifest(data)
    flat = next(r for r in records if r["style"] == "flat")  # a red disc on nothing
    composition = replace(
        arrange("coloured", (flat["subject"],), "flat", "green", colours=("blue",)),
        boxes=((0.5, 0.25, 0.75, 0.75),),
    )
    planned = [(composition, (64, 32), "train")]
    (drawn,) = Composer(data, records, planned, CPU)([composition], (64, 32))
    green = torch.tensor(BACKGROUNDS["green"]).view(3, 1, 1) / 255
    changed = (drawn != green).any(0).nonzero()
    assert changed.amin(0).tolist() >= [8, 32]
    assert changed.amax(0).tolist() < [24, 48]
    red, _, blue = drawn[:, 16, 40].tolist()
    assert blue > 0.8 > 2 * red


def test_a_share_has_the_first_size(data):
    records = [r | {"split": "train"} for r in read_manifest(data)]
    sizes = [(32, 32), (64, 32), (32, 64)]
    shares = {}
    for share in (None, 0.0, 0.6, 1.0):
        planned = plan(records, 400, sizes, held_out=0, first_share=share)
        for several in (False, True):
            drawn = [
                size
                for composition, size, _ in planned
                if composition.kind != "single" and (len(composition.subjects) > 1) == several
            ]
            shares[share, several] = drawn.count((32, 32)) / len(drawn)
        whites = Counter(
            size for c, size, _ in planned if (c.kind, c.background) == ("single", "white")
        )
        assert whites == dict.fromkeys(sizes, len(records))  # of each picture in each size
    assert shares[0.0, False] == 0
    assert shares[1.0, False] == 1
    assert shares[0.6, False] == pytest.approx(0.6, abs=0.1)
    # Several subjects have the most room in the wide size, or two above each other in the high one.
    assert shares[0.0, True] < 0.2
    assert shares[1.0, True] == pytest.approx(0.5, abs=0.15)
    assert shares[None, True] < 0.5
    with pytest.raises(ValueError, match="first_share must be from 0 to 1, not 2"):
        plan(records, 4, sizes, first_share=2)


def test_what_is_complete_is_kept_and_what_changed_is_made_again(data, image_tokenizer, tmp_path):
    copy, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    arguments = copy, 50, out, image_tokenizer
    extract_compositions(*arguments, shard_size=20)
    whole = files_of(out)
    (out / "codes-00001.safetensors").unlink()
    (out / "index.json").unlink()
    assert extract_compositions(*arguments, shard_size=20)[:4] == (50, 0, 1, 2)
    assert files_of(out) == whole
    picture = copy / read_manifest(copy)[0]["image"]
    Image.new("RGBA", (32, 32), (1, 2, 3, 255)).save(picture)
    assert extract_compositions(*arguments, shard_size=20)[:4] == (50, 0, 3, 0)
    assert extract_compositions(*arguments, shard_size=20, jitter=0.5)[2] > 0
    two = tmp_path / "two"
    for rank in (1, 0):
        extract_compositions(
            *arguments[:2], two, image_tokenizer, shard_size=20, jitter=0.5, rank=rank, world=2
        )
    assert files_of(two) == files_of(out)


def test_half_precision_changes_few_codes(data):
    """The device's arithmetic, here on the CPU, with the bundled weights."""
    bundled = checkpoints.load_image_tokenizer(checkpoints.BUNDLED).eval()
    records = read_manifest(data)
    planned = plan(records, 6, [(64, 64)])
    images = Composer(data, records, planned, CPU)([each[0] for each in planned], (64, 64))
    half, _ = encoders(bundled, torch.device("cuda"))
    with torch.inference_mode():
        codes, finite = half(images)
        expected = bundled.encode(images)
    assert finite
    assert (codes == expected).float().mean() > 0.98
    assert not torch.equal(expected[0], expected[1])


def test_pictures_that_half_precision_cannot_hold_are_encoded_in_single(
    data, image_tokenizer, tmp_path, monkeypatch
):
    """Weights whose maps exceed 65,504 before they are normalised."""
    with torch.no_grad():
        image_tokenizer.encoder.conv_in.weight *= 1e6
    extract_compositions(data, 20, tmp_path / "single", image_tokenizer)
    module = "tokenshuffle_core.data.emoji.codes"
    half, _ = encoders(image_tokenizer, torch.device("cuda"))
    single = encoders(image_tokenizer, CPU)
    monkeypatch.setattr(f"{module}.encoders", lambda *_: [half, *single])
    extract_compositions(data, 20, tmp_path / "found", image_tokenizer)
    with torch.no_grad():
        image_tokenizer.encoder.conv_in.weight /= 1e6
    assert files_of(tmp_path / "found") == files_of(tmp_path / "single")


@pytest.fixture(scope="module")
def tokenizer_file(image_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vq.safetensors"
    checkpoints.save_image_tokenizer(path, image_tokenizer)
    return path


def test_the_command(data, image_tokenizer, tokenizer_file, tmp_path, capsys):
    command = ["data", "codes", str(data), "--image-tokenizer", str(tokenizer_file)]
    more = [
        "--compositions",
        "30",
        "--sizes",
        "64x64,96x64",
        "--jitter",
        "0.5",
        "--first-share",
        "0.7",
    ]
    more += ["--white-repeats", "5", "--seed", "3", "--device", "cpu"]
    assert main([*command, *more, "-o", str(tmp_path / "command")]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "command" / "index.json")
    assert "30 pictures in 1 new shards" in printed.err
    extract_compositions(
        data, 30, tmp_path / "function", image_tokenizer, [(64, 64), (96, 64)],
        first_share=0.7, white_repeats=5, jitter=0.5, seed=3,
    )  # fmt: skip
    assert files_of(tmp_path / "command") == files_of(tmp_path / "function")
    # By default, those of `data emoji --compositions`.
    assert main([*command, "--compositions", "20", "-o", str(tmp_path / "plain")]) == 0
    expected = [composition for composition, *_ in plan(read_manifest(data), 20, [(32, 32)])]
    found = [Composition.of(record["extra"]) for record in records_of(tmp_path / "plain")]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert json.loads((tmp_path / "plain" / "index.json").read_text())["sizes"] == ["32x32"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compositions", "0"], "number of compositions must be at least 1, not 0"),
        (["--compositions", "99999"], "are more than the"),
        (["--compositions", "9", "--sizes", "33x32"], "size 33x32 does not fit"),
        (["--compositions", "9", "--side", "64"], "--side is not for compositions: leave it out"),
        (["--compositions", "9", "--background", "red"], "--background is not for compositions"),
        (["--compositions", "9", "--batch", "0"], "batch must be at least 1, not 0"),
        (["--compositions", "9", "--jitter", "2"], "share that is jittered must be from 0 to 1"),
        (["--compositions", "9", "--white-repeats", "0"], "white_repeats must be at least 1"),
        (["--jitter", "0.5"], "--jitter is for compositions: add --compositions"),
        (["--seed", "0"], "--seed is for compositions: add --compositions"),
    ],
)
def test_the_command_refuses(options, message, data, tokenizer_file, tmp_path, capsys):
    command = ["data", "codes", str(data), "--image-tokenizer", str(tokenizer_file)]
    assert main([*command, *options, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_command_needs_a_data_set(tokenizer_file, tmp_path, capsys):
    command = ["data", "codes", str(tmp_path), "--image-tokenizer", str(tokenizer_file)]
    assert main([*command, "--compositions", "9", "-o", str(tmp_path / "out")]) == 2
    assert "tokenshuffle data emoji" in capsys.readouterr().err
