"""Compositions encoded on a device against the same ones drawn by Pillow, saved and extracted."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tokenshuffle_core import checkpoints
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.config import PRESETS
from tokenshuffle_core.data import CodeShards, extract
from tokenshuffle_core.data.emoji.build import read_manifest
from tokenshuffle_core.data.emoji.codes import Composer, encoders, extract_compositions
from tokenshuffle_core.data.emoji.compose import Composition, build, plan, render
from tokenshuffle_core.data.emoji.pictures import BACKGROUNDS
from tokenshuffle_core.image_tokenizer import ImageTokenizer

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
        noise = Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8))
        noise.resize((32, 32), Image.Resampling.BICUBIC).save(path)
        records[i] = record | {"split": "train"}
    pictures = {
        (r["subject"], r["style"]): Image.open(tmp_path / r["image"]).convert("RGBA")
        for r in records
    }
    planned = plan(records, 60, [size])
    planned[0] = (
        Composition("single", *list(vars(planned[0][0]).values())[1:4], ((0.1, 0.2, 0.7, 0.8),)),
        *planned[0][1:],
    )
    shown = [composition for composition, *_ in planned]
    assert {len(composition.subjects) for composition in shown} == {1, 2, 3, 4}
    drawn = Composer(tmp_path, records, planned, CPU)(shown, size)
    assert drawn.shape == (60, 3, size[1], size[0])
    for picture, composition in zip(drawn, shown, strict=True):
        expected = np.asarray(render(composition, pictures, size), np.float32)
        np.testing.assert_array_equal((picture * 255).round().movedim(0, -1), expected)


def test_jitter_moves_and_shrinks_single_subjects(data, image_tokenizer, tmp_path):
    extract_compositions(data, 100, tmp_path / "plain", image_tokenizer, [(64, 32)])
    for name, seed in (("jitter", 0), ("again", 0), ("other", 1)):
        extract_compositions(
            data, 100, tmp_path / name, image_tokenizer, [(64, 32)], jitter=True, seed=seed
        )
    assert files_of(tmp_path / "jitter") == files_of(tmp_path / "again")
    boxes = {}
    for name in ("plain", "jitter", "other"):
        records = records_of(tmp_path / name)
        singles = [r["extra"]["boxes"] for r in records if r["extra"]["kind"] == "single"]
        several = [r["extra"]["boxes"] for r in records if r["extra"]["kind"] != "single"]
        boxes[name] = [each for (each,) in singles], several
    assert boxes["jitter"][1] == boxes["plain"][1]
    assert boxes["jitter"][0] != boxes["other"][0]
    sides, places = Counter(), set()
    for left, top, right, bottom in boxes["jitter"][0]:
        pixels = [64 * left, 32 * top, 64 * right, 32 * bottom]
        assert pixels == pytest.approx([round(x) for x in pixels])
        assert 16 <= pixels[0] < pixels[2] <= 48  # the square in the middle
        assert 0 <= pixels[1] < pixels[3] <= 32
        sides[round(pixels[2] - pixels[0])] += 1
        assert pixels[2] - pixels[0] == pytest.approx(pixels[3] - pixels[1])
        places.add((left, top))
    assert sides.keys() == {32, 30, 28, 26}
    assert len(places) > 10


def test_a_jittered_subject_is_where_its_box_says(data):
    records = read_manifest(data)
    flat = next(r for r in records if r["style"] == "flat")  # a red disc on nothing
    composition = Composition(
        "single", (flat["subject"],), "flat", "green", ((0.5, 0.25, 0.75, 0.75),)
    )
    planned = [(composition, (64, 32), "train")]
    (drawn,) = Composer(data, records, planned, CPU)([composition], (64, 32))
    green = torch.tensor(BACKGROUNDS["green"]).view(3, 1, 1) / 255
    changed = (drawn != green).any(0).nonzero()
    assert changed.amin(0).tolist() >= [8, 32]
    assert changed.amax(0).tolist() < [24, 48]
    assert drawn[:, 16, 40].tolist() == [1, 0, 0]


def test_a_share_has_the_first_size(data):
    records = [r | {"split": "train"} for r in read_manifest(data)]
    sizes = [(32, 32), (64, 32), (32, 64)]
    shares = {}
    for share in (None, 0.0, 0.6, 1.0):
        planned = plan(records, 400, sizes, held_out=0, first_share=share)
        several = [size for composition, size, _ in planned if len(composition.subjects) > 1]
        shares[share] = several.count((32, 32)) / len(several)
        whites = Counter(
            size for c, size, _ in planned if (c.kind, c.background) == ("single", "white")
        )
        assert whites == dict.fromkeys(sizes, len(records))  # of each picture in each size
    assert shares[0.0] == 0
    assert shares[1.0] == 1
    assert shares[0.6] == pytest.approx(0.6, abs=0.08)
    assert shares[None] < 0.5
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
    # The shards with the twenty singles, which come last.
    assert extract_compositions(*arguments, shard_size=20, jitter=True)[2:4] == (2, 1)
    two = tmp_path / "two"
    for rank in (1, 0):
        extract_compositions(
            *arguments[:2], two, image_tokenizer, shard_size=20, jitter=True, rank=rank, world=2
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
    more = ["--compositions", "30", "--sizes", "64x64,96x64", "--jitter", "--first-share", "0.7"]
    more += ["--white-repeats", "5", "--seed", "3", "--device", "cpu"]
    assert main([*command, *more, "-o", str(tmp_path / "command")]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "command" / "index.json")
    assert "30 pictures in 1 new shards" in printed.err
    extract_compositions(
        data, 30, tmp_path / "function", image_tokenizer, [(64, 64), (96, 64)],
        first_share=0.7, white_repeats=5, jitter=True, seed=3,
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
        (["--compositions", "9", "--white-repeats", "0"], "white_repeats must be at least 1"),
        (["--jitter"], "--jitter is for compositions: add --compositions"),
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
