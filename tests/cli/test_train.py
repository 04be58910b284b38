"""`train model` on the command line: what it starts from."""

import json
from dataclasses import asdict, fields

import pytest

from tokenshuffle_core.cli.main import main
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training.settings import LoopConfig, Recipe, Stage
from tokenshuffle_core.training.stages import parse_stages


def train(codes, output, *options) -> int:
    steps = ["--preset", "tiny", "--steps", "2", "--batch", "2"]
    return main(["train", "model", str(codes), "-o", str(output), *steps, *map(str, options)])


def test_a_trained_model_learns_to_read_with_another_tokenizer(codes, image_tokenizer, tmp_path):
    assert train(codes, tmp_path / "1", "--image-tokenizer", image_tokenizer) == 0
    first = tmp_path / "1" / "final.safetensors"
    new = ["--text-tokenizer", "new", "--vocabulary", 420]
    assert train(codes, tmp_path / "2", "--init", first, *new) == 0
    before, after = load(first), load(tmp_path / "2" / "final.safetensors")
    assert len(after.text_tokenizer) == after.config.model.text_vocabulary == 420
    assert len(before.text_tokenizer) != 420
    path = tmp_path / "tokenizer.json"
    path.write_text(after.text_tokenizer.to_json(), encoding="utf-8")
    assert train(codes, tmp_path / "3", "--init", first, "--text-tokenizer", path) == 0
    again = load(tmp_path / "3" / "final.safetensors").text_tokenizer
    assert again.to_json() == after.text_tokenizer.to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora", 4), "--lora leaves the rest of a checkpoint unchanged: give it with --init"),
        (("--lora", 4, "--init", "x", "--windows", "1,2"), "and without --windows"),
        (("--lora", 4, "--init", "x", "--text-tokenizer", "new"), "and without --windows"),
        (("--lora", 4, "--init", "x", "--freeze", "head"), "--text-tokenizer and --freeze"),
        (
            ("--lora", -1, "--init", "x"),
            "lora must be a rank from 1 to 1024, or 0 for none, not -1",
        ),
        (("--init", "x", "--vocabulary", 300), "add --text-tokenizer new"),
        (("--windows", "two"), "--windows must be numbers separated by commas"),
        (("--window-mix", "1,"), "--window-mix must be numbers separated by commas"),
        (("--freeze", ","), "--freeze must be names separated by commas"),
        (("--context-noise", 2), "context_noise must be a share from 0 to 1"),
        (("--init", "no.safetensors"), "no.safetensors does not exist"),
        (("--text-tokenizer", "no.json"), "no.json does not exist"),
        (("--batch", 0), "batch must be at least 1"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    options, message, codes, image_tokenizer, tmp_path, capsys
):
    if "--init" not in options:
        options = ("--image-tokenizer", image_tokenizer, *options)
    assert train(codes, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert message in error


def test_help_has_a_line_for_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "model", "--help"])
    shown = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for part in (LoopConfig, Recipe, Stage):
        for known in fields(part):
            if known.metadata:
                assert f"--{known.name.replace('_', '-')}" in shown
                assert known.metadata["help"].replace("%%", "%") in shown
    for text in ("(default: 15000)", "(default: 0.0012)", "(default: 0.99)", "(default: 0.8)"):
        assert text in shown
    with pytest.raises(SystemExit):
        main(["train", "tokenizer", "--help"])
    shown = capsys.readouterr().out
    assert "(default: 3200)" in shown
    assert "(default: 0.002)" in shown


def test_a_recipe_and_the_command_line_have_the_same_defaults(codes, image_tokenizer, tmp_path):
    """The state of a training stores its settings."""
    assert train(codes, tmp_path / "run", "--image-tokenizer", image_tokenizer) == 0
    stored = json.loads((tmp_path / "run/state/0000002/settings.json").read_text())
    (stage,) = parse_stages({"stage": [{"codes": "x", "steps": 2, "batch": 2}]}).stages
    assert stored.pop("seconds") > 0
    assert asdict(stage.loop) | {"about": stored["about"]} == stored
