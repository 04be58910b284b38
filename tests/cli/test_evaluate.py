"""`tokenshuffle eval`: tables, result files, and refusals."""

import hashlib
import json
import shutil
import sys

import pytest
from PIL import Image

from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data.emoji.folder import build


@pytest.fixture(scope="module")
def composed(data, tmp_path_factory):
    copy = shutil.copytree(data, tmp_path_factory.mktemp("eval") / "data")
    build(copy, 60, held_out=0.34, seed=1, workers=1)
    return copy


@pytest.fixture
def evaluate(tiny, tmp_path, capsys):
    """Runs a score, and returns its table and its result file."""

    def run(*arguments) -> tuple[str, dict]:
        path = tmp_path / "result.json"
        common = ["--model", tiny, "--device", "cpu", "--json", path]
        assert main(["eval", *map(str, [*arguments, *common])]) == 0
        result = json.loads(path.read_text())
        assert result["model"]["sha256"] == hashlib.sha256(tiny.read_bytes()).hexdigest()
        assert result["options"]["seed"] == 0
        return capsys.readouterr().out, result

    return run


def test_retrieval(evaluate, data, tmp_path):
    table, result = evaluate(
        "retrieval", data, "--count", 5, "--sheet", tmp_path / "s.png", "--cfg", 1
    )
    found = result["results"]["trained top-5"]
    assert (found["n"], result["settings"]["cfg"]) == (5, 1)
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    line = next(line for line in table.splitlines() if line.startswith("trained top-5"))
    assert f"{found['value']:.3f}" in line
    assert line.endswith("n=5")
    assert result["results"]["held-out top-1"]["n"] == 1
    assert result["results"]["trained reconstruction PSNR (dB)"]["low"] is None
    assert Image.open(tmp_path / "s.png").height == 32


def test_compositional(evaluate, composed, tmp_path):
    sheet = tmp_path / "s.png"
    table, result = evaluate("compositional", composed, "--count", 2, "--cfg", 1, "--sheet", sheet)
    found = result["results"]
    assert found["trained single: subjects"]["n"] == 2
    assert {name.partition(":")[0] for name in found} == {
        f"{split} {kind}"
        for split in ("trained", "held-out")
        for kind in ("single", "count", "beside", "above")
    }
    assert table.count("n=") == len(found) == 2 * (2 + 2 + 3 + 3)
    assert sheet.is_file()


def test_understanding(evaluate, data, tmp_path):
    sheet = tmp_path / "s.png"
    settings = ("--count", 2, "--cfg", 1, "--sheet", sheet)
    groups = ("--groups", "held-out,pairs,colours,seeds")
    table, result = evaluate("understanding", data, *settings, *groups)
    found = result["results"]
    assert {name for name, e in found.items() if e["n"] == 2} > {"held-out", "pairs", "colours"}
    assert {"pairs: one of two", "colours: colour", "distance between seeds"} < {*found}
    assert table.count("n=") == len(found)
    prompts = result["prompts"]
    assert [prompt["group"] for prompt in prompts] == ["held-out"] * 2 + ["pairs"] * 2 + [
        "colours"
    ] * 2
    rights = [prompt["found"]["right"] for prompt in prompts if prompt["group"] == "pairs"]
    assert found["pairs"]["value"] == sum(rights) / 2
    assert sheet.is_file()


def test_understanding_of_own_prompts(evaluate, data, tiny, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    line = {"prompt": "zwei Sterne!", "subjects": ["star", "star"], "language": "de"}
    path.write_text(json.dumps(line) + "\n")
    _, result = evaluate("understanding", data, "--prompts", path)
    assert {"all", "all, de", "prompts: count"} < {*result["results"]}
    assert result["prompts"][0]["subjects"] == [["star"], ["star"]]
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"subjects": ["tree"]}))
    for options, message in (
        (("--prompts", path), "own.jsonl, line 2: the data set has no subject 'tree'"),
        (("--prompts", tmp_path / "none.jsonl"), "none.jsonl does not exist"),
        (("--groups", "canonical,plurals"), "there is no group 'plurals', only canonical, "),
        (("--groups", "pairs", "--prompts", path), "--groups is for prompts that are made"),
        (("--count", 0), "--count must be at least 1"),
    ):
        arguments = ["eval", "understanding", data, "--model", tiny, *options]
        assert main([*map(str, arguments)]) != 0
        assert message in capsys.readouterr().err


