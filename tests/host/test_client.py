"""The client of the API on a real server; tests/api has what it says to a server that goes away."""

import json
import threading
import time

import pytest

from scripts import workflows
from tests.support.client import load_client

from .test_prompts import pixels


@pytest.fixture(scope="module")
def client():
    return load_client()


def test_the_same_picture_twice(server, client, tmp_path):
    outputs = tmp_path / "a.png", tmp_path / "b.png"
    for output in outputs:
        client.main("a red apple", str(output), f"{server.url}/")
    first, second = (pixels(output.read_bytes()) for output in outputs)
    assert (first == second).all()


def test_a_job_that_fails(server, client, tmp_path):
    with pytest.raises(client.Failure, match=r"the node prompt \(TokenShufflePrompt\): the prompt"):
        client.main("word " * 3000, str(tmp_path / "a.png"), server.url)
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_is_refused(server, client, prompt):
    prompt["sampler"]["inputs"]["seed"] = -1
    with pytest.raises(client.Failure, match=r"refuses the prompt: sampler: .*seed"):
        client.submit(server.url, prompt)
    with pytest.raises(client.Failure, match="refuses the prompt: "):
        client.submit(server.url, {"a": {"class_type": "NoSuchNode", "inputs": {}}})


@pytest.mark.parametrize("end", ["delete", "interrupt"])
def test_a_job_that_is_stopped(server, client, prompt, end):
    prompt["sampler"]["inputs"] |= {"width": 256, "height": 256, "batch_size": 64}
    running = client.submit(server.url, prompt)
    job = client.submit(server.url, prompt) if end == "delete" else running
    said = []

    def wait():
        try:
            client.wait(server.url, job)
        except client.Failure as failure:
            said.append(str(failure))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while running not in json.dumps(server.get("/queue")["queue_running"]):
        time.sleep(0.05)
    if end == "delete":
        workflows.http(f"{server.url}/queue", {"delete": [job]})
        waiting.join(10)
    workflows.http(f"{server.url}/interrupt", {})
    waiting.join(10)
    words = {"delete": "has no such job: it was deleted", "interrupt": "the job was interrupted"}
    assert len(said) == 1
    assert words[end] in said[0]
