"""Prompts through POST /prompt: pictures, errors, interrupts."""

import copy
import io
import json
import math
import os
import subprocess
import time
import urllib.error
import uuid

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from scripts import comfyui, workflows
from tokenshuffle_core.pipeline import load


def succeed(server, prompt) -> list[np.ndarray]:
    """The pictures that the prompt's SaveImage node wrote."""
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return [pixels(png) for png in workflows.images(server.url, entry, "save")]


def fail(server, prompt) -> dict:
    """The execution_error message of a prompt: node_type, exception_type, exception_message."""
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "error"
    (message,) = [m for kind, m in entry["status"]["messages"] if kind == "execution_error"]
    return message


def allow_any_size(prompt) -> None:
    """Connects the sampler to Options with its own values, which allow any size."""
    sampler = prompt["sampler"]["inputs"]
    own = {name: sampler[name] for name in ("schedule", "temperature", "top_k", "top_p")}
    prompt["options"] = {"class_type": "TokenShuffleOptions", "inputs": own | {"any_size": True}}
    sampler["options"] = ["options", 0]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_same_picture_as_the_command_line(server, prompt, tmp_path):
    prompt["negative"] = copy.deepcopy(prompt["text"])
    prompt["negative"]["inputs"]["text"] = "apple"
    prompt["sampler"]["inputs"]["negative"] = ["negative", 0]
    (picture,) = succeed(server, prompt)
    model = server.base / "models" / "tokenshuffle" / "tiny.safetensors"
    command = [server.host.python, "-m", "tokenshuffle_core", "generate", "a red apple"]
    command += ["--model", model, "--output", tmp_path / "cli.png", "--seed", "7", "--cfg", "2"]
    command += ["--negative", "apple", "--width", "32", "--height", "48", "--device", "cpu"]
    subprocess.run(command, cwd=comfyui.PACK, check=True)
    np.testing.assert_array_equal(picture, pixels((tmp_path / "cli.png").read_bytes()))


def test_a_text_of_another_node_is_a_prompt(server, prompt):
    """As that of ComfyUI's TextGenerate, whose output has the type of this one."""
    expected = succeed(server, prompt)
    prompt["written"] = {"class_type": "PrimitiveString", "inputs": {"value": "a red apple"}}
    prompt["text"]["inputs"]["text"] = ["written", 0]
    np.testing.assert_array_equal(succeed(server, prompt), expected)
    nodes = server.get("/object_info")
    (accepted, *_) = nodes["TokenShufflePrompt"]["input"]["required"]["text"]
    assert nodes["PrimitiveString"]["output"] == [accepted] == ["STRING"]
    if "TextGenerate" in nodes:  # which ComfyUI 0.3.64 lacks
        assert nodes["TextGenerate"]["output"] == [accepted]


def test_batch_and_tiles(server, prompt):
    prompt["sampler"]["inputs"]["batch_size"] = 2
    first, second = succeed(server, prompt)
    assert first.shape == second.shape == (48, 32, 3)
    assert (first != second).any()
    prompt["decode"]["inputs"]["tiled"] = True
    tiled, _ = succeed(server, prompt)
    assert tiled.shape == first.shape


def test_encode_gives_codes_that_decode(server, prompt):
    prompt["encode"] = {
        "class_type": "TokenShuffleVQEncode",
        "inputs": {"image": ["decode", 0], "vq": ["loader", 1]},
    }
    prompt["again"] = copy.deepcopy(prompt["decode"])
    prompt["again"]["inputs"]["codes"] = ["encode", 0]
    prompt["save"]["inputs"]["images"] = ["again", 0]
    (picture,) = succeed(server, prompt)
    assert picture.shape == (48, 32, 3)


@pytest.mark.parametrize(
    ("checkpoint", "side"), [("tiny.safetensors", 256), ("SimpleAR-1.5B-RL", 512)]
)
def test_interrupt_in_the_middle(server, prompt, checkpoint, side):
    long = copy.deepcopy(prompt)
    long["loader"]["inputs"]["checkpoint"] = checkpoint
    long["sampler"]["inputs"] |= {"width": side, "height": side, "batch_size": 64}
    prompt_id = workflows.submit(server.url, long)
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(1)
    workflows.http(f"{server.url}/interrupt", {})
    entry = workflows.wait(server.url, prompt_id, timeout=10)
    (message,) = [m for kind, m in entry["status"]["messages"] if kind == "execution_interrupted"]
    assert message["node_type"] == "TokenShuffleSampler"
    succeed(server, prompt)


def test_prompt_behind_an_interrupted_one_succeeds(server, prompt):
    expected = succeed(server, prompt)
    long = copy.deepcopy(prompt)
    long["sampler"]["inputs"] |= {"width": 256, "height": 256, "batch_size": 64}
    prompt["save"]["inputs"]["filename_prefix"] = "behind"  # not yet in ComfyUI's cache
    first, second = (workflows.submit(server.url, queued) for queued in (long, prompt))
    while [running[1] for running in server.get("/queue")["queue_running"]] != [first]:
        time.sleep(0.05)
    time.sleep(1)
    workflows.http(f"{server.url}/interrupt", {})
    kinds = [kind for kind, _ in workflows.wait(server.url, first)["status"]["messages"]]
    assert "execution_interrupted" in kinds
    entry = workflows.wait(server.url, second)
    assert entry["status"]["status_str"] == "success"
    (png,) = workflows.images(server.url, entry, "save")
    np.testing.assert_array_equal(pixels(png), expected[0])


