"""Every bad input ends in exit code 2, one line that names it, and no partial file."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tokenshuffle_core.cli.main import main
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.vocabulary import Subject, Vocabulary

SIZE = ("--width", "32", "--height", "16")


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "tokenshuffle_core", *map(str, arguments)]


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must fail, and returns its one line on standard error."""

    def run(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(argument) for argument in arguments]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    return run


def test_generate_writes_a_picture_that_says_how_it_was_made(tiny, tmp_path, capsys):
    output = tmp_path / "a.png"
    assert main(["generate", "a red apple", "-o", str(output), "--model", str(tiny), *SIZE]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    picture = Image.open(output)
    assert picture.size == (32, 16)
    about = json.loads(picture.text["tokenshuffle"])
    assert about["prompt"] == "a red apple"
    assert (about["seed"], about["width"], about["schedule"]) == (0, 32, "half-linear")


def test_count_numbers_the_files_and_counts_the_seed(tiny, tmp_path):
    output = tmp_path / "a.png"
    common = ["--model", str(tiny), *SIZE]
    assert main(["generate", "", "-o", str(output), "--count", "2", "--seed", "3", *common]) == 0
    assert main(["generate", "", "-o", str(output), "--seed", "4", *common]) == 0
    second = Image.open(tmp_path / "a-2.png")
    assert second.tobytes() == Image.open(output).tobytes()
    assert json.loads(second.text["tokenshuffle"])["seed"] == 4


def test_encode_and_decode(tiny, tmp_path):
    Image.effect_noise((16, 24), 90).convert("RGB").save(tmp_path / "a.png")
    codes, output = tmp_path / "c.npy", tmp_path / "b.png"
    assert main(["encode", str(tmp_path / "a.png"), "-o", str(codes), "--model", str(tiny)]) == 0
    assert np.load(codes).shape == (1, 6, 4)
    assert main(["decode", str(codes), "-o", str(output), "--model", str(tiny)]) == 0
    assert Image.open(output).size == (16, 24)


@pytest.mark.parametrize("preset", PRESETS)
def test_info_describes_presets(preset, capsys):
    assert main(["info", preset]) == 0
    output = capsys.readouterr().out
    assert f"dim: {PRESETS[preset].model.dim}" in output
    assert "M parameters" in output


def test_info_describes_a_file(tiny, capsys):
    assert main(["info", str(tiny)]) == 0
    assert "title: tiny" in capsys.readouterr().out


def test_info_of_a_card_that_moves_the_cursor(tiny, tmp_path, capsys):
    path = tmp_path / "wordy.safetensors"
    card = {"modelspec.title": "a\x1b[2Jb\r\n" + "c" * 100_000}
    replace(load(tiny), card=card).save(path)
    assert main(["info", str(path)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("title: a [2Jb  cc"))
    assert len(line) < 3000
    assert "\x1b" not in line


@pytest.fixture
def informed(tiny, tmp_path):
    """The tiny model with a list of its sizes and a vocabulary."""
    subjects = (
        Subject({"en": ("tomato",), "de": ("Tomate", "Paradeiser")}, ("3d",), True),
        Subject({"en": ("Apple", "pome"), "de": ("Apfel",)}),
    )
    words = {"3d": {"en": "3d style", "de": "3D-Stil"}}
    vocabulary = Vocabulary(subjects, styles=words, counts=(2, 3), kinds=("single", "count"))
    card = {"modelspec.title": "informed", "tokenshuffle.sizes": "32x32, 16x32"}
    path = tmp_path / "informed.safetensors"
    replace(load(tiny), card=card, vocabulary=vocabulary).save(path)
    return path


def test_info_prints_what_a_model_knows(informed, refused, capsys):
    def lines(*options) -> dict[str, str]:
        assert main(["info", str(informed), *options]) == 0
        output = capsys.readouterr().out
        assert len(output) < 3000  # and not the vocabulary itself
        return dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)

    english, german = lines(), lines("--language", "de")
    assert english["subjects"].startswith("2, 1 of them in other colours")
    assert (english["styles"], german["styles"]) == ("3d style", "3D-Stil")
    assert german["languages"] == "en, de"
    assert (german["counts"], german["compositions"]) == ("2, 3", "single, count")
    assert german["sizes"] == "32x32, 16x32"
    for language, names in ("en", "Apple\ntomato\n"), ("de", "Apfel\nTomate\n"):
        command = ["info", str(informed), "--subjects", "--language", language]
        assert main(command) == 0
        assert capsys.readouterr().out == names
    assert "names in en, de, not fr" in refused("info", informed, "--language", "fr")


def test_info_prints_the_subjects_of_an_older_card(tiny, refused, tmp_path, capsys):
    path = tmp_path / "older.safetensors"
    replace(load(tiny), card={"tokenshuffle.subjects": "pear, apple"}).save(path)
    assert main(["info", str(path)]) == 0
    assert "subjects: pear, apple\n" in capsys.readouterr().out
    assert "no list of subjects" in refused("info", path, "--language", "en")
    assert "no list of subjects" in refused("info", path, "--subjects")


def test_a_size_of_no_training_is_refused_unless_asked_for(informed, refused, tmp_path):
    model = ("--model", informed, *SIZE)
    message = refused("generate", "a", "-o", tmp_path / "a.png", *model)
    assert "not trained at 32x16: choose 32x32, 16x32, or" in message
    assert "--any-size" in message
    asked = ["generate", "a", "-o", tmp_path / "a.png", *model, "--any-size"]
    assert main([str(argument) for argument in asked]) == 0
    assert Image.open(tmp_path / "a.png").size == (32, 16)


def test_a_size_in_a_file_of_prompts_is_refused_unless_asked_for(informed, refused, tmp_path):
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out"
    other = {"prompt": "a", "width": 16, "height": 16}
    prompts.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(other) + "\n")
    command = ["generate", "--prompts", prompts, "-o", output, "--model", informed]
    assert "p.jsonl, line 2: this model was not trained at 16x16" in refused(*command)
    assert main([*map(str, command), "--any-size"]) == 0
    assert Image.open(output / "00001.png").size == (16, 16)
    prompts.write_text(json.dumps(other | {"any_size": True}))
    command[4] = tmp_path / "other"
    assert main([*map(str, command)]) == 0
    assert main([*map(str, command), "--any-size"]) == 0  # the same pictures: the run goes on


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cat " * 200,), "the prompt has"),
        (("a", "--width", "250"), "width 250 does not fit"),
        (("a", "--count", "0"), "number of pictures"),
        (("a", "--cfg", "nan"), "cfg must be a number"),
        (("a", "--top-p", "2"), "top_p must be"),
        (("a", "--temperature", "-1"), "temperature must be"),
        (("a", "--seed", "-2"), "seed must be"),
        (("a", "--count", "1000000000"), "--count, must be from 1 to 100000"),
        (("a", "--batch", "0"), "--batch must be at least 1"),
        (("a", "--width", "80000", "--height", "80000"), "80000x80000 exceeds the limit"),
        (("a", "--width", "80000"), "width 80000 is too large"),
        (("a", "--width", "9" * 40), "width must be a whole number from 1"),
        (("a", "--device", "tpu9"), "device 'tpu9'"),
        (("--class", "207"), "this model reads text, not classes"),
        (("a\udcff",), "the prompt contains a lone surrogate"),
        (("a", "--negative", "\udcff"), "the negative prompt contains a lone surrogate"),
    ],
)
def test_bad_settings(refused, tiny, tmp_path, arguments, message):
    output = ("-o", tmp_path / "a.png", "--model", tiny)
    assert message in refused("generate", *arguments, *output)


