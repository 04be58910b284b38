"""What the user sees while a picture is sampled: the messages on the page's web socket."""

import io
import json
import struct
import urllib.parse
import uuid

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from scripts import workflows

IMAGE, TEXT = 1, 3  # ComfyUI's BinaryEventTypes


def watch(server, prompt, **extra) -> tuple[list[np.ndarray], list[str], list[int]]:
    """Run a prompt as a page does: its previews, its lines of text, its progress values."""
    client = uuid.uuid4().hex
    url = f"{server.url.replace('http', 'ws')}/ws?clientId={client}"
    pictures, lines, values = [], [], []
    with connect(url, max_size=None) as socket:
        body = {"prompt": prompt, "client_id": client, "extra_data": extra}
        workflows.http(f"{server.url}/prompt", body)
        while True:
            message = socket.recv(timeout=120)
            if isinstance(message, bytes):
                (kind,) = struct.unpack(">I", message[:4])
                if kind == IMAGE:
                    pictures.append(np.asarray(Image.open(io.BytesIO(message[8:]))))
                elif kind == TEXT:
                    (length,) = struct.unpack(">I", message[4:8])
                    assert message[8 : 8 + length] == b"sampler"
                    lines.append(message[8 + length :].decode())
                continue
            event = json.loads(message)
            if event["type"] == "progress":
                values.append(event["data"]["value"])
            assert event["type"] != "execution_error", event["data"]
            if event["type"] == "executing" and event["data"]["node"] is None:
                return pictures, lines, values


@pytest.fixture
def large(prompt) -> dict:
    prompt["sampler"]["inputs"] |= {"width": 256, "height": 256, "batch_size": 3}
    return prompt


def test_picture_grows_from_the_top(server, large):
    pictures, lines, values = watch(server, large)
    assert len(pictures) >= 3
    heights = []
    for picture in pictures:
        assert picture.shape == (512, 512, 3), "ComfyUI's preview size"
        painted = np.abs(picture.astype(int) - 128).max((1, 2)) > 16
        heights.append(int(np.nonzero(painted)[0].max(initial=-1)) + 1)
    assert heights == sorted(heights)
    assert heights[0] == 0, "the first one takes the place of an earlier picture"
    assert 0 < heights[-2] < 512, "the rest is neutral"
    assert heights[-1] == 512, "the last one stays, and has all rows"
    assert values == sorted(values)
    assert values[-1] == 1024
    assert lines[-1].startswith("1024 / 1024 positions, ")
    assert any(line.endswith(" left") for line in lines)


def test_a_public_models_picture_grows_too(server, prompt):
    prompt["loader"]["inputs"]["checkpoint"] = "SimpleAR-1.5B-RL"
    prompt["sampler"]["inputs"] |= {"width": 512, "height": 512, "schedule": "constant"}
    pictures, lines, _ = watch(server, prompt)
    assert len(pictures) >= 3
    assert not np.array_equal(pictures[0], pictures[-1])
    assert lines[-1].startswith("1024 / 1024 positions, ")


def saved(server) -> np.ndarray:
    """The first picture of the last prompt."""
    *_, entry = server.get("/history?max_items=1").values()
    image = entry["outputs"]["save"]["images"][0]
    query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
    return np.asarray(Image.open(io.BytesIO(workflows.http(f"{server.url}/view?{query}"))))


@pytest.mark.parametrize("checkpoint", ["tiny.safetensors", "emoji.safetensors"])
def test_what_stays_is_the_finished_picture(server, prompt, checkpoint):
    """However soon it is finished; also after a prompt that was interrupted."""
    prompt["loader"]["inputs"]["checkpoint"] = checkpoint
    for seed in (31, 32, 33):
        prompt["sampler"]["inputs"] |= {"seed": seed, "width": 128, "height": 128}
        pictures, _, _ = watch(server, prompt)
        assert np.ptp(pictures[0]) < 16
        shown = Image.fromarray(pictures[-1]).resize((128, 128), Image.Resampling.BOX)
        difference = np.abs(np.asarray(shown).astype(int) - saved(server)).mean()
        assert difference < 12, "of 255: JPEG of what is noise with random weights"


def test_previews_are_off_where_the_user_wants_none(server, large):
    if server.host.version.startswith("0.3."):
        pytest.skip("this ComfyUI has no preview setting for each prompt")
    large["sampler"]["inputs"]["seed"] = 8  # not yet in ComfyUI's cache
    pictures, lines, _ = watch(server, large, preview_method="none")
    assert pictures == []
    assert lines
