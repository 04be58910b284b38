"""`generate --prompts`: as one prompt at a time, whatever the processes and the crashes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tokenshuffle_core.bulk import share
from tokenshuffle_core.cli.main import main

LINES = [
    {"prompt": "a red apple"},
    {"prompt": "a cat", "seed": 77},
    {"prompt": "", "file": "any.png"},
    {"prompt": "a red apple", "width": 48, "cfg": 3.0, "negative": "a cat"},
    {"prompt": "a dog", "width": 48, "cfg": 3.0, "negative": "a cat"},
    {"prompt": "a cat", "schedule": "constant", "temperature": 0.5, "top_k": 3, "top_p": 0.9},
]
FILES = ["00000.png", "00001.png", "any.png", "00003.png", "00004.png", "00005.png"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(*arguments) -> int:
    return main(["generate", *map(str, arguments)])


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_each_line_is_the_picture_of_one_command(prompts, tiny, tmp_path):
    out = tmp_path / "out"
    assert run("--prompts", prompts, "-o", out, "--model", tiny, "--seed", 5, "--batch", 4) == 0
    assert sorted(path.name for path in out.glob("*.png")) == sorted(FILES)
    for i, (line, name) in enumerate(zip(LINES, FILES, strict=True)):
        alone = tmp_path / name
        options = {"seed": 5 + i} | {k: v for k, v in line.items() if k not in ("prompt", "file")}
        flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
        assert run(line["prompt"], "-o", alone, "--model", tiny, *flags) == 0
        assert pixels(out / name) == pixels(alone)
        with Image.open(out / name) as image:
            about = json.loads(image.text["tokenshuffle"])
        assert (about["prompt"], about["seed"]) == (line["prompt"], options["seed"])


def test_what_is_drawn_is_kept(prompts, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--prompts", prompts, "-o", out, "--model", tiny) == 0
    whole = {name: pixels(out / name) for name in FILES}
    kept = (out / "00000.png").stat().st_mtime_ns
    for name in ("any.png", "00004.png"):
        (out / name).unlink()
    capsys.readouterr()
    assert run("--prompts", prompts, "-o", out, "--model", tiny, "--batch", 2) == 0
    assert "2 pictures drawn, 4 kept" in capsys.readouterr().err
    assert {name: pixels(out / name) for name in FILES} == whole
    assert (out / "00000.png").stat().st_mtime_ns == kept
    assert run("--prompts", prompts, "-o", out, "--model", tiny, "--cfg", 3) == 2
    assert "other prompts, another model, seed or setting" in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_item_belongs_to_one_process(world):
    assert [i for rank in range(world) for i in share(range(6), rank, world)] == list(range(6))


def test_processes_and_a_crash(tiny, tmp_path):
    """Two processes, one of them killed in the middle, and both again: every picture is there."""
    prompts, out = tmp_path / "many.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": f"a cat {i}"}) + "\n" for i in range(24)))

    def start(rank: int, world: int = 2, output=out, batch: int = 1) -> subprocess.Popen:
        command = [sys.executable, "-m", "tokenshuffle_core", "generate", "--prompts", str(prompts)]
        command += ["-o", str(output), "--model", str(tiny), "--batch", str(batch)]
        own = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=os.environ | own)

    first, second = start(0), start(1)
    deadline = time.monotonic() + 120
    while len(list(out.glob("0001*.png")) + list(out.glob("0002*.png"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert first.wait(120) == 0
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert len(made) < 24
    for process in [start(0), start(1)]:
        assert process.wait(120) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert len(after) == 24
    assert made.items() <= after.items()
    alone = tmp_path / "alone"
    assert start(0, world=1, output=alone, batch=5).wait(120) == 0
    assert all(pixels(out / name) == pixels(alone / name) for name in after)


@pytest.mark.parametrize("option", [("--count", 2), ("--negative", "x"), ("--tiled",)])
def test_options_of_one_prompt(option, prompts, tiny, tmp_path, capsys):
    assert run("--prompts", prompts, "-o", tmp_path / "o", "--model", tiny, *option) == 2
    assert "work with one prompt" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert run("--prompts", tmp_path / "no.jsonl", "-o", tmp_path / "out") == 2
    assert "no.jsonl does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