@pytest.mark.parametrize("content", [b"", b"just text", b"\x10\0\0\0\0\0\0\0{}"])
def test_bad_checkpoints(refused, tmp_path, content):
    model = tmp_path / "bad.safetensors"
    model.write_bytes(content)
    for arguments in (["generate", "a"], ["encode", "x.png"], ["info"]):
        if arguments[0] == "info":
            assert "bad.safetensors" in refused("info", model)
        elif arguments[0] == "generate":
            assert "bad.safetensors" in refused(
                *arguments, "-o", tmp_path / "a.png", "--model", model
            )


def test_missing_places(refused, tiny, tmp_path):
    assert "nowhere does not exist" in refused(
        "generate", "a", "-o", tmp_path / "nowhere" / "a.png", "--model", tiny
    )
    assert "has none of model.safetensors" in refused("info", tmp_path)
    assert "must end in .png or .jpg" in refused("generate", "a", "-o", tmp_path / "a.gif")
    assert "gone.safetensors is neither an existing file nor" in refused(
        "info", tmp_path / "gone.safetensors"
    )
    output = ("-o", tmp_path / "c.npy", "--model", tiny)
    assert "gone.png does not exist" in refused("encode", tmp_path / "gone.png", *output)
    assert "manifest.jsonl does not exist" in refused("eval", "retrieval", tmp_path / "data")
    assert "style 'oil'" in refused("data", "emoji", tmp_path / "data", "--styles", "oil")


def test_bad_pictures(refused, tiny, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "alpha.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    output = ("-o", tmp_path / "c.npy", "--model", tiny)
    assert "one.png: width 1 does not fit" in refused("encode", tmp_path / "one.png", *output)
    assert "alpha.png is transparent" in refused("encode", tmp_path / "alpha.png", *output)
    assert "deep.png has more than 8 bits" in refused("encode", tmp_path / "deep.png", *output)


def test_bad_codes(refused, tiny, tmp_path):
    np.save(tmp_path / "foreign.npy", np.full((4, 4), 64))
    output = ("-o", tmp_path / "a.png", "--model", tiny)
    assert "foreign.npy: codes must be" in refused("decode", tmp_path / "foreign.npy", *output)


def test_unknown_option():
    with pytest.raises(SystemExit) as exit_code:
        main(["generate", "a", "--colour", "red"])
    assert exit_code.value.code == 2


def test_a_full_disk_leaves_no_partial_file(tiny, tmp_path):
    """A limit on the size of files stands in for the disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    arguments = command("generate", "a", "-o", tmp_path / "a.png", "--model", tiny, *SIZE)
    result = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 2
    assert "File too large" in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_cleanly(tiny, tmp_path):
    size = ("--width", "256", "--height", "256")
    arguments = command("generate", "a", "-o", tmp_path / "a.png", "--model", tiny, *size)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while "note:" not in process.stderr.readline():  # printed right before sampling starts
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read()
    assert process.wait() == 130
    assert errors.strip() == "interrupted"
    assert not list(tmp_path.iterdir())
