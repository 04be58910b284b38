"""A recipe of stages against the same trainings by separate `train model` commands."""

import cProfile
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenshuffle_core import checkpoints
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data.extraction import extract
from tokenshuffle_core.data.shards import Shard
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training.stages import parse_stages, read_stages

RECIPE = """
preset = "tiny"
image_tokenizer = "{image_tokenizer}"
batch = 4
warmup = 1
codes = "{codes}"
context_noise = 0.5

[generation]
cfg = 3.0

[[stage]]
name = "first"
windows = [1]
steps = 6
learning_rate = 1e-3

[[stage]]
name = "second"
windows = [2, 4]
window_mix = [0.75, 0.25]
window_head = 8
steps = {steps}
learning_rate = 5e-4
z_loss = 1e-4
freeze = ["text_embedding"]
"""


def write(path: Path, codes, image_tokenizer, steps: int = 4) -> str:
    path.write_text(RECIPE.format(codes=codes, image_tokenizer=image_tokenizer, steps=steps))
    return str(path)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def equal(one: Path, other: Path) -> bool:
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_stages_are_trainings_one_after_another(codes, image_tokenizer, tmp_path, capsys):
    recipe, out = write(tmp_path / "r.toml", codes, image_tokenizer), tmp_path / "run"
    assert main(["train", "stages", recipe, "-o", str(out)]) == 0
    final = out / "second" / "final.safetensors"
    assert capsys.readouterr().out.strip() == str(final)
    common = ["--batch", "4", "--warmup", "1", "--context-noise", "0.5"]
    by_hand = tmp_path / "first", tmp_path / "second"
    first = (
        f"train model {codes} -o {by_hand[0]} --image-tokenizer {image_tokenizer} --preset tiny "
        "--windows 1 --steps 6 --learning-rate 1e-3"
    )
    second = (
        f"train model {codes} -o {by_hand[1]} --init {by_hand[0]}/final.safetensors --windows 2,4 "
        "--window-mix 0.75,0.25 --window-head 8 --steps 4 --learning-rate 5e-4 --z-loss 1e-4 "
        "--freeze text_embedding"
    )
    for arguments in (first, second):
        assert main([*arguments.split(), *common]) == 0
    for folder in by_hand:
        assert equal(folder / "final.safetensors", out / folder.name / "final.safetensors")
    pipeline = load(final)
    assert pipeline.config.model.windows == (2, 4)
    assert pipeline.config.generation.cfg == 3

    made = final.stat().st_mtime_ns
    assert main(["train", "stages", recipe, "-o", str(out)]) == 0
    assert final.stat().st_mtime_ns == made
    shutil.rmtree(out / "second")
    assert main(["train", "stages", recipe, "-o", str(out)]) == 0
    assert equal(final, by_hand[1] / "final.safetensors")
    text = Path(recipe).read_text()
    Path(recipe).write_text(text.replace("steps = 6", "steps = 5"))
    shutil.rmtree(out / "first")
    assert main(["train", "stages", recipe, "-o", str(out)]) == 2
    assert "or the stages before it were" in capsys.readouterr().err
    Path(recipe).write_text(text)
    changed = write(tmp_path / "r.toml", codes, image_tokenizer, steps=5)
    assert main(["train", "stages", changed, "-o", str(out)]) == 2
    assert "was started with another recipe" in capsys.readouterr().err


def hashed(*arguments) -> int:
    """How many shards a command computes the checksum of, by its profile."""
    with cProfile.Profile() as profile:
        assert main(list(map(str, arguments))) == 0
    code = Shard.sha256.fget.__code__
    return sum(entry.callcount for entry in profile.getstats() if entry.code is code)


def test_every_shard_is_verified_once(composed, image_tokenizer, tmp_path):
    codes, images = tmp_path / "codes", checkpoints.load_image_tokenizer(image_tokenizer)
    assert extract(composed, codes, images, [(32, 32)], shard_size=10).written == 3
    recipe = write(tmp_path / "r.toml", codes, image_tokenizer)
    assert hashed("train", "stages", recipe, "-o", tmp_path / "stages") == 3
    model = ("--image-tokenizer", image_tokenizer, "--preset", "tiny", "--steps", 2, "--batch", 2)
    assert hashed("train", "model", codes, "-o", tmp_path / "model", *model) == 3


