import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.loras import write_random_lora
from tests.support.models import random_checkpoint
from tokenshuffle_core.adapt.lora import merge_lora
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.pipeline import load


@pytest.fixture
def lora(tiny, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_random_lora(path, tiny)
    return path


def test_merged_checkpoint_draws_what_model_and_lora_draw(tiny, lora, tmp_path):
    merged, size = tmp_path / "merged.safetensors", ["--width", "32", "--height", "16"]
    with_lora = ["--model", str(tiny), "--lora", f"{lora}=0.5", "--lora", str(lora)]
    assert main(["merge", *with_lora, "-o", str(merged)]) == 0
    for name, model in (("a", ["--model", str(merged)]), ("b", with_lora), ("c", with_lora[:2])):
        output = tmp_path / f"{name}.png"
        assert main(["generate", "a red apple", "-o", str(output), *size, *model]) == 0
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b != c
    expected = load(tiny)
    merge_lora(expected.model, lora, 1.5)
    found = load(merged).model.head.weight
    torch.testing.assert_close(found, expected.model.head.weight)


def test_grown_checkpoint_serves_the_windows_asked_for(tiny, tmp_path, capsys):
    grown = tmp_path / "grown.safetensors"
    arguments = ["--model", str(tiny), "--windows", "4,2,1", "--window-head", "8"]
    assert main(["grow", *arguments, "-o", str(grown)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("window 4: keeps ")
    assert lines[1:] == [str(grown)]
    assert load(grown).config.model.windows == (4, 2, 1)
    picture = ["generate", "", "--model", str(grown), "--width", "32", "--height", "16"]
    for window in ("1", "2", "4"):
        output = tmp_path / f"{window}.png"
        assert main([*picture, "--window", window, "-o", str(output)]) == 0
        assert output.exists()


@pytest.mark.parametrize("command", [["merge"], ["grow", "--windows", "2,1"]])
def test_what_is_written_has_one_type_of_weights_and_names_the_lora(command, lora, tmp_path):
    half, output = tmp_path / "half.safetensors", tmp_path / "new.safetensors"
    random_checkpoint().save(half, torch.float16)
    command = [*command, "--model", str(half), "--lora", str(lora), "-o", str(output)]
    assert main(command) == 0
    assert {weight.dtype for weight in load_file(output).values()} == {torch.float32}
    assert "merged with a LoRA" in load(output).card["modelspec.description"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge"], "at least one --lora"),
        (["merge", "--lora", "no.safetensors"], "no.safetensors does not exist"),
        (["merge", "--lora", "no.safetensors=x"], "'x' is not a number"),
        (["merge", "--lora", "no.safetensors=nan"], "no.safetensors: the strength of a LoRA must"),
        (["merge", "--lora", "no.safetensors=-inf"], "the strength of a LoRA must be a number"),
        (["grow", "--windows", "a"], "must be like 2 or 1,2,4"),
        (["grow", "--windows", "3"], "multiple of window squared"),
        (["grow", "--windows", "2,2"], "distinct integers"),
    ],
)
def test_wrong_input_is_one_sentence(tiny, tmp_path, capsys, arguments, message):
    output = tmp_path / "out.safetensors"
    assert main([*arguments, "--model", str(tiny), "-o", str(output)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
