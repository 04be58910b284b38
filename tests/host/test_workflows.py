"""The example workflows, as a user would run them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import comfyui, workflows
from tokenshuffle_core.checkpoints import BUNDLED

PATHS = workflows.PATHS
FIRST_VERSION = sorted(Path(__file__).with_name("first_version").glob("*.json"))
RUNNABLE = [path for path in PATHS if path.stem not in workflows.NEEDS_DOWNLOAD]
pytestmark = pytest.mark.skipif(not BUNDLED.exists(), reason="the bundled model is missing")


@pytest.mark.parametrize(
    "path", RUNNABLE + FIRST_VERSION, ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_workflow_runs(server, path):
    workflow = json.loads(path.read_text())
    prompt = workflows.to_api(workflow, server.get("/object_info"))
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    savers = [name for name, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert all(workflows.images(server.url, entry, saver) for saver in savers)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_png_carries_the_workflow(server, path):
    workflow = json.loads(path.read_text())
    picture = Image.open(path.with_suffix(".png"))
    assert json.loads(picture.text["workflow"]) == workflow
    prompt = json.loads(picture.text["prompt"])
    for node in prompt.values():
        node.pop("is_changed", None)  # the host notes there what fingerprint_inputs returned
    now = workflows.to_api(workflow, server.get("/object_info"))
    assert prompt.keys() == now.keys()
    for name, node in prompt.items():  # an input that is younger than the picture has its default
        assert node["class_type"] == now[name]["class_type"]
        assert node["inputs"].items() <= now[name]["inputs"].items()
    assert np.asarray(picture).std() > 10, "the picture is not blank"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_workflow_has_the_sockets_of_its_nodes(server, path):
    """What the page compares when it opens a workflow: the names and types of sockets, and links
    that both of their ends know."""
    info = server.get("/object_info")
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        if node["type"] in workflows.NOTES:
            continue
        node_info = info[node["type"]]
        kinds = {name: kind for name, (kind, *_) in workflows.inputs_of(node_info)}
        for slot in node["inputs"]:
            assert kinds[slot["name"]] == slot["type"]
        if node["type"].startswith("TokenShuffle"):  # ComfyUI's own change between its versions
            outputs = [(slot["name"], slot["type"]) for slot in node["outputs"]]
            assert outputs == list(zip(node_info["output_name"], node_info["output"], strict=True))
    for number, origin, out, target, into, kind in workflow["links"]:
        assert number in nodes[origin]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == number
        assert nodes[origin]["outputs"][out]["type"] == kind


def test_client_of_the_api_gets_the_picture(server, tmp_path):
    client = comfyui.PACK / "api" / "client.py"
    output = tmp_path / "apple.png"
    subprocess.run([sys.executable, client, "a red apple", output, server.url], check=True)
    picture = np.asarray(Image.open(output)).astype(int)
    red = (picture[..., 0] > 1.5 * picture[..., 1:].max(-1)) & (picture[..., 0] > 100)
    assert picture.shape == (128, 128, 3)
    assert red.mean() > 0.1
