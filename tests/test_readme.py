"""What the READMEs and docs/ show works: Python, command lines, links; and both languages agree."""

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.published import janus, write_janus
from tokenshuffle_core.checkpoints import skeleton
from tokenshuffle_core.cli import main
from tokenshuffle_core.config import ModelConfig
from tokenshuffle_core.transformer import KVCache

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")
PAGES = (*READMES, "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str | None = None) -> list[str]:
    """The code blocks of a page, those of one language ("" for none) or all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [code for name, code in found if language in (None, name)]


def without_words(code: str) -> str:
    """Code without comments, and one word for each text in words: what languages differ in."""
    code = re.sub(r" *#.*", "", code)
    return re.sub(r'"[^"\n]*[^!-~\n][^"\n]*"', '"words"', code)


def commands(page: str) -> list[list[str]]:
    """The words of each `tokenshuffle` command in a page's code blocks, without the first."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    found = []
    for part in (part.strip() for line in lines for part in line.split("&&")):
        _, separator, rest = part.rpartition("-m tokenshuffle_core ")
        if separator or part.startswith("tokenshuffle "):
            rest = rest if separator else part.removeprefix("tokenshuffle ")
            found.append(shlex.split(rest, comments=True))
    return found


# Python


@pytest.fixture
def run_block(tmp_path, monkeypatch):
    """Runs a Python block of a page as a new user would, in an empty folder; its names."""
    monkeypatch.chdir(tmp_path)

    def run(page: str, number: int) -> dict:
        names = {"__name__": "__main__"}
        exec(compile(blocks(page, "python")[number], f"{page}, block {number + 1}", "exec"), names)
        return names

    return run


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def red_share(image: np.ndarray) -> float:
    red, green, blue = image.astype(int).transpose(2, 0, 1)
    return float(((red > 100) & (red > 1.5 * np.maximum(green, blue))).mean())


@pytest.mark.parametrize("page", READMES)
def test_there_are_three_short_python_blocks(page):
    code = blocks(page, "python")
    assert len(code) == 3
    for block in code:
        lines = [line for line in block.splitlines() if line and "import" not in line]
        assert 3 <= len(lines) <= 8


@pytest.mark.parametrize("page", READMES)
def test_the_first_block_draws_a_red_apple(page, run_block, capsys):
    drawn = run_block(page, 0)["drawn"]
    assert (drawn.images.shape, drawn.images.dtype) == ((2, 128, 128, 3), torch.float32)
    assert (drawn.codes.shape, drawn.codes.dtype) == ((2, 16, 16), torch.int64)
    assert "2, 16, 16" in capsys.readouterr().out
    apple = pixels("apple.png")
    assert apple.shape == (128, 128, 3)
    assert red_share(apple) > 0.2
    assert abs(apple / 255 - drawn.images[0].numpy()).max() < 0.01


@pytest.mark.parametrize("page", READMES)
def test_the_second_block_watches_two_tomatoes(page, run_block, capsys):
    progress = run_block(page, 1)["progress"]
    assert progress.position == progress.positions == 128
    assert capsys.readouterr().out.split("\n")[:2] == ["1 of 128 windows", "2 of 128 windows"]
    tomatoes = pixels("tomatoes.png")
    assert tomatoes.shape == (128, 256, 3)
    assert min(red_share(half) for half in np.split(tomatoes, 2, axis=1)) > 0.2


@pytest.fixture(scope="module")
def small_janus():
    """With as many pixels to a code as the published one has, so that 384 px take 576 steps."""
    return janus(levels=(1, 1, 1, 1, 2))


@pytest.mark.parametrize("page", READMES)
def test_the_third_block_draws_with_public_weights(page, run_block, small_janus):
    write_janus(small_janus, Path("Janus-Pro-1B"))
    load = run_block(page, 2)["load"]
    assert pixels("corgi.png").shape == (384, 384, 3)
    published, converted = load("Janus-Pro-1B"), load("janus.safetensors")
    assert converted.config == published.config
    ours, theirs = (each.model.state_dict() for each in (converted, published))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# command lines


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_parses(page, monkeypatch):
    class Parsed(BaseException):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def stop(*arguments):
        parse_args(*arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for words in commands(page):
        with pytest.raises((Parsed, SystemExit)) as end:
            main(words)
        assert end.type is Parsed or (end.value.code, words[-1]) == (0, "--help"), words


def test_wrong_command_lines_do_not_parse(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "a cat", "-o", "cat.png", "--no-such-option"])
    assert end.value.code == 2


@pytest.mark.parametrize(("page", "number"), [("README.md", 9), ("docs/training.md", 16)])
def test_command_lines_are_found(page, number):
    assert len(commands(page)) >= number


def test_continuous_integration_runs_the_two_commands():
    script, workflow = text_of(".ci/run"), text_of(".github/workflows/test.yml")
    first, second = (block.strip() for block in blocks("README.md", "")[:2])
    assert first == 'pip install . && tokenshuffle generate "a red apple" -o apple.png'
    assert second == 'pip install -e ".[dev]" && pytest'
    for part in [*first.split(" && "), *second.split(" && ")]:
        command = re.escape(part).replace(r"pip\ install", r"pip\ install(\ --quiet)?")
        assert re.search(command, script), part
        assert re.search(command, workflow), part


# pages


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    assert targets or page == "CONTRIBUTING.md"
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


LLAMAGEN = {"text_vocabulary": 1001, "codebook_size": 16_384, "rope_axes": 2}
JANUS = {"text_vocabulary": 102_400, "codebook_size": 16_384}
SIMPLEAR = {"text_vocabulary": 151_672, "codebook_size": 64_000, "kv_heads": 2, "qkv_bias": True}
WALLAROO = {
    "text_vocabulary": 152_064, "codebook_size": 16_384, "kv_heads": 4, "qkv_bias": True,
    "text_head": True, "head_hidden": 3584,
}  # fmt: skip
EMU = {
    "text_vocabulary": 151_854, "codebook_size": 131_072, "kv_heads": 8, "head_dim": 128,
    "qk_norm": True, "text_head": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "place", "dim", "layers", "heads", "hidden", "others"),
    [
        ("LlamaGen", 0, 768, 12, 12, 2048, LLAMAGEN),
        ("LlamaGen", 1, 1024, 24, 16, 2816, LLAMAGEN),
        ("LlamaGen", 2, 1280, 36, 20, 3584, LLAMAGEN),
        ("LlamaGen", 3, 1536, 48, 24, 4096, LLAMAGEN),
        ("LlamaGen", 4, 3200, 24, 32, 8704, LLAMAGEN),
        ("Janus-Pro 1B", 0, 2048, 24, 16, 5632, JANUS | {"head_hidden": 2048}),
        ("Janus-Pro 7B", 0, 4096, 30, 32, 11_008, JANUS | {"head_hidden": 4096}),
        ("SimpleAR 0.5B", 0, 896, 24, 14, 4864, SIMPLEAR),
        ("SimpleAR 1.5B", 0, 1536, 28, 12, 8960, SIMPLEAR),
        ("Wallaroo", 0, 3584, 28, 28, 18_944, WALLAROO),
        ("Emu3.5", 0, 5120, 64, 64, 25_600, EMU),
    ],
)
def test_memory_of_public_weights(row, place, dim, layers, heads, hidden, others):
    (line,) = re.findall(rf"^\| {row}.*\|$", text_of("docs/models.md"), re.MULTILINE)
    *_, steps, _, weights, cache = (cell.strip() for cell in line.strip("|").split("|"))
    shape = {"dim": dim, "layers": layers, "heads": heads, "hidden": hidden, "windows": (1,)}
    config = ModelConfig(**{"kv_heads": heads, "context": 4104} | shape | others)
    counted = 2 * sum(p.numel() for p in skeleton(config).parameters()) / 1e9
    said = [float(number) for number in re.findall(r"[0-9.]+", weights)]
    assert said[place] == pytest.approx(counted, rel=0.01, abs=0.05)
    positions = 100 + int(re.findall("[0-9,]+", steps)[-1].replace(",", ""))
    counted = KVCache.nbytes(config, 2, positions, torch.bfloat16) / 1e9
    said = float(re.findall(r"[0-9.]+", cache)[0])
    assert (
        counted <= said + 0.05 if "at most" in cache else said == pytest.approx(counted, abs=0.06)
    )


def test_tests_that_show_a_promise_exist():
    named = re.findall(r"`(tests/[\w/.]+)`", text_of("docs/reliability.md"))
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_picture_is_shown():
    shown = {
        Path(t).name for page in PAGES for t in re.findall(r"!\[.*?\]\((.*?)\)", text_of(page))
    }
    pictures = {p.name for p in (ROOT / "docs").iterdir() if p.suffix in (".png", ".svg")}
    assert pictures - shown == {"icon.png", "icon.svg"}


def test_both_languages_have_the_same_sections_and_code():
    english, chinese = (re.findall(r"^#+(?= )", text_of(page), re.MULTILINE) for page in READMES)
    assert english == chinese
    english, chinese = (
        re.findall(r"^\|", text_of(page), re.MULTILINE)
        + re.findall(r"^!\[", text_of(page), re.MULTILINE)
        for page in READMES
    )
    assert english == chinese, "rows of tables and pictures"
    english, chinese = ([without_words(code) for code in blocks(page)] for page in READMES)
    assert english == chinese


@pytest.mark.parametrize("page", PAGES)
def test_codes_are_called_codes(page):
    assert not re.search(r"image tokens?\b", text_of(page), re.IGNORECASE)
