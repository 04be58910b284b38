"""Files of the nodes on a real server: their names, and what is in them."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .test_joints import codes_in, core, run
from .test_nodes import node
from .test_prompts import fail, succeed

SAMPLING = {"schedule": "constant", "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def options_of(server, kind: str, name: str) -> list[str]:
    info = server.get(f"/object_info/{kind}")[kind]
    kind, options = info["input"]["required"][name]
    return kind if isinstance(kind, list) else options["options"]


@pytest.mark.parametrize(
    "prefix",
    [
        "%year%/%month%-%day%/%width%x%height%",
        "%batch_num%, %no such%",
        "c/d/e/红",
        pytest.param("r" * 240, id="240 letters"),
    ],
)
def test_codes_are_named_as_pictures(server, prompt, prefix):
    prompt["save"]["inputs"]["filename_prefix"] = prefix
    prompt["keep"] = node("SaveCodes", codes=["sampler", 0], filename_prefix=prefix)
    entry = run(server, prompt)
    (picture,), (codes,) = entry["outputs"]["save"]["images"], entry["outputs"]["keep"]["codes"]
    assert (codes["subfolder"], codes["type"]) == (picture["subfolder"], picture["type"])
    # Without the number, which is the next of the folder.
    names = [file["filename"].rsplit("_", 2)[0] for file in (codes, picture)]
    assert names[0] == names[1]
    assert names[0] != prefix or "%" not in prefix
    listed = Path(codes["subfolder"], codes["filename"]).as_posix() + " [output]"
    assert listed in options_of(server, "TokenShuffleLoadCodes", "file")
    assert codes_in(server, entry, "keep").shape == (1, 12, 8)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [("a\0b", "NUL"), ("\ud800", "lone surrogate"), ("../../out", "outside the output folder")],
)
def test_names_that_are_none(server, prompt, prefix, words):
    prompt["save"] = node("SaveCodes", codes=["sampler", 0], filename_prefix=prefix)
    message = fail(server, prompt)
    assert message["node_id"] == "save"
    assert words in message["exception_message"]


def test_the_page_fills_in_names_as_for_pictures(page):
    prefix = "%date:yyyy-MM%/%TokenShuffleSampler.width%/%no.such%"
    found = page.page.evaluate(
        """async (prefix) => {
            const types = ['SaveImage', 'TokenShuffleSaveCodes', 'TokenShuffleSampler']
            const nodes = types.map((type) => window.LiteGraph.createNode(type))
            for (const node of nodes) {
                window.app.graph.add(node)
                const widget = node.widgets.find((each) => each.name === 'filename_prefix')
                if (widget) widget.value = prefix
            }
            const { output } = await window.app.graphToPrompt()
            const sent = nodes.map((node) => output[node.id].inputs.filename_prefix)
            nodes.forEach((node) => window.app.graph.remove(node))
            return sent.slice(0, 2)
        }""",
        prefix,
    )
    assert found[0] == found[1]
    assert re.fullmatch(r"\d{4}-\d\d/\d+/%no\.such%", found[0])


def test_codes_of_comfyuis_vae_encode(server, prompt):
    prompt["save"] = node("SaveCodes", codes=["theirs", 0], filename_prefix="codes/theirs")
    prompt["theirs"] = core("VAEEncode", pixels=["decode", 0], vae=["loader", 1])
    message = fail(server, prompt)
    assert message["node_id"] == "save"
    assert "connect the vq of the model that it is from" in message["exception_message"]
    prompt["save"]["inputs"]["vq"] = ["loader", 1]
    prompt["encode"] = node("VQEncode", image=["decode", 0], vq=["loader", 1])
    prompt["keep"] = node("SaveCodes", codes=["encode", 0], filename_prefix="codes/ours")
    entry = run(server, prompt)
    np.testing.assert_array_equal(codes_in(server, entry, "save"), codes_in(server, entry, "keep"))
    prompt["other"] = node("Loader", checkpoint="emoji.safetensors")
    prompt["keep"]["inputs"]["vq"] = ["other", 1]
    message = fail(server, prompt)
    assert message["node_id"] == "keep"
    assert "another image tokenizer" in message["exception_message"]


def test_models_that_are_links(server, prompt, tmp_path):
    """To a file, to a folder and file by file, and a folder of Hugging Face's cache. A Janus-Pro is
    told from a Janus by its folder's name, so that each has a "pro" in it."""
    expected = succeed(server, prompt)
    models = server.base / "models" / "tokenshuffle"
    original, own = models / "Janus-Pro-1B", models / "links"
    elsewhere = shutil.copy(models / "tiny.safetensors", tmp_path / "elsewhere")
    blobs = own / "models--deepseek-ai--Janus-Pro-1B" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0a1b"
    for folder in (own / "each-pro", blobs, snapshot):
        folder.mkdir(parents=True)
    try:
        (own / "file.safetensors").symlink_to(elsewhere)
        (own / "whole").symlink_to(original, target_is_directory=True)
        for number, file in enumerate(sorted(original.iterdir())):
            (own / "each-pro" / file.name).symlink_to(file)
            shutil.copy(file, blobs / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        names = {path.relative_to(models).as_posix() for path in (own / "each-pro", snapshot)}
        names |= {"links/file.safetensors", "links/whole"}
        assert names <= set(options_of(server, "TokenShuffleLoader", "checkpoint"))
        prompt["loader"]["inputs"]["checkpoint"] = "links/file.safetensors"
        np.testing.assert_array_equal(succeed(server, prompt), expected)
        side = {"width": 16, "height": 16}
        prompt["sampler"]["inputs"] |= side
        prompt["options"] = node("Options", **SAMPLING, any_size=True)
        prompt["sampler"]["inputs"]["options"] = ["options", 0]
        prompt["loader"]["inputs"]["checkpoint"] = "Janus-Pro-1B"
        expected = succeed(server, prompt)
        for name in sorted(names - {"links/file.safetensors"}):
            prompt["loader"]["inputs"]["checkpoint"] = name
            np.testing.assert_array_equal(succeed(server, prompt), expected)
    finally:
        shutil.rmtree(own)


def lora_with(server, name: str, change) -> str:
    folder = server.base / "models" / "loras"
    tensors = load_file(folder / "tiny.safetensors")
    with safe_open(folder / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, folder / name, metadata)
    return name


def test_a_lora_that_is_not_finite(server, prompt):
    nan = lora_with(server, "nan.safetensors", lambda t: t["head.alpha"].fill_(math.nan))
    prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    for lora, strength, words in (
        (nan, 1.0, "nan.safetensors: head holds numbers that are not finite"),
        ("tiny.safetensors", math.nan, "the strength of a LoRA must be a number from -100 to 100"),
    ):
        prompt["lora"] = node("LoraLoader", model=["loader", 0], lora=lora, strength=strength)
        message = fail(server, prompt)
        assert message["node_id"] == "lora"
        assert words in message["exception_message"]


def test_files_whose_suffix_is_in_capitals(server, prompt):
    models = server.base / "models" / "tokenshuffle"
    (models / "CAPITALS.SAFETENSORS").write_bytes((models / "tiny.safetensors").read_bytes())
    try:
        expected = succeed(server, prompt)
        assert "CAPITALS.SAFETENSORS" in options_of(server, "TokenShuffleLoader", "checkpoint")
        prompt["loader"]["inputs"]["checkpoint"] = "CAPITALS.SAFETENSORS"
        np.testing.assert_array_equal(succeed(server, prompt), expected)
    finally:
        (models / "CAPITALS.SAFETENSORS").unlink()
    lora = lora_with(server, "LORA.SAFETENSORS", lambda tensors: None)
    assert lora in options_of(server, "TokenShuffleLoraLoader", "lora")
