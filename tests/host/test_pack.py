"""What ComfyUI sees of the pack when it starts."""

import io
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request

import psutil
import pytest
from PIL import Image

from scripts import comfyui, workflows
from tokenshuffle_core.pipeline import load

NODES = {
    "TokenShuffleLoader",
    "TokenShuffleLoraLoader",
    "TokenShufflePrompt",
    "TokenShuffleClass",
    "TokenShuffleSampler",
    "TokenShuffleOptions",
    "TokenShuffleComplete",
    "TokenShuffleVQDecode",
    "TokenShuffleVQEncode",
    "TokenShuffleSaveCodes",
    "TokenShuffleLoadCodes",
    "TokenShuffleXYSheet",
    "TokenShuffleCFGPlot",
    "TokenShuffleStopwatch",
}
DEPRECATED = {"TokenShuffleCFGPlot", "TokenShuffleStopwatch"}  # for saved workflows


def test_imports_without_a_complaint(server):
    assert "Traceback" not in "\n".join(server.start)
    lines = [line for line in server.start if comfyui.PACK_NAME in line]
    assert len(lines) >= 1, "the table of import times names the pack"
    assert not [line for line in lines if re.search("warn|error|fail", line, re.IGNORECASE)]
    (seconds,) = (float(m[1]) for line in lines if (m := re.search(r"([\d.]+) seconds", line)))
    assert seconds < 0.5  # 0.1 on an idle machine


def test_object_info_has_every_node(server):
    info = server.get("/object_info")
    assert {name for name in info if name.startswith("TokenShuffle")} == NODES
    for name in NODES:
        # Beside what ComfyUI has for latents, wherever that is.
        assert info[name]["category"] == f"{info['VAEDecode']['category']}/autoregressive"
        assert bool(info[name].get("deprecated")) == (name in DEPRECATED)
        assert info[name]["display_name"] != name
        assert info[name]["description"]
        inputs = {**info[name]["input"]["required"], **info[name]["input"].get("optional", {})}
        for input_name, (_, options) in inputs.items():
            assert options.get("tooltip"), f"{name}.{input_name} has no tooltip"


def test_every_node_has_a_help_page(server):
    for name in NODES:
        page = workflows.http(f"{server.url}/extensions/{comfyui.PACK_NAME}/docs/{name}.md")
        assert page.startswith(b"# ")


def test_loader_lists_checkpoints_and_published_models(server):
    info = server.get("/object_info/TokenShuffleLoader")["TokenShuffleLoader"]
    kind, options = info["input"]["required"]["checkpoint"]
    names = kind if isinstance(kind, list) else options["options"]
    expected = {
        "emoji.safetensors",
        "tiny.safetensors",
        "broken.safetensors",
        "llamagen/c2i_B_256.pt",
        "Janus-Pro-1B",
        "Janus-1.3B",
        "SimpleAR-1.5B-RL",
        "Emu3.5-Image",
        "Wallaroo",
        "from_llama.safetensors",
        "c2i_L_384.pt",
    }
    assert set(names) == expected


def test_requirements_are_comfyuis_own(server):
    def names(text: str) -> set[str]:
        return {
            m[0].lower() for line in text.splitlines() if (m := re.match(r"[A-Za-z0-9_-]+", line))
        }

    theirs = names((server.host.clone / "requirements.txt").read_text(encoding="utf-8"))
    ours = names((comfyui.PACK / "requirements.txt").read_text(encoding="utf-8"))
    assert ours
    assert ours <= theirs


def test_page_is_told_about_a_checkpoint(server):
    about = server.get("/tokenshuffle/model?checkpoint=tiny.safetensors")
    assert (about["stride"], about["windows"], about["max_grid"]) == (4, [2], 64)
    assert about["generation"]["schedule"] == "half-linear"
    assert about["any_size"]
    bundled = server.get("/tokenshuffle/model?checkpoint=emoji.safetensors")
    assert not bundled["any_size"]
    assert [128, 128] in bundled["sizes"]
    assert "red apple" in bundled["card"]["subjects"]
    answer = workflows.http(
        f"{server.url}/tokenshuffle/prompt",
        {"checkpoint": "tiny.safetensors", "text": "a red apple"},
    )
    assert json.loads(answer) == {"tokens": 2, "limit": 64}


