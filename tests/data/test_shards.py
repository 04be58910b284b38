import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.support.pairs import (
    encoded,
    noise,
    write_folder,
    write_metadata,
    write_shards,
    write_tar,
)
from tokenshuffle_core import checkpoints
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data import CodeShards, extract, shards
from tokenshuffle_core.data.shards import fingerprint
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.presets import PRESETS

SIZES = [(32, 32), (48, 24), (24, 48)]
SHAPES = [(32, 32), (64, 64), (48, 24), (96, 48), (24, 48), (40, 30)]
BROKEN = {"02": b"just text", "09": encoded(noise(64, 64))[:900]}


def tokenizer_of(**changes) -> ImageTokenizer:
    torch.manual_seed(0)
    module = ImageTokenizer(replace(PRESETS["tiny"].image_tokenizer, **changes))
    torch.nn.init.normal_(module.quantizer.codebook.weight)
    return module


@pytest.fixture(scope="module")
def image_tokenizer() -> ImageTokenizer:
    return tokenizer_of()


@pytest.fixture(scope="module")
def tokenizer_file(image_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vq.safetensors"
    checkpoints.save_image_tokenizer(path, image_tokenizer)
    return path


def picture(i: int) -> Image.Image:
    return noise(*SHAPES[i % len(SHAPES)], seed=i)


@pytest.fixture
def source(tmp_path):
    """Thirteen pictures, of which two are broken."""
    names = [f"{i:02}" for i in range(13)]
    pairs = {
        f"{name}.png": (BROKEN.get(name) or encoded(picture(int(name))), [f"picture {name}", "any"])
        for name in names
    }
    return write_folder(tmp_path / "source", pairs)


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_codes_are_those_of_the_fitted_pictures(source, image_tokenizer, tmp_path):
    extract(source, tmp_path / "out", image_tokenizer, SIZES, shard_size=4, batch=2)
    reader = CodeShards(tmp_path / "out")
    readable = [i for i in range(13) if f"{i:02}" not in BROKEN]
    assert len(reader) == len(readable) == 11
    for index, i in enumerate(readable):
        scaled = picture(i)
        if SHAPES[i % len(SHAPES)] in ((64, 64), (96, 48)):
            scaled = scaled.resize(
                (scaled.width // 2, scaled.height // 2), Image.Resampling.LANCZOS
            )
        if scaled.size == (40, 30):  # the nearest is the square, its middle is what is kept
            box = (5, 0, 35, 30)
            scaled = scaled.resize((32, 32), Image.Resampling.LANCZOS, box)
        pixels = torch.from_numpy(np.array(scaled)).movedim(-1, 0)[None] / 255
        expected = image_tokenizer.encode(pixels)[0]
        assert torch.equal(reader.codes(index), expected)
        record = reader.record(index)
        assert record.pop("bucket") == list(scaled.size)
        assert record == {
            "key": f"{i:02}",
            "captions": [f"picture {i:02}", "any"],
            "repeats": 1,
            "split": "train",
            "extra": {},
        }
        (size,) = (size for size in SIZES if index in reader.indices[size])
        assert size == scaled.size
    assert sorted(torch.cat(list(reader.indices.values())).tolist()) == list(range(11))
    stored = safe_open(tmp_path / "out" / "codes-00000.safetensors", "pt").get_tensor("codes")
    assert stored.dtype == torch.int16


def test_broken_pictures_are_listed(source, image_tokenizer, tmp_path):
    summary = extract(source, tmp_path / "out", image_tokenizer, SIZES, shard_size=4)
    assert (summary.pictures, summary.broken, summary.written) == (11, 2, 4)
    lists = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.txt")}
    assert lists.keys() == {"broken-00000.txt", "broken-00002.txt"}
    assert lists["broken-00000.txt"].startswith("02\tpicture 02 is not a picture in BMP or")
    assert lists["broken-00002.txt"].startswith("09\tpicture 09 cannot be read: ")
    index = json.loads(summary.index.read_text())
    assert (index["pictures"], index["broken"], index["held_out"]) == (11, 2, 0)
    assert index["counts"] == {"32x32": 7, "48x24": 2, "24x48": 2}
    (source / "02.png").write_bytes(encoded(picture(2)))
    summary = extract(source, tmp_path / "out", image_tokenizer, SIZES, shard_size=4)
    assert (summary.pictures, summary.broken, summary.written, summary.kept) == (12, 1, 1, 3)
    assert not (tmp_path / "out" / "broken-00000.txt").exists()
    assert CodeShards(tmp_path / "out").record(2)["key"] == "02"


def test_a_shard_of_broken_pictures_only(image_tokenizer, tmp_path):
    members = {name: b"" for name in ("0.png", "0.txt", "1.png", "1.txt")}
    members |= {"0.txt": b"a", "1.txt": b"b", "1.png": encoded(picture(0))}
    source = write_tar(tmp_path / "set.tar", members)
    extract(source, tmp_path / "out", image_tokenizer, SIZES, shard_size=1)
    reader = CodeShards(tmp_path / "out")
    assert (len(reader), reader.record(0)["key"]) == (1, "1")
    assert reader.codes(0).shape == (8, 8)


def test_the_three_kinds_of_source_give_the_same_codes(image_tokenizer, tmp_path):
    pairs = {f"x/{i}.png": (encoded(picture(i)), [f"picture {i}"]) for i in range(6)}
    found = []
    for write in (write_folder, write_metadata, write_shards):
        source, directory = tmp_path / write.__name__, tmp_path / f"{write.__name__}-codes"
        extract(write(source, pairs), directory, image_tokenizer, SIZES)
        reader = CodeShards(directory)
        found.append([(reader.record(i), reader.codes(i).tolist()) for i in range(len(reader))])
    assert len(found[0]) == 6
    assert found[0] == found[1] == found[2]


def test_two_processes_make_what_one_makes(source, image_tokenizer, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    extract(source, one, image_tokenizer, SIZES, shard_size=3)
    arguments = (source, two, image_tokenizer, SIZES)
    first = extract(*arguments, shard_size=3, rank=1, world=2)
    assert (first.written, first.index) == (2, None)
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist: create or complete"):
        CodeShards(two)
    second = extract(*arguments, shard_size=3, rank=0, world=2)
    assert (second.written, second.kept, second.index) == (3, 0, two / "index.json")
    assert files_of(two) == files_of(one)


def test_an_index_never_names_shards_of_an_older_source(source, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    extract(source, out, image_tokenizer, SIZES, shard_size=7)
    for name in ("00", "12"):  # one in each of the two shards
        (source / f"{name}.txt").write_text("another caption")
    arguments = (source, out, image_tokenizer, SIZES)
    assert extract(*arguments, shard_size=7, rank=0, world=2).index is None
    assert not (out / "index.json").exists()
    assert extract(*arguments, shard_size=7, rank=1, world=2).index
    assert CodeShards(out).record(10)["captions"] == ["another caption"]


def test_an_interrupted_extraction_goes_on(source, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    extract(source, out, image_tokenizer, SIZES, shard_size=2)
    whole = files_of(out)
    paths = sorted(out.glob("codes-*"))
    paths[1].unlink()
    paths[2].write_bytes(whole[paths[2].name][:-7])
    flipped = bytearray(whole[paths[3].name])
    flipped[-1] ^= 1
    paths[3].write_bytes(flipped)
    paths[4].write_bytes(b"")
    (out / f".{paths[1].name}.abc.part").write_bytes(b"of a run that was killed")
    (out / "index.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in (paths[0], paths[5], paths[6])}
    summary = extract(source, out, image_tokenizer, SIZES, shard_size=2)
    assert (summary.written, summary.kept) == (4, 3)
    assert files_of(out) == whole
    assert all(path.stat().st_mtime_ns == written for path, written in times.items())


def test_what_changed_is_made_again(source, image_tokenizer, tmp_path):
    def made(tokenizer=image_tokenizer, sizes=SIZES, background="white") -> int:
        settings = {"background": background, "shard_size": 5}
        return extract(source, tmp_path / "out", tokenizer, sizes, **settings).written

    assert made() == 3
    assert made() == 0
    (source / "12.txt").write_text("another caption")
    assert made() == 1
    assert CodeShards(tmp_path / "out").record(10)["captions"] == ["another caption"]
    (source / "06.png").write_bytes(encoded(noise(48, 24)))
    assert made() == 1
    assert made(background="black") == 3
    assert made(sizes=SIZES[:1]) == 3
    assert made(tokenizer=tokenizer_of(codebook_size=32)) == 3
    (source / "00.png").unlink()
    assert made() == 3  # every chunk begins one later
    assert len(CodeShards(tmp_path / "out")) == 10


def test_the_reader_names_what_is_damaged(source, image_tokenizer, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    extract(source, whole, image_tokenizer, SIZES, shard_size=4)
    shard = "codes-00001.safetensors"
    content = (whole / shard).read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    other_caption = content.replace(b"picture 05", b"picture 77")
    assert other_caption != content
    other = (whole / "codes-00000.safetensors").read_bytes()
    for damaged in (flipped, other_caption, content[:-1], other, b"", None):
        shutil.copytree(whole, out)
        if damaged is None:
            (out / shard).unlink()
        else:
            (out / shard).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard} is (missing, )?damaged or"):
            CodeShards(out)
        if damaged in (flipped, other_caption):  # unverified, what a shard says of itself counts
            assert len(CodeShards(out, verify=False)) == 11
        else:
            with pytest.raises(ValueError, match=shard):
                CodeShards(out, verify=False)
        shutil.rmtree(out)
    (whole / "index.json").write_text('{"shards": {}}')
    with pytest.raises(ValueError, match=r"index\.json is not an index of code shards"):
        CodeShards(whole)


def test_codes_of_another_image_tokenizer(source, image_tokenizer, tmp_path):
    extract(source, tmp_path / "out", image_tokenizer, SIZES)
    reader = CodeShards(tmp_path / "out")
    reader.check(tokenizer_of())
    other = tokenizer_of()
    with torch.no_grad():
        other.quantizer.codebook.weight[5, 3] += 1e-3
    first, second = (each.state_dict().items() for each in (image_tokenizer, other))
    assert fingerprint(first) != fingerprint(second)
    with pytest.raises(ValueError, match="from another image tokenizer"):
        reader.check(other)


def test_a_large_codebook(source, tmp_path):
    large = tokenizer_of(codebook_size=40_000)
    extract(source, tmp_path / "out", large, [(32, 32)])
    reader = CodeShards(tmp_path / "out")
    pixels = torch.from_numpy(np.array(picture(0))).movedim(-1, 0)[None] / 255
    assert torch.equal(reader.codes(0), large.encode(pixels)[0])
    every = torch.stack([reader.codes(i) for i in range(len(reader))])
    assert every.max() > 2**15
    assert every.min() >= 0


def test_codes_stay_on_disk(source, image_tokenizer, tmp_path):
    extract(source, tmp_path / "out", image_tokenizer, SIZES)
    reader = CodeShards(tmp_path / "out")
    with open("/proc/self/maps") as file:
        assert str(tmp_path / "out" / "codes-00000.safetensors") in file.read()
    assert reader.codes(0).dtype == torch.int64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": []}, "sizes must contain at least one"),
        ({"sizes": [(32, 30)]}, "size 32x30 does not fit: .* multiples of 4"),
        ({"sizes": [(0, 32)]}, "size 0x32 does not fit"),
        ({"background": "rainbow"}, "background 'rainbow' is not a colour"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"rank": 2, "world": 2}, r"rank must be from 0 to 1 \(world - 1\), not 2"),
        ({"world": 0}, "world must be at least 1"),
    ],
)
def test_bad_settings(settings, message, source, image_tokenizer, tmp_path):
    settings = {"sizes": SIZES} | settings
    with pytest.raises(ValueError, match=message):
        extract(source, tmp_path / "out", image_tokenizer, **settings)
    assert not (tmp_path / "out").exists()


def test_records_that_no_header_holds(source, image_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "HEADER_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"codes-00000.* choose a smaller shard size"):
        extract(source, tmp_path / "out", image_tokenizer, SIZES)
    assert extract(source, tmp_path / "out", image_tokenizer, SIZES, shard_size=2).index


def codes_command(source, directory, tokenizer_file, *more) -> list[str]:
    arguments = ["data", "codes", source, "-o", directory, "--image-tokenizer", tokenizer_file]
    return [*map(str, arguments), "--device", "cpu", *more]


def test_the_command_shares_the_work_under_torchrun(
    source, tokenizer_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = codes_command(source, out, tokenizer_file, "--shard-size", "4", "--side", "32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 0
    found = capsys.readouterr()
    assert found.out == ""
    assert (
        "6 pictures in 2 new shards and 0 that were already complete, 2 left out: 2 cannot be read"
        in found.err
    )
    assert "shards of other processes are still missing" in found.err
    monkeypatch.setenv("RANK", "1")
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out / 'index.json'}\n"
    reader = CodeShards(out)
    assert (reader.sizes, len(reader)) == ([(32, 32)], 11)


def test_the_command_refuses(source, tokenizer_file, tmp_path, capsys):
    out = tmp_path / "out"
    wrong = {
        ("--sizes", "32"): "sizes must be like",
        ("--sizes", "32x32", "--max-ratio", "2"): "--max-ratio goes with --side",
        ("--side", "8"): "side must be at least 16 pixels",
        ("--side", "64", "--max-ratio", "0"): "max_ratio must be from 1 to 16",
        ("--background", "rainbow"): "background 'rainbow'",
    }
    for options, message in wrong.items():
        assert main(codes_command(source, out, tokenizer_file, *options)) == 2
        assert message in capsys.readouterr().err
    assert main(codes_command(tmp_path / "gone", out, tokenizer_file)) == 2
    assert "gone does not exist" in capsys.readouterr().err
    assert main(codes_command(source, out, source / "00.png")) == 2
    assert "00.png is not a readable safetensors file" in capsys.readouterr().err


def test_a_killed_extraction_leaves_no_half_shard(tokenizer_file, image_tokenizer, tmp_path):
    pairs = {f"{i:03}.png": (encoded(picture(i)), [f"{i}"]) for i in range(200)}
    source = write_folder(tmp_path / "source", pairs)
    extract(source, tmp_path / "whole", image_tokenizer, SIZES, shard_size=2)
    whole = files_of(tmp_path / "whole")
    out = tmp_path / "out"
    more = ("--sizes", "32x32,48x24,24x48", "--shard-size", "2")
    command = codes_command(source, out, tokenizer_file, *more)
    command = [sys.executable, "-m", "tokenshuffle_core", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (out / "codes-00003.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    left = {path.name: path.read_bytes() for path in out.glob("[!.]*")}
    assert 4 <= len(left) < 100
    assert left.items() <= whole.items()
    assert "index.json" not in left
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"and {len(left)} that were already complete" in result.stderr
    assert files_of(out) == whole


def test_a_full_disk_leaves_no_half_shard(source, tokenizer_file, tmp_path):
    """A limit on the size of files stands in for the disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = codes_command(source, tmp_path / "out", tokenizer_file)
    command = [sys.executable, "-m", "tokenshuffle_core", *command]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 2
    assert "codes-00000.safetensors cannot be written" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_a_share_is_held_out_and_stays_so(image_tokenizer, tmp_path):
    """Whether a picture is held out does not depend on the others; one marked so stays so."""
    pairs = {f"{i:03}.png": (encoded(noise(8, 8)), ["a"]) for i in range(200)}

    def held_out(count: int) -> set[str]:
        folder = write_folder(tmp_path / f"{count}", dict(list(pairs.items())[:count]))
        extract(folder, tmp_path / f"codes{count}", image_tokenizer, [(16, 16)], held_out=0.2)
        codes = CodeShards(tmp_path / f"codes{count}")
        records = [codes.record(i) for i in range(count)]
        found = {record["key"] for record in records if record["split"] == "held-out"}
        assert codes.index["held_out"] == len(found)
        return found

    some, more = held_out(100), held_out(200)
    assert 20 <= len(more) <= 60
    assert some == {key for key in more if int(key) < 100}
    with pytest.raises(ValueError, match="held_out must be at least 0 and below 1, not 1"):
        extract(tmp_path / "100", tmp_path / "x", image_tokenizer, [(16, 16)], held_out=1)
