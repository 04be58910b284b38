"""Stages that train a LoRA, against the same trainings by separate commands."""

import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenshuffle_core.checkpoints import read
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data.shards import CodeShards
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training.model import LoraTask
from tokenshuffle_core.training.stages import parse_stages

SHARED = ["--batch=4", "--warmup=1", "--context-noise=0", "--learning-rate=1e-2", "--steps=6"]
RECIPE = """
init = "{init}"
codes = "{codes}"
batch = 4
warmup = 1
context_noise = 0
learning_rate = 1e-2
steps = 6

[[stage]]
name = "a"
lora = 4

[[stage]]
name = "b"
lora = 2

[[stage]]
name = "c"
windows = [4]
"""
LICENCE = "modelspec.license"


@pytest.fixture(scope="module")
def init(pipeline, codes, image_tokenizer, tmp_path_factory) -> Path:
    """A trained model, whose card has a licence."""
    folder = tmp_path_factory.mktemp("init")
    (folder / "card.json").write_text(f'{{"{LICENCE}": "CC0", "modelspec.title": "Tiny"}}')
    start = [
        "--preset",
        "tiny",
        "--image-tokenizer",
        image_tokenizer,
        "--card",
        folder / "card.json",
    ]
    assert main([*map(str, ("train", "model", codes, "-o", folder / "run", *start)), *SHARED]) == 0
    return folder / "run" / "final.safetensors"


@pytest.fixture
def recipe(init, codes, tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(init=init, codes=codes))
    return path


def equal(one: Path, other: Path) -> bool:
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_each_stage_starts_with_the_loras_before_it(
    recipe, init, codes, tmp_path, monkeypatch, capsys
):
    """The first stage alone, interrupted and resumed; then the others, by hand as well."""
    command = ["train", "stages", str(recipe), "-o", str(tmp_path / "run")]
    text = recipe.read_text()
    recipe.write_text(text.split('[[stage]]\nname = "b"')[0])
    whole = LoraTask.loss

    def interrupted(task, module, step, *pieces):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return whole(task, module, step, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(LoraTask, "loss", interrupted)
        assert main(command) == 130
    assert {path.name for path in (tmp_path / "run/a/state").iterdir()} == {"0000005"}
    lora = tmp_path / "run/a/final.safetensors"
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(lora)
    written = lora.stat().st_mtime_ns
    recipe.write_text(text)
    assert main(command) == 0
    assert lora.stat().st_mtime_ns == written

    def by_hand(name: str, start: Path, *options: str) -> Path:
        folder = tmp_path / name
        arguments = ["train", "model", str(codes), "-o", str(folder), "--init", str(start)]
        assert main([*arguments, *options, *SHARED]) == 0
        return folder / "final.safetensors"

    def merged(start: Path, lora: Path) -> Path:
        output = lora.parent / "merged.safetensors"
        arguments = ["merge", "--model", str(start), "--lora", str(lora), "-o", str(output)]
        assert main(arguments) == 0
        return output

    a = by_hand("a", init, "--lora", "4")
    with_a = merged(init, a)
    b = by_hand("b", with_a, "--lora", "2")
    with_b = merged(with_a, b)
    c = by_hand("c", with_b, "--windows", "4")
    for path in (a, b, c):
        assert equal(path, tmp_path / "run" / path.parent.name / path.name), path
    cards = [read(path).card for path in (init, with_a, with_b, c)]
    assert {card[LICENCE] for card in cards} == {"CC0"}
    assert [card["modelspec.title"] for card in cards] == ["Tiny", *["Made from Tiny"] * 3]
    made = [card.get("modelspec.description", "") for card in cards]
    assert all(later.startswith(earlier) for earlier, later in pairwise(made))
    index = CodeShards(codes).index
    assert made[-1] == (
        f"Made from Tiny: merged with a LoRA, merged with a LoRA, grown to window 4, trained on "
        f"{index['pictures'] - index['held_out']} pictures"
    )
    assert read(tmp_path / "run/c/final.safetensors").card == cards[-1]


def test_quantised_weights_are_refused_before_anything_is_written(recipe, init, tmp_path, capsys):
    small = load(init)
    quantize(small.model, "int8")
    small.save(tmp_path / "small.safetensors")
    recipe.write_text(recipe.read_text().replace(str(init), str(tmp_path / "small.safetensors")))
    assert main(["train", "stages", str(recipe), "-o", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "weights are int8: only 16- or 32-bit ones can be changed" in line
    assert not (tmp_path / "run").exists()


STAGE = {"codes": "codes", "steps": 3}
LORA = STAGE | {"lora": 4}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"stage": [LORA | {"lora": -1}]}, "stage 1: lora must be a rank from 1 to 1024.*not -1"),
        ({"stage": [LORA | {"lora": 10**400}]}, "stage 1: lora must be a rank from 1 to 1024"),
        ({"stage": [LORA | {"lora": True}]}, "lora must be a whole number, not True"),
        ({"stage": [STAGE, LORA | {"freeze": ["head"]}]}, "stage 2: lora leaves the rest"),
        ({"stage": [STAGE, LORA | {"windows": [2]}]}, "without windows, window_head and freeze"),
        ({"stage": [STAGE, LORA | {"window_head": 8}]}, "stage 2: lora leaves the rest"),
        ({"stage": [LORA]}, "stage 1: lora is for a trained model .* give the recipe an init"),
        ({"stage": [LORA], "init": "x", "text_tokenizer": "new"}, "and no text_tokenizer"),
    ],
)
def test_what_does_not_go_with_a_lora(recipe, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(recipe)