@pytest.mark.parametrize("name", ["broken.safetensors", "../../main.py", "nothing.safetensors"])
def test_page_asks_for_what_is_no_checkpoint(server, name):
    answer = server.get(f"/tokenshuffle/model?checkpoint={name}")
    assert set(answer) == {"error"}
    assert name.rpartition("/")[2] in answer["error"]


def refused(server, path: str, body: bytes | None = None) -> tuple[int, str]:
    """The status and the sentence of the answer to a wrong request."""
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(server.url + path, body), timeout=10)
    return error.value.code, json.loads(error.value.read())["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", 'JSON object with "checkpoint"'),
        (b"1e999", 'JSON object with "checkpoint"'),
        (b'{"text": "a"}', 'JSON object with "checkpoint"'),
        (b'{"checkpoint": ["tiny.safetensors"], "text": "a"}', '"checkpoint" must be text'),
        (b'{"checkpoint": "tiny.safetensors"}', 'JSON object with "text"'),
        (b'{"checkpoint": "tiny.safetensors", "text": ["a"]}', '"text" must be text'),
        (b'{"checkpoint": "tiny.safetensors", "text": 3}', '"text" must be text'),
        (
            b'{"checkpoint": "tiny.safetensors", "text": "a", "language": {}}',
            '"language" must be text',
        ),
        (b'{"checkpoint": "tiny.safetensors", "text": "\\ud800"}', "lone surrogate"),
        (b'{"checkpoint": "\\udfff", "text": "a"}', "lone surrogate"),
    ],
)
def test_wrong_requests_are_refused_in_a_sentence(server, body, words):
    status, sentence = refused(server, "/tokenshuffle/prompt", body)
    assert status == 400
    assert words in sentence


@pytest.mark.parametrize(("length", "expected"), [(10_001, 400), (10**7, 413)])
def test_long_texts_are_refused_at_once(server, length, expected):
    text = json.dumps({"checkpoint": "tiny.safetensors", "text": "a" * length}).encode()
    before = psutil.Process(server.pid).memory_info().rss
    started = time.monotonic()
    status, sentence = refused(server, "/tokenshuffle/prompt", text)
    assert time.monotonic() - started < 2
    assert status == expected
    assert "shorten" in sentence
    assert psutil.Process(server.pid).memory_info().rss < before + 2**25


def test_page_asks_for_no_model_at_all(server):
    assert refused(server, "/tokenshuffle/model")[0] == 400
    for name in ("%00", "%ED%A0%80", "a" * 5000):
        assert set(server.get(f"/tokenshuffle/model?checkpoint={name}")) == {"error"}


def test_page_gets_no_more_of_a_card_than_it_shows(server, tiny):
    path = server.base / "models" / "tokenshuffle" / "wordy.safetensors"
    parts = load(tiny)
    parts.card |= {"modelspec.description": "word " * 150_000}
    parts.card |= {f"modelspec.{i}": "word" for i in range(10**4)}
    parts.save(path)
    try:
        answer = workflows.http(f"{server.url}/tokenshuffle/model?checkpoint={path.name}")
        assert path.stat().st_size > 700_000
        assert len(answer) < 20_000
        assert json.loads(answer)["card"]["description"].startswith("word word")
    finally:
        path.unlink()


def test_templates_are_the_workflows_with_their_thumbnails(server):
    names = server.get("/workflow_templates")[comfyui.PACK_NAME]
    assert sorted(names) == [path.stem for path in workflows.PATHS]
    for path in workflows.PATHS:
        folder = f"{server.url}/api/workflow_templates/{comfyui.PACK_NAME}"
        name = urllib.parse.quote(path.stem)
        assert json.loads(workflows.http(f"{folder}/{name}.json")) == json.loads(path.read_text())
        thumbnail = workflows.http(f"{folder}/{name}.jpg")
        assert Image.open(io.BytesIO(thumbnail)).size == workflows.THUMBNAIL