def test_a_damaged_shard_of_a_later_stage_is_refused_at_once(
    codes, image_tokenizer, tmp_path, capsys
):
    damaged = shutil.copytree(codes, tmp_path / "damaged")
    flip_last_byte(damaged / "codes-00000.safetensors")
    recipe = write(tmp_path / "r.toml", codes, image_tokenizer)
    text = Path(recipe).read_text().replace('"second"', f'"second"\ncodes = "{damaged}"')
    Path(recipe).write_text(text)
    assert main(["train", "stages", recipe, "-o", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"stage second: {damaged / 'codes-00000.safetensors'} is damaged" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_recipe_goes_on_where_it_was(codes, image_tokenizer, tmp_path):
    recipe = write(tmp_path / "r.toml", codes, image_tokenizer, steps=40)
    text = Path(recipe).read_text().replace("batch = 4", "batch = 4\nsave_minutes = 0")
    Path(recipe).write_text(text)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", "stages", recipe, "-o", str(whole)]) == 0
    command = (
        "import torch, sys; torch.set_num_threads(1); from tokenshuffle_core.cli import main; "
    )
    command += "sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "train", "stages", recipe, "-o", str(broken)]
    )
    deadline = time.monotonic() + 60
    while not any((broken / "second" / "state").glob("000001*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["train", "stages", recipe, "-o", str(broken)]) == 0
    for name in ("first", "second"):
        final = f"{name}/final.safetensors"
        assert equal(whole / final, broken / final)


def test_one_checkpoint_grows_in_size_and_window(composed, image_tokenizer, tmp_path):
    images = checkpoints.load_image_tokenizer(image_tokenizer)
    lines = ['preset = "tiny"', f'image_tokenizer = "{image_tokenizer}"', "batch = 2", "steps = 2"]
    for side, window in ((16, 1), (32, 2), (64, 4)):
        extract(composed, tmp_path / f"{side}", images, [(side, side)])
        lines += ["[[stage]]", f'name = "at-{side}"', f'codes = "{tmp_path}/{side}"']
        lines += [f"windows = [{window}]"]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    assert (
        main(["train", "stages", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "run")]) == 0
    )
    for side, window in ((16, 1), (32, 2), (64, 4)):
        pipeline = load(tmp_path / "run" / f"at-{side}" / "final.safetensors")
        assert pipeline.config.model.windows == (window,)
        assert pipeline.generate("a red apple").images.shape == (1, side, side, 3)


def test_only_what_changes_the_outcome_must_stay(codes, image_tokenizer, tmp_path):
    recipe, out = write(tmp_path / "r.toml", codes, image_tokenizer), str(tmp_path / "run")
    assert main(["train", "stages", recipe, "-o", out]) == 0
    free = Path(recipe).read_text().replace("batch = 4", "batch = 4\nsave_minutes = 3")
    Path(recipe).write_text(free)
    assert main(["train", "stages", recipe, "-o", out]) == 0


def test_the_first_stage_may_start_from_a_checkpoint(codes, image_tokenizer, tmp_path):
    out = tmp_path / "run"
    first = write(tmp_path / "r", codes, image_tokenizer)
    assert main(["train", "stages", first, "-o", str(out)]) == 0
    lines = [
        f'init = "{out}/first/final.safetensors"', 'text_tokenizer = "new"', "vocabulary = 450",
        "[[stage]]", f'codes = "{codes}"', "steps = 2", "batch = 2",
    ]  # fmt: skip
    (tmp_path / "next.toml").write_text("\n".join(lines))
    again = tmp_path / "again"
    assert main(["train", "stages", str(tmp_path / "next.toml"), "-o", str(again)]) == 0
    shape = load(again / "1" / "final.safetensors").config.model
    assert shape.windows == (1,)
    assert shape.text_vocabulary <= 450


STAGE = {"codes": "codes", "steps": 3}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, r"at least one \[\[stage\]\]"),
        ({"stage": [{"steps": 3}]}, "stage 1 needs codes"),
        ({"stage": [{"codes": "x"}]}, "stage 1 needs steps"),
        ({"stage": [STAGE | {"stepz": 3}]}, "stage 1 has no key 'stepz', only .*steps"),
        ({"stage": [STAGE | {"steps": 0}]}, "stage 1: steps must be at least 1"),
        ({"stage": [STAGE | {"steps": "many"}]}, "stage 1: steps must be a whole number"),
        ({"stage": [STAGE | {"name": "a"}] * 2}, "different names, not a, a"),
        ({"stage": [STAGE], "preset": "huge"}, "preset must be one of .*tiny.*, not 'huge'"),
        ({"stage": [STAGE], "model": {"depth": 3}}, r"\[model\] has no key 'depth'"),
        ({"stage": [STAGE], "model": {"dim": 30}}, "dim 30 must be"),
        ({"stage": [STAGE], "generation": {"cfg": -1}}, "cfg must be"),
        ({"stage": [STAGE], "init": "a", "image_tokenizer": "b"}, "init has its own"),
        ({"stage": [STAGE | {"windows": 2}]}, "windows must be a list, each a whole number, not 2"),
        ({"stage": [STAGE | {"freeze": [1]}]}, r"freeze must be a list, each text, not \[1\]"),
        ({"stage": [STAGE | {"name": "../x"}]}, "stage name '../x'"),
        ({"stage": [STAGE | {"name": ".."}]}, "stage name '..'"),
        ({"stage": [1]}, "stage 1 must be a table, not 1"),
        ({"stage": [STAGE], "model": 3}, r"\[model\] must be a table, not 3"),
        ({"stage": [STAGE], "model": {"rope_theta": "x"}}, "rope_theta must be a number"),
        ({"stage": [STAGE], "generation": {"cfg": "x"}}, "cfg must be a number, not 'x'"),
        ({"stage": [STAGE], "preset": ["a"]}, r"preset must be one of .*, not \['a'\]"),
        ({"stage": [STAGE], "init": 5}, "init must be text, not 5"),
        ({"stage": [STAGE], "init": "a", "model": {}}, "init has its own model"),
        ({"stage": [STAGE], "card": {"title": 3}}, "card must be a table of texts"),
    ],
)
def test_recipes_that_make_no_sense(recipe, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(recipe)


def test_files_that_are_no_recipe(tmp_path, capsys):
    missing = tmp_path / "none.toml"
    assert main(["train", "stages", str(missing), "-o", str(tmp_path / "run")]) == 2
    assert f"{missing} does not exist" in capsys.readouterr().err
    broken = tmp_path / "broken.toml"
    broken.write_text("[[stage]\n")
    assert main(["train", "stages", str(broken), "-o", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert str(broken) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 100_000) + " = 1", "[" + ".".join("a" * 100_000) + "]",
        ".".join("a" * 900) + " = 1", "a = " + "[" * 50_000, "a = " + "{a=" * 30_000,
        f"steps = {'9' * 4000}\n[[stage]]\ncodes = 'x'", f"steps = {'9' * 5000}",
        "a = 'x'\n" * 10**6,
        f"{'k' * 100_000} = 1\n[[stage]]\ncodes = 'x'\nsteps = 1", f"preset = '{'p' * 100_000}'",
        "[[stage]]\ncodes = 'x'\nsteps = 1\nlearning_rate = inf", "\0", "preset = 'tiny'\n\ud800",
    ],
    ids=range(13),
)  # fmt: skip
def test_a_recipe_that_is_made_to_harm(text, tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"r\.toml: ") as refused:
        read_stages(path)
    assert time.monotonic() - started < 3
    assert len(str(refused.value)) < 3000