def test_reconstruction_and_loss(evaluate, composed):
    _, result = evaluate("reconstruction", composed / "composed", "--split", "train", "--count", 4)
    assert result["results"]["SSIM"]["n"] == 4
    size = ("--size", "16x32")
    _, result = evaluate("loss", composed / "composed", "--count", 3, "--batch", 2, *size)
    assert result["results"]["nats per code"]["n"] == 3
    assert result["codes"] == 3 * 4 * 8  # one code of this model is 4 x 4 pixels


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """Prompt files and a scorer of one's own, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    lines = [{"tag": "one", "include": [], "prompt": text} for text in ("a boat", "a lamp")]
    (tmp_path / "geneval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = {f"{i:05}": {"prompt": line["prompt"]} for i, line in enumerate(lines)}
    (tmp_path / "genai.json").write_text(json.dumps(entries))
    (tmp_path / "scorer_of_the_tests.py").write_text(
        "def stand_in_scorer(images, texts):\n"
        "    assert all(image.is_file() for image in images)\n"
        "    return [0.25 * len(text) for text in texts]\n"
    )
    return tmp_path


def test_geneval(evaluate, prompts, tiny, capsys, monkeypatch):
    common = ["eval", "geneval", "geneval.jsonl", "-o", "out", "--width", "16", "--height", "16"]
    arguments = [*common, "--samples", "1", "--cfg", "1", "--model", str(tiny)]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(arguments) == 0
        assert "1 pictures drawn, 0 kept" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert sorted(str(path.relative_to(prompts / "out")) for path in prompts.rglob("*.png")) == [
        "00000/samples/0000.png", "00001/samples/0000.png",
    ]  # fmt: skip
    results = [{"tag": "one", "metadata": name, "correct": name == "a"} for name in "ab"]
    (prompts / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    table, result = evaluate(*arguments[1:-2], "--results", "results.jsonl")
    assert result["results"]["overall"]["value"] == 0.5
    assert "overall" in table


def test_genai_bench_end_to_end(evaluate, prompts):
    size = ("--width", 16, "--height", 16, "--cfg", 1)
    scorer = ("--scorer", "scorer_of_the_tests:stand_in_scorer")
    table, result = evaluate("genai-bench", "genai.json", "-o", "out", *size, *scorer)
    assert result["scores"] == {"00000": 1.5, "00001": 1.5}
    assert result["results"]["all"]["value"] == 1.5
    assert table.split() == ["all", "1.500", "[1.500,", "1.500]", "n=2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retrieval", "DATA", "--json", "a.txt"), "a.txt must end in .json"),
        (("retrieval", "DATA", "--batch", "0"), "--batch must be at least 1"),
        (("compositional", "nowhere"), "nowhere/composed does not exist"),
        (("compositional", "COMPOSED", "--language", "nl"), "language 'nl' is not one of"),
        (("loss", "gone"), "gone does not exist"),
        (("geneval", "gone.jsonl", "-o", "out"), "gone.jsonl does not exist"),
        (("geneval", "geneval.jsonl", "-o", "out", "--samples", "0"), "--samples must be"),
        (
            ("genai-bench", "genai.json", "-o", "out", "--scorer", "nope:f"),
            "scorer 'nope:f' is not a",
        ),
    ],
)
def test_bad_input(data, composed, tiny, prompts, capsys, arguments, message):
    folders = {"DATA": str(data), "COMPOSED": str(composed)}
    given = [folders.get(argument, argument) for argument in arguments]
    assert main(["eval", *given, "--model", str(tiny)]) == 2
    *notes, line = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert all("left out: " in note for note in notes)
    assert not (prompts / "out").exists()
