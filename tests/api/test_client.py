"""What the client of the API says where there is no picture; tests/host has it draw one."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.client import load_client

QUEUED = {"queue_running": [[0, "job", {}]], "queue_pending": []}
IDLE = {"queue_running": [], "queue_pending": []}
ACCEPTED = {"/prompt": {"prompt_id": "job"}, "/queue": QUEUED, "/history/job": {}}


@pytest.fixture
def client(monkeypatch):
    module = load_client()
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    monkeypatch.setattr(module, "DEADLINE", 1)
    return module


@contextmanager
def answering(answers: dict):
    """A server with an answer for each path: what JSON has, or bytes of any kind; none for others.
    Yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path)
            if answer is None:
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(*messages) -> dict:
    return {"/history/job": {"job": {"status": {"messages": messages}, "outputs": {}}}}


ERROR = {"node_id": "7", "node_type": "Sampler", "exception_message": "the width is odd\n"}


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (ACCEPTED | {"/queue": IDLE}, "no such job: it was deleted"),
        (
            ACCEPTED | entry(["execution_error", ERROR]),
            r"the node 7 \(Sampler\): the width is odd$",
        ),
        (ACCEPTED | entry(["execution_interrupted", {}]), "interrupted"),
        (ACCEPTED | entry(["execution_success", {}]), "saved no picture"),
        (ACCEPTED, "not ended within 1 s"),
        (ACCEPTED | {"/queue": None}, "the server has gone"),
        (ACCEPTED | {"/history/job": b"<html>"}, "does not answer as ComfyUI"),
        ({"/prompt": b"<html>"}, "does not answer as ComfyUI"),
        ({"/prompt": []}, "does not answer as ComfyUI"),
        ({}, "does not answer as ComfyUI"),
    ],
)
def test_what_it_says_where_there_is_no_picture(client, tmp_path, answers, sentence):
    output = tmp_path / "a.png"
    with answering(answers) as url, pytest.raises(client.Failure, match=sentence):
        client.main("a red apple", str(output), url)
    assert not output.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:8188", "http://no such host/"])
def test_no_server(client, tmp_path, url):
    with pytest.raises(client.Failure, match="does not answer"):
        client.main("a red apple", str(tmp_path / "a.png"), url)


def test_no_place_for_the_picture(client, tmp_path):
    for output in (tmp_path, tmp_path / "none" / "a.png"):
        with pytest.raises(client.Failure, match="folder"):
            client.main("a red apple", str(output), "http://127.0.0.1:1")
