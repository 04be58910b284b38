"""`generate`: what is drawn stays, what is there stays, whatever happens to the process."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.loras import write_random_lora
from tokenshuffle_core import bulk, load
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.pipeline import Pipeline

COMMAND = [sys.executable, "-m", "tokenshuffle_core", "generate"]


@pytest.fixture
def generate(tiny):
    def run(*arguments) -> int:
        return main(["generate", "--model", str(tiny), *map(str, arguments)])

    return run


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def about(path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["tokenshuffle"])


# many pictures


def test_pictures_in_batches_are_those_of_one_by_one(generate, pipeline, tmp_path):
    for name, batch in (("fit", ()), ("two", ("--batch", 2))):
        codes = tmp_path / f"{name}.npy"
        many = "a cat", "-o", tmp_path / f"{name}.png", "--seed", 7, "--save-codes", codes
        assert generate(*many, "--count", 5, *batch) == 0
    for i in range(5):
        alone = pipeline.generate("a cat", seed=7 + i)
        for name in ("fit", "two"):
            expected = (alone.images * 255).byte().numpy().tobytes()
            assert pixels(tmp_path / f"{name}-{i + 1}.png") == expected
            assert np.array_equal(np.load(tmp_path / f"{name}.npy")[i], alone.codes[0])


def test_a_batch_that_does_not_fit_is_halved(pipeline, tmp_path, capsys):
    """Of what draws, only the memory is made up: it takes three pictures."""

    sizes = []

    class Small(Pipeline):
        def sample(self, prompts, *arguments, **options):
            sizes.append(len(prompts))
            if len(prompts) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().sample(prompts, *arguments, **options)

    small, settings = Small(**vars(pipeline)), pipeline.config.generation
    jobs = [bulk.Job("a cat", i, tmp_path / f"{i}.png", settings) for i in range(6)]
    drawn = [job for job, _ in bulk.draw_all(small, jobs)]
    assert drawn == jobs
    assert sizes == [6, 3, 3]
    for job in jobs:
        images = pipeline.generate("a cat", settings=settings, seed=job.seed).images
        assert pixels(job.path) == (images * 255).byte().numpy().tobytes()
    with pytest.raises(ValueError, match="to draw 4 pictures at once: choose a smaller --batch"):
        list(bulk.draw_all(small, jobs, 4))


def test_larger_pictures_are_fewer_at_once(pipeline):
    def at_once(side: int) -> int:
        return bulk.fitting(pipeline, replace(pipeline.config.generation, width=side, height=side))

    assert 1 <= at_once(128) <= at_once(32) <= bulk.MOST
    assert 0 < bulk.free_memory(torch.device("cpu")) < 2**50


def test_a_limit_of_memory_is_what_is_free():
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    if sys.platform != "linux":
        pytest.skip("only Linux says how much of it is used")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    try:
        limit = pages * resource.getpagesize() + 300 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
        free = bulk.free_memory(torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert 200 * 2**20 < free <= 300 * 2**20


def test_ctrl_c_keeps_what_is_drawn_and_a_second_start_draws_the_rest(tiny, generate, tmp_path):
    """While it runs, names come out as pictures are saved."""
    count, out = 2000, tmp_path / "m.png"
    command = [*COMMAND, "a cat", "-o", str(out), "--model", str(tiny), "--batch", "2"]
    process = subprocess.Popen(
        [*command, "--count", str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for number in range(1, 5):
        assert process.stdout.readline() == f"{tmp_path / f'm-{number}.png'}\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    there = sorted(tmp_path.glob("m-*.png"))
    assert 4 <= len(there) < count
    assert f"{len(there)} of {count} pictures are there: --skip-existing" in errors
    assert errors.endswith("interrupted\n")
    assert sorted(tmp_path.iterdir()) == there
    made = {path: path.stat().st_mtime_ns for path in there}
    total = len(there) + 3
    more = "a cat", "-o", out, "--count", total
    assert generate(*more) == 2
    assert generate(*more, "--skip-existing") == 0
    whole = sorted(tmp_path.glob("m-*.png"))
    assert len(whole) == total
    assert all(path.stat().st_mtime_ns == made[path] for path in there)
    assert [about(tmp_path / f"m-{i + 1}.png")["seed"] for i in range(total)] == [*range(total)]


@pytest.mark.slow
def test_killed_ten_times_each_picture_is_there_once(tmp_path):
    chance, count = random.Random(0), 150
    command = [*COMMAND, "cat", "-o", str(tmp_path / "k.png"), "--skip-existing"]
    started, times = time.monotonic(), {}
    for _ in range(10):
        process = subprocess.Popen([*command, "--count", str(count)], stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(2, 8))
        process.kill()
        process.wait()
        for path in tmp_path.glob("k-*.png"):
            assert times.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert subprocess.run([*command, "--count", str(count)]).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"k-{i + 1}.png" for i in range(count)}
    expected = load().generate("cat", count=1, seed=count - 1).images[0]
    assert pixels(tmp_path / f"k-{count}.png") == (expected * 255).byte().numpy().tobytes()
    assert all(about(tmp_path / f"k-{i + 1}.png")["seed"] == i for i in range(count))
    assert time.monotonic() - started < 600


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_thousand_pictures_in_little_memory(tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4_500_000 * 1024,) * 2)

    command = [*COMMAND, "cat", "-o", str(tmp_path / "k.png"), "--count", "1000"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, preexec_fn=limit).returncode == 0
    assert len(list(tmp_path.iterdir())) == 1000


# files that are there


def test_nothing_is_overwritten_unasked(generate, tmp_path, capsys):
    output = tmp_path / "a.png"
    assert generate("a cat", "-o", output) == 0
    first, made = output.read_bytes(), output.stat().st_mtime_ns
    for other in ([], ["--seed", 1]):
        assert generate("a cat", "-o", output, *other) == 2
        assert "a.png exists: --overwrite replaces it, --skip-existing" in capsys.readouterr().err
    assert generate("a cat", "-o", output, "--skip-existing") == 0
    assert output.stat().st_mtime_ns == made
    for other in (["--seed", 1], ["--negative", "x"], ["--cfg", 3], ["--weights", "int8"]):
        assert generate("a cat", "-o", output, "--skip-existing", *other) == 2
        assert "a.png exists and was not drawn by this command" in capsys.readouterr().err
    assert output.read_bytes() == first
    assert generate("a cat", "-o", output, "--overwrite", "--seed", 1) == 0
    assert about(output)["seed"] == 1
    (tmp_path / "c.npy").write_text("mine")
    assert generate("a cat", "-o", tmp_path / "b.png", "--save-codes", tmp_path / "c.npy") == 2
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("junk", ["empty", "text", "cut", "other"])
def test_only_a_whole_picture_of_the_same_request_counts_as_drawn(
    junk, prompts, generate, tmp_path, capsys
):
    def again() -> int:
        if prompts:
            return generate("--prompts", tmp_path / "p.txt", "-o", tmp_path / "out")
        many = "--count", 3, "--skip-existing"
        return generate("a cat", "-o", tmp_path / "out" / "a.png", *many)

    (tmp_path / "p.txt").write_text("a cat\na cat\na cat\n")
    (tmp_path / "out").mkdir()
    assert again() == 0
    *_, damaged = sorted((tmp_path / "out").glob("*.png"))
    whole = damaged.read_bytes()
    content = {"empty": b"", "text": b"just text", "cut": whole[: len(whole) // 2]}
    if junk == "other":
        Image.new("RGB", (32, 32)).save(damaged)
    else:
        damaged.write_bytes(content[junk])
    before = damaged.read_bytes()
    capsys.readouterr()
    foreign = junk == "other" or (junk != "empty" and not prompts)
    assert again() == (2 if foreign else 0)
    errors = capsys.readouterr().err
    if foreign:
        assert "exists and was not drawn by this command" in errors
        assert damaged.read_bytes() == before
    else:
        assert f"{damaged.name} is not a whole picture: drawn again" in errors
        assert damaged.read_bytes() == whole


def test_a_folder_of_other_pictures_is_not_filled(generate, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "out").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "out" / "00000.png")
    many = "--prompts", tmp_path / "p.txt", "-o", tmp_path / "out"
    assert generate(*many) == 2
    assert "00000.png exists and was not drawn" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.png"]
    assert generate(*many, "--overwrite") == 0
    assert about(tmp_path / "out" / "00000.png")["prompt"] == "a cat"


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_outputs_that_are_not_files_are_refused_before_drawing(generate, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "link.png").symlink_to("folder.png")
    (tmp_path / "gone.png").symlink_to("nowhere/a.png")
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(tmp_path.iterdir())
    for name, message in (
        ("folder", "is a folder: give a file"),
        ("link", "is a folder: give a file"),
        ("null", "is a device or a pipe, not a file"),
        ("pipe", "is a device or a pipe, not a file"),
        ("gone", "nowhere does not exist"),
        ("x" * 252, "File name too long"),
    ):
        started = "--overwrite", "--model", "no such model"  # refused before that is looked for
        assert generate("a", "-o", tmp_path / f"{name}.png", *started) == 2
        assert message in capsys.readouterr().err, name
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "p.txt").write_text("a")
    assert generate("--prompts", tmp_path / "p.txt", "-o", tmp_path / "p.txt") == 2
    assert "is a file: --prompts needs a folder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="links")
@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_a_link(there, generate, tmp_path):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "b.png").write_text("old")
    link = tmp_path / "a.png"
    link.symlink_to("disk/b.png")
    assert generate("a cat", "-o", link, *(["--overwrite"] if there else [])) == 0
    assert link.is_symlink()
    assert about(tmp_path / "disk" / "b.png")["prompt"] == "a cat"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["b.png"]


@pytest.mark.parametrize("name", ["红" * 83, "x" * 251])
def test_a_name_as_long_as_the_file_system_takes(name, generate, tmp_path):
    assert generate("a", "-o", tmp_path / f"{name[: 251 // len(name[0].encode())]}.png") == 0
    assert len(list(tmp_path.iterdir())) == 1


# small wishes


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp"])
def test_other_formats_say_the_same(suffix, generate, tmp_path):
    prompt = "红苹果 🍎"
    many = prompt, "--count", 2, "--seed", 2**64 - 1
    assert generate(*many, "-o", tmp_path / "a.png") == 0
    assert generate(*many, "-o", tmp_path / f"a.{suffix}") == 0
    assert generate(*many, "-o", tmp_path / f"a.{suffix}", "--skip-existing") == 0
    with Image.open(tmp_path / "a-2.png") as png, Image.open(tmp_path / f"a-2.{suffix}") as other:
        assert other.format == {"webp": "WEBP"}.get(suffix, "JPEG")
        comment = other.getexif().get_ifd(0x8769)[0x9286]  # EXIF's UserComment
        assert comment[:8] == b"ASCII\0\0\0"
        assert json.loads(comment[8:]) == json.loads(png.text["tokenshuffle"])
        assert png.size == other.size
        if suffix == "webp":
            assert png.tobytes() == other.convert("RGB").tobytes()


def test_a_picture_that_its_format_cannot_hold_is_refused_first(generate, tmp_path, capsys):
    long = "a" + "\u3000" * 9_999
    for suffix, code in (("jpg", 2), ("png", 0)):
        assert generate(long, "--negative", long, "-o", tmp_path / f"a.{suffix}") == code
    assert "too long to be saved in a JPEG" in capsys.readouterr().err


def test_a_random_seed_is_printed_and_draws_the_same_again(generate, tmp_path, capsys):
    seeds = []
    for name in "ab":
        assert generate("a", "-o", tmp_path / f"{name}.png", "--seed", -1) == 0
        seeds.append(int(re.search(r"^seed (\d+)$", capsys.readouterr().err, re.MULTILINE)[1]))
    assert seeds[0] != seeds[1]
    assert generate("a", "-o", tmp_path / "c.png", "--seed", seeds[0]) == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_processes_that_share_prompts_share_a_seed(generate, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "p.txt").write_text("a\nb\n")
    many = "--prompts", tmp_path / "p.txt", "-o", tmp_path / "out", "--seed", -1
    assert generate(*many) == 2
    assert "--seed -1 works in one process" in capsys.readouterr().err


def test_a_lora_may_have_an_equals_sign_in_its_name(tiny, generate, tmp_path, capsys):
    plain, equals = tmp_path / "lora.safetensors", tmp_path / "epoch=3.safetensors"
    write_random_lora(plain, tiny)
    equals.write_bytes(plain.read_bytes())
    for number, text in enumerate((plain, equals, f"{plain}=0.5", f"{equals}=0.5")):
        output = tmp_path / f"{number}.png"
        assert generate("a", "-o", output, "--lora", text, "--width", 16, "--height", 16) == 0
    one, same, half, as_half = (pixels(tmp_path / f"{number}.png") for number in range(4))
    assert (one, half) == (same, as_half)
    assert one != half
    assert about(tmp_path / "3.png")["lora"] == [["epoch=3.safetensors", 0.5]]
    assert generate("a", "-o", tmp_path / "x.png", "--lora", tmp_path / "no=3.safetensors") == 2
    assert "no=3.safetensors does not exist" in capsys.readouterr().err
