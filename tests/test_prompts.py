"""Files of prompts: what is read, and what is refused in a sentence."""

import json

import pytest
from PIL import Image

from tokenshuffle_core.cli.main import main


def run(*arguments) -> int:
    return main(["generate", *map(str, arguments)])


def prompt_of(path) -> str:
    with Image.open(path) as image:
        return json.loads(image.text["tokenshuffle"])["prompt"]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("text", [False, True])
def test_marks_and_blank_lines_change_nothing(text, ends, tiny, tmp_path):
    """A byte order mark, blank lines between and after, and separators that are not line ends."""
    prompts = {0: "a red apple", 2: "猫\u2028a dog\x85b", 5: "a cat"}
    lines = [""] * 8
    for i, prompt in prompts.items():
        lines[i] = prompt if text else json.dumps({"prompt": prompt}, ensure_ascii=False)
    path, out = tmp_path / ("prompts.TXT" if text else "prompts.jsonl"), tmp_path / "out"
    path.write_bytes(ends.join(lines).encode("utf-8-sig"))
    assert run("--prompts", path, "-o", out, "--model", tiny) == 0
    assert {int(p.stem): prompt_of(p) for p in out.glob("*.png")} == prompts


@pytest.mark.parametrize(
    ("first", "second"),
    [("A.png", "a.png"), ("ä.png", "A\u0308.PNG"), ("straße.png", "STRASSE.png")],
)
def test_names_that_some_file_systems_take_for_one(first, second, tiny, tmp_path, capsys):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [json.dumps({"prompt": "a", "file": name}) + "\n" for name in (first, second)]
    path.write_text("".join(lines))
    assert run("--prompts", path, "-o", out, "--model", tiny) == 2
    assert f"line 2: {second} is the file of another line, which is" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b'{"prompt": "a"}\n', "line 1 is JSON: a file of JSON lines ends in .jsonl"),
        ("p.txt", "a cat\n".encode("utf-16"), "is not text in UTF-8"),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is not text in UTF-8"),
        ("p.txt", b"\n \n", "has no prompts"),
        ("p.jsonl", b"", "has no prompts"),
    ],
)
def test_files_that_are_not_prompts(name, content, message, tiny, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert run("--prompts", tmp_path / name, "-o", tmp_path / "out", "--model", tiny) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a red apple", "line 2 is not JSON"),
        ("[" * 200_000, "line 2 is not JSON"),
        ('["a"]', 'line 2: expected a JSON object such as {"prompt"'),
        ('{"text": "a"}', 'line 2: expected a JSON object such as {"prompt"'),
        ('{"prompt": "a", "steps": 3}', "line 2: there is no key 'steps', only prompt"),
        ('{"prompt": 3}', "line 2: prompt must be text, not 3"),
        ('{"prompt": "a", "seed": "x"}', "line 2: seed must be a whole number, not 'x'"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed must be a whole number from 0"),
        ('{"prompt": "a", "file": "../a.png"}', "line 2: the name of a file must not contain '/'"),
        ('{"prompt": "a", "file": "a?b.png"}', "line 2: the name of a file must not contain '?'"),
        ('{"prompt": "a", "file": "a\\u0000.png"}', "line 2: the name of a file must not contain"),
        ('{"prompt": "a", "file": "CON.png"}', "must not be CON, which Windows reserves"),
        ('{"prompt": "a", "file": "com1.x.png"}', "must not be COM1, which Windows reserves"),
        (json.dumps({"prompt": "a", "file": "红" * 90 + ".png"}), "must have 1 to 255 bytes"),
        ('{"prompt": "a", "file": "a.gif"}', "line 2: file must be a name that ends in .png or"),
        ('{"prompt": "a", "file": ".png"}', "line 2: file must be a name that ends in .png or"),
        ('{"prompt": "a", "file": "00000.png"}', "line 2: 00000.png is the file of another line"),
        ('{"prompt": "a", "cfg": -1}', "line 2: cfg must be"),
        ('{"prompt": "a", "cfg": "x"}', "line 2: "),
        ('{"prompt": "a", "cfg": true}', "line 2: cfg must be a number, not true"),
        ('{"prompt": "a", "top_p": false}', "line 2: top_p must be a number, not false"),
        ('{"prompt": "a", "top_k": 1.5}', "line 2: top_k must be"),
        ('{"prompt": "a", "seed": true}', "line 2: seed must be a whole number, not True"),
        ('{"prompt": "a", "width": 33}', "line 2: width 33 does not fit"),
        ('{"prompt": "a", "window": 3}', "line 2: window 3 is not one of this model's"),
        (json.dumps({"prompt": "xyz " * 60}), "line 2: the prompt has"),
        ('{"prompt": "\\ud83d a cat"}', "line 2 contains a lone surrogate"),
        ('{"prompt": "a", "\\udcff": 1}', "line 2 contains a lone surrogate"),
    ],
)
def test_lines_that_make_no_sense(line, message, tiny, tmp_path, capsys):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "a"}}\n', encoding="utf-8")
    assert run("--prompts", path, "-o", out, "--model", tiny) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_corrected_file_is_drawn_where_the_wrong_one_was_not(tiny, tmp_path):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    for width, code in ((33, 2), (32, 0)):
        line = json.dumps({"prompt": "a\u2028b", "width": width}, ensure_ascii=False)
        path.write_text(line, encoding="utf-8")
        assert run("--prompts", path, "-o", out, "--model", tiny) == code
    assert (out / "00000.png").exists()