def test_a_recipe_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.toml").write_text("[[stage]]\ncodes = 'x'\nsteps = 1", encoding="utf-8-sig")
    assert len(read_stages(tmp_path / "r.toml").stages) == 1


def test_later_stages_are_checked_before_the_first_begins(codes, image_tokenizer, tmp_path, capsys):
    recipe = write(tmp_path / "r.toml", codes, image_tokenizer)
    text, out = Path(recipe).read_text(), tmp_path / "run"
    for change, message in (
        (("windows = [2, 4]", "windows = [3, 4]"), "stage second: dim 32 must be a multiple of"),
        (("windows = [2, 4]", "windows = [2, 16]"), "stage second: dim 32 must be a multiple"),
        (
            ('name = "second"', f'name = "second"\ncodes = "{tmp_path}/no"'),
            "no/index.json does not",
        ),
        (
            ('name = "second"', 'name = "second"\nbatch = 3\naccumulation = 2'),
            "stage second: batch",
        ),
        (
            ('freeze = ["text_embedding"]', 'freeze = ["transformers"]'),
            "stage second: freeze: the model has no part 'transformers'",
        ),
        (
            ("window_mix = [0.75, 0.25]", "window_mix = [0.5, 0.3, 0.2]"),
            "stage second: window_mix has 3 shares for the windows 2, 4",
        ),
    ):
        Path(recipe).write_text(text.replace(*change))
        assert main(["train", "stages", recipe, "-o", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(codes, image_tokenizer, tmp_path):
    recipe, one, two = write(tmp_path / "r.toml", codes, image_tokenizer), tmp_path / "1", tmp_path
    assert main(["train", "stages", recipe, "-o", str(one)]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["tokenshuffle_core", "train", "stages", recipe, "-o", str(two), "--device", "cpu"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name in ("first", "second"):
        expected, found = (load_file(d / name / "final.safetensors") for d in (one, two))
        for key, weight in expected.items():
            # A step is a gradient divided by its own size: where that is nearly zero, the order of
            # a sum shows.
            torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_group_of_processes_refuses_damaged_codes(codes, image_tokenizer, tmp_path):
    """Process 0 detects the damage, and the other one neither continues nor waits."""
    damaged = shutil.copytree(codes, tmp_path / "damaged")
    flip_last_byte(damaged / "codes-00000.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["tokenshuffle_core", "train", "model", damaged, "-o", tmp_path / "run"]
    command += ["--image-tokenizer", image_tokenizer, "--device", "cpu", "--preset", "tiny"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert "codes-00000.safetensors is damaged" in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("tokenshuffle:")]
    assert len(said) == 1 or "another process cannot use the codes" in done.stderr
    assert "RuntimeError" not in done.stderr
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()


def test_the_paper_recipe_is_one():
    recipe = read_stages(Path(__file__).parents[2] / "recipes" / "paper.toml")
    assert [stage.windows for stage in recipe.stages] == [(1,), (2,), (2,)]
    assert recipe.preset.model.dim == 3072
    tokens = [stage.loop.steps * stage.loop.batch * codes for stage, codes in zip(
        recipe.stages, (32**2, 64**2, 128**2), strict=True
    )]  # fmt: skip
    assert tokens == pytest.approx([50e9, 2e12, 300e9], rel=0.05)
    assert all(stage.recipe.context_noise == 0 for stage in recipe.stages)
    assert [stage.recipe.z_loss > 0 for stage in recipe.stages] == [False, False, True]