def test_models_come_back_after_free(server, prompt):
    before = succeed(server, prompt)
    workflows.http(f"{server.url}/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    np.testing.assert_array_equal(succeed(server, prompt), before)


def test_checkpoint_that_changed_on_disk_is_loaded_anew(server, prompt, tiny):
    path = server.base / "models" / "tokenshuffle" / "changing.safetensors"
    parts = load(tiny)
    parts.save(path)
    prompt["loader"]["inputs"]["checkpoint"] = path.name
    (before,) = succeed(server, prompt)
    stamp = path.stat().st_mtime_ns
    parts.model.initialise()
    parts.card["modelspec.title"] = "an archive keeps the time, not the size"
    parts.save(path)
    os.utime(path, ns=(stamp, stamp))
    (after,) = succeed(server, prompt)
    assert (before != after).any()


def test_a_model_and_its_lora_are_overwritten_while_they_draw(server, prompt):
    """As by cp, in place: what is in memory draws on, and the next load sees the new file."""
    prompt["lora"] = {
        "class_type": "TokenShuffleLoraLoader",
        "inputs": {"model": ["loader", 0], "lora": "tiny.safetensors", "strength": 1.0},
    }
    prompt["text"]["inputs"]["model"] = prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    prompt["sampler"]["inputs"] |= {"width": 128, "height": 128}
    expected = succeed(server, prompt)
    models = server.base / "models"
    files = [models / folder / "overwritten.safetensors" for folder in ("tokenshuffle", "loras")]
    for file in files:
        file.write_bytes(file.with_name("tiny.safetensors").read_bytes())
    prompt["loader"]["inputs"]["checkpoint"] = prompt["lora"]["inputs"]["lora"] = files[0].name
    client = uuid.uuid4().hex
    with connect(f"{server.url.replace('http', 'ws')}/ws?clientId={client}") as socket:
        body = {"prompt": prompt, "client_id": client}
        prompt_id = json.loads(workflows.http(f"{server.url}/prompt", body))["prompt_id"]
        while '"progress"' not in str(socket.recv(timeout=60)):
            pass
        for file in files:
            file.write_bytes(b"")
    entry = workflows.wait(server.url, prompt_id)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    pictures = [pixels(png) for png in workflows.images(server.url, entry, "save")]
    np.testing.assert_array_equal(pictures, expected)
    message = fail(server, prompt)
    assert message["node_id"] == "loader"
    assert "overwritten.safetensors is not a readable" in message["exception_message"]
    for file in files:
        file.unlink()


@pytest.mark.parametrize(
    ("node", "values", "words"),
    [
        ("sampler", {"cfg": math.nan}, ["cfg", "nan"]),
        ("sampler", {"temperature": math.nan}, ["temperature", "nan"]),
        ("sampler", {"top_p": math.nan}, ["top_p", "nan"]),
        ("sampler", {"width": 20}, ["20", "8"]),
        ("sampler", {"width": 2048, "height": 2048}, ["2048"]),
        ("text", {"text": "word " * 3000}, ["prompt"]),
        ("loader", {"checkpoint": "broken.safetensors"}, ["broken.safetensors"]),
    ],
)
def test_bad_value_is_an_error_of_its_node(server, prompt, node, values, words):
    bad = copy.deepcopy(prompt)
    bad[node]["inputs"] |= values
    message = fail(server, bad)
    assert message["node_id"] == node
    assert message["exception_type"] in ("ValueError", "FileNotFoundError")
    for word in words:
        assert word in message["exception_message"]
    succeed(server, prompt)


@pytest.mark.parametrize(
    ("node", "values"),
    [
        ("sampler", {"cfg": 1000.0}),
        ("sampler", {"cfg": math.inf}),
        ("sampler", {"width": 0}),
        ("sampler", {"batch_size": 0}),
        ("sampler", {"seed": -1}),
        ("sampler", {"top_p": 0.0}),
        ("sampler", {"cfg": "three"}),
    ],
)
def test_value_outside_its_range_is_refused(server, prompt, node, values):
    prompt[node]["inputs"] |= values
    assert set(server.refusal(prompt)["node_errors"]) == {node}


@pytest.mark.parametrize(
    ("node", "values"),
    [
        ("sampler", {"schedule": "quadratic"}),
        ("loader", {"checkpoint": "../../secret.safetensors"}),
        ("loader", {"checkpoint": ""}),
    ],
)
def test_value_that_is_not_in_the_list(server, prompt, node, values):
    """ComfyUI 0.3.64 does not check the lists of V3 nodes, so there the node itself complains."""
    bad = copy.deepcopy(prompt)
    bad[node]["inputs"] |= values
    try:
        complaining = {fail(server, bad)["node_id"]}
    except urllib.error.HTTPError as error:
        complaining = set(json.loads(error.read())["node_errors"])
    assert complaining == {node}
    succeed(server, prompt)
