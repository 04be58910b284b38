"""What ComfyUI sees of the pack when it starts."""

import re

from scripts import comfyui, workflows

NODES = {
    "TokenShuffleLoader",
    "TokenShufflePrompt",
    "TokenShuffleSampler",
    "TokenShuffleVQDecode",
    "TokenShuffleVQEncode",
}


def test_imports_without_a_complaint(server):
    log = server.log.read_text()
    assert "Traceback" not in log
    lines = [line for line in log.splitlines() if comfyui.PACK_NAME in line]
    assert len(lines) >= 1, "the table of import times names the pack"
    assert not [line for line in lines if re.search("warn|error|fail", line, re.IGNORECASE)]


def test_object_info_has_every_node(server):
    info = server.get("/object_info")
    assert {name for name in info if name.startswith("TokenShuffle")} == NODES
    for name in NODES:
        assert info[name]["category"] == "TokenShuffle"
        assert info[name]["display_name"] != name
        assert info[name]["description"]
        inputs = {**info[name]["input"]["required"], **info[name]["input"].get("optional", {})}
        for input_name, (_, options) in inputs.items():
            assert options.get("tooltip"), f"{name}.{input_name} has no tooltip"


def test_every_node_has_a_help_page(server):
    for name in NODES:
        page = workflows.http(f"{server.url}/extensions/{comfyui.PACK_NAME}/docs/{name}.md")
        assert page.startswith(b"# ")


def test_loader_lists_safetensors_files(server):
    info = server.get("/object_info/TokenShuffleLoader")["TokenShuffleLoader"]
    kind, options = info["input"]["required"]["checkpoint"]
    names = kind if isinstance(kind, list) else options["options"]
    assert {"tiny.safetensors", "broken.safetensors"} <= set(names)
    assert all(name.endswith(".safetensors") for name in names)


def test_requirements_are_comfyuis_own(server):
    def names(text: str) -> set[str]:
        return {
            m[0].lower() for line in text.splitlines() if (m := re.match(r"[A-Za-z0-9_-]+", line))
        }

    theirs = names((server.host.clone / "requirements.txt").read_text(encoding="utf-8"))
    ours = names((comfyui.PACK / "requirements.txt").read_text(encoding="utf-8"))
    assert ours
    assert ours <= theirs
