"""Every input of every node wrong once: the error names the node, and the server lives on."""

import json
import urllib.error
from collections.abc import Iterator

import pytest

from scripts import workflows

from .test_pack import NODES
from .test_prompts import succeed

# Texts that their nodes cannot work with. Every other kind of input has wrong values of its own.
WRONG_TEXTS = {
    ("TokenShufflePrompt", "text"): "word " * 3000,
    ("TokenShuffleXYSheet", "cfgs"): "one, two",
    ("TokenShuffleXYSheet", "windows"): "1.5",
    ("TokenShuffleSaveCodes", "filename_prefix"): "../../outside",
}
# Anything else is an accident inside a node. ComfyUI raises a plain Exception itself for a path
# outside its folders.
MEANT = ("ValueError", "FileNotFoundError", "Exception")


@pytest.fixture
def everything(server, prompt) -> dict:
    """A prompt with a node of each kind, its links from the nodes that give what it takes."""
    blank = {"width": 32, "height": 48, "batch_size": 1, "color": 0}
    prompt["picture"] = {"class_type": "EmptyImage", "inputs": blank}
    succeed(server, prompt | {"keep": saving(["sampler", 0])})  # for LoadCodes to find
    info = server.get("/object_info")
    sources = {
        "TOKENSHUFFLE_MODEL": ["loader", 0],
        "VAE": ["loader", 1],
        "TOKENSHUFFLE_PROMPT": ["text", 0],
        "LATENT": ["sampler", 0],
        "TOKENSHUFFLE_OPTIONS": ["TokenShuffleOptions", 0],
        "IMAGE": ["picture", 0],
        "FLOAT": ["start", 1],
        "*": ["text", 0],
    }
    prompt["start"] = {"class_type": "TokenShuffleStopwatch", "inputs": {"value": ["text", 0]}}
    for kind in NODES:
        inputs = {}
        for name, (type_, options) in workflows.inputs_of(info[kind]):
            choices = choices_of(type_, options)
            if choices:
                inputs[name] = choices[0]
            elif type_ in workflows.WIDGETS and not options.get("forceInput"):
                inputs[name] = options.get("default", "")
            else:
                inputs[name] = sources[type_]
        prompt[kind] = {"class_type": kind, "inputs": inputs}
    small = {"width": 32, "height": 48, "keep_top": 16, "seeds": 1, "cfgs": "1"}
    for node in prompt.values():
        node["inputs"] |= {name: small[name] for name in node["inputs"] if name in small}
    prompt["TokenShuffleLoader"]["inputs"]["checkpoint"] = "tiny.safetensors"
    of_classes = prompt["loader"]["inputs"] | {"checkpoint": "llamagen/c2i_B_256.pt"}
    prompt["classes"] = {"class_type": "TokenShuffleLoader", "inputs": of_classes}
    prompt["TokenShuffleClass"]["inputs"]["model"] = ["classes", 0]
    return prompt


def saving(codes: list) -> dict:
    inputs = {"codes": codes, "filename_prefix": "codes/everything"}
    return {"class_type": "TokenShuffleSaveCodes", "inputs": inputs}


def choices_of(type_, options: dict) -> list | None:
    """A combo's options; ComfyUI 0.3 may send them in the place of the type."""
    return type_ if isinstance(type_, list) else options.get("options")


def wrong_values(kind: str, name: str, type_, options: dict) -> Iterator[object]:
    yield ["nowhere", 0]
    if type_ != "*":
        yield ["loader", 0] if type_ == "IMAGE" else ["picture", 0]
    if choices_of(type_, options):
        yield "no such choice"
    elif type_ in ("INT", "FLOAT"):
        yield "three"
        if "max" in options:
            yield options["max"] + 1
            yield options["min"] - 1
    elif type_ == "STRING":
        yield WRONG_TEXTS[kind, name]


def complaint(server, prompt: dict) -> tuple[set[str], str]:
    """The nodes that a prompt's error names, and its text."""
    try:
        entry = server.run(prompt)
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
        return set(answer["node_errors"]), json.dumps(answer)
    messages = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    if not messages:
        return set(), "it ran"
    assert messages[0]["exception_type"].rpartition(".")[2] in MEANT, messages[0]
    return {messages[0]["node_id"]}, messages[0]["exception_message"]


def test_every_input_of_every_node_wrong_once(server, everything):
    info = server.get("/object_info")
    outputs = {kind: len(info[kind]["output"]) for kind in NODES}
    tried = 0
    for kind in sorted(NODES):
        show = {"class_type": "PreviewAny", "inputs": {"source": [kind, 0]}}
        ends = {"show": show} if outputs[kind] else {}
        right = {**{k: v for k, v in everything.items() if k not in NODES - {kind}}, **ends}
        right["TokenShuffleOptions"] = everything["TokenShuffleOptions"]
        del right["save"]
        assert complaint(server, right) == (set(), "it ran"), kind
        for name, (type_, options) in workflows.inputs_of(info[kind]):
            for value in wrong_values(kind, name, type_, options):
                wrong = {**right, kind: {"class_type": kind, "inputs": {**right[kind]["inputs"]}}}
                wrong[kind]["inputs"][name] = value
                nodes, text = complaint(server, wrong)
                assert kind in nodes, f"{kind}.{name} = {str(value)[:40]!r}: {text}"
                tried += 1
    assert tried > 2 * sum(len(workflows.inputs_of(info[kind])) for kind in NODES)
    everything["sampler"]["inputs"]["seed"] += 1  # not yet in ComfyUI's cache
    succeed(server, {k: v for k, v in everything.items() if k not in NODES})
