"""A model of SimpleAR-1.5B's size with random weights, drawing 1024 px."""

import json
import struct
import time
import uuid

import psutil
import pytest
from websockets.sync.client import connect

from benchmarks.models import COSMOS, SIMPLEAR
from benchmarks.simplear import write
from scripts import workflows
from tokenshuffle_core.checkpoints import skeleton

from .test_preview import IMAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not psutil.LINUX, reason="elsewhere psutil does not say what files take"),
    pytest.mark.skipif(psutil.virtual_memory().available < 12 * 2**30, reason="needs 12 GiB"),
]


@pytest.fixture
def checkpoint(server):
    path = server.base / "models" / "tokenshuffle" / "full-size.safetensors"
    write(path, SIMPLEAR, COSMOS, 64)
    yield path.name
    path.unlink()


def test_previews_interrupt_and_memory(server, prompt, checkpoint):
    """Float32 weights alone would take 6.5 GiB. The preview keeps the image tokenizer loaded."""
    prompt["loader"]["inputs"]["checkpoint"] = checkpoint
    prompt["sampler"]["inputs"] |= {
        "width": 1024, "height": 1024, "cfg": 6.0, "schedule": "constant", "seed": 1,
    }  # fmt: skip
    client, previews, done = uuid.uuid4().hex, 0, 0
    process = psutil.Process(server.pid)
    before, most = anonymous(process), 0
    with connect(f"{server.url.replace('http', 'ws')}/ws?clientId={client}", max_size=None) as page:
        body = {"prompt": prompt, "client_id": client}
        answer = json.loads(workflows.http(f"{server.url}/prompt", body))
        while previews < 3 or done < 64:
            message = page.recv(timeout=180)
            most = max(most, anonymous(process))
            if isinstance(message, bytes):
                previews += struct.unpack(">I", message[:4]) == (IMAGE,)
            elif (event := json.loads(message))["type"] == "progress":
                done = event["data"]["value"]
                assert event["data"]["max"] == 4096
        workflows.http(f"{server.url}/interrupt", {})
        asked = time.monotonic()
        entry = workflows.wait(server.url, answer["prompt_id"], timeout=30)
    took = time.monotonic() - asked
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert took < 3
    weights = 4 * sum(weight.numel() for weight in skeleton(SIMPLEAR).state_dict().values())
    print(f"{(most - before) / weights:.2f} x the weights in float32, interrupted in {took:.2f} s")
    assert most - before < 1.3 * weights


def anonymous(process: psutil.Process) -> int:
    """Bytes of its memory that no file is behind."""
    memory = process.memory_info()
    return memory.rss - memory.shared
