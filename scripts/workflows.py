"""Runs the example workflows on a ComfyUI host and saves the picture of each beside it.

    python -m scripts.workflows [--version 0.33.0]

The PNG carries the workflow, so dropping it on the canvas restores the graph; the JPEG is its
thumbnail in the template browser. Run it again after a workflow, a node or the bundled model has
changed. Needs Pillow.
"""

import argparse
import json
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from . import comfyui

WORKFLOWS = comfyui.PACK / "workflows"
PATHS = sorted(WORKFLOWS.glob("*.json"))
# They use checkpoints of other projects.
NEEDS_DOWNLOAD = {"Beside a diffusion model", "Janus-Pro", "LlamaGen", "SimpleAR"}
THUMBNAIL = (400, 400)
NOTES = ("MarkdownNote", "Note")  # of the page alone
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def http(url: str, data: dict | None = None) -> bytes:
    """GET, or POST with `data` as JSON. An HTTPError's body has the reason."""
    body = None if data is None else json.dumps(data).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as reply:
        return reply.read()


def to_api(workflow: dict, object_info: dict) -> dict:
    """Converts the page's format to that of POST /prompt, as the page does on Run."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        linked = {slot["name"]: slot["link"] for slot in node["inputs"]}
        values = iter(node["widgets_values"])
        inputs = {}
        for name, (kind, *options) in inputs_of(object_info[node["type"]]):
            settings = options[0] if options else {}
            if (isinstance(kind, list) or kind in WIDGETS) and not settings.get("forceInput"):
                # An input that is newer than the workflow has its default.
                inputs[name] = next(values, settings.get("default"))
                if settings.get("control_after_generate"):
                    next(values)  # fixed, increment, decrement or randomize: the page's business
            if linked.get(name) is not None:
                inputs[name] = sources[linked[name]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def inputs_of(info: dict) -> list[tuple[str, list]]:
    return [*info["input"]["required"].items(), *info["input"].get("optional", {}).items()]


def submit(url: str, prompt: dict, **extra) -> str:
    """Queues a prompt in the API format with its extra data and returns its id."""
    return json.loads(http(f"{url}/prompt", {"prompt": prompt, "extra_data": extra}))["prompt_id"]


def wait(url: str, prompt_id: str, timeout: float = 600) -> dict:
    """The history entry of a prompt, once it has succeeded, failed or been interrupted."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        history = json.loads(http(f"{url}/history/{prompt_id}"))
        if prompt_id in history:
            return history[prompt_id]
        time.sleep(0.1)
    raise TimeoutError(f"the prompt did not end within {timeout:.0f} s")


def images(url: str, entry: dict, node: str) -> list[bytes]:
    """The PNG files that a SaveImage or PreviewImage node wrote."""
    return [
        http(f"{url}/view?{urllib.parse.urlencode(image)}")
        for image in entry["outputs"][node]["images"]
    ]


def render(url: str, path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    object_info = json.loads(http(f"{url}/object_info"))
    if path.stem in NEEDS_DOWNLOAD:
        return carry(path, workflow, to_api(workflow, object_info))
    extra = {"extra_pnginfo": {"workflow": workflow}}
    entry = wait(url, submit(url, to_api(workflow, object_info), **extra))
    if entry["status"]["status_str"] != "success":
        raise RuntimeError(f"{path.name} failed: {entry['status']['messages'][-1]}")
    (saver,) = (str(node["id"]) for node in workflow["nodes"] if node["type"] == "SaveImage")
    path.with_suffix(".png").write_bytes(images(url, entry, saver)[0])


def carry(path: Path, workflow: dict, prompt: dict) -> None:
    """Gives the PNG, which was made by hand, the present workflow as SaveImage would."""
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(prompt))
    texts.add_text("workflow", json.dumps(workflow))
    with Image.open(path.with_suffix(".png")) as picture:
        picture.load()
    picture.save(path.with_suffix(".png"), pnginfo=texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", help="version or name of the host (default: the newest)")
    arguments = parser.parse_args()
    url = f"http://127.0.0.1:{(port := comfyui.free_port())}"
    with tempfile.TemporaryDirectory() as base:
        try:
            host = comfyui.find_host(arguments.version)
            with comfyui.running(host, Path(base), port):
                for path in PATHS:
                    render(url, path)
                    with Image.open(path.with_suffix(".png")) as picture:
                        picture = picture.convert("RGB")
                        if path.stem in NEEDS_DOWNLOAD:  # the graph: its left, with the loader
                            small = ImageOps.fit(picture, THUMBNAIL, centering=(0, 0.5))
                        else:
                            small = ImageOps.pad(picture, THUMBNAIL, color="white")
                    small.save(path.with_suffix(".jpg"), quality=85)
                    print(path.with_suffix(".png"))
        except (ValueError, RuntimeError, TimeoutError, urllib.error.HTTPError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
