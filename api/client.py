"""Text to image on a running ComfyUI: python client.py "a red apple" apple.png [URL]

Exit status 1 and one sentence if there is no picture.
"""

import http.client
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

INTERVAL = 0.5  # seconds between two questions
PATIENCE = 30  # seconds without an answer, after which a server is given up
DEADLINE = 3600  # seconds that a job may take, with those before it


class Failure(Exception):
    """There is no picture; the text says why."""


def call(url: str, data: dict | None = None) -> bytes:
    """The answer to GET, or to POST with `data` as JSON. Raises OSError for none or a bad one."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return reply.read()
    except http.client.HTTPException as error:
        raise OSError(f"half an answer ({error!r})") from None


def submit(url: str, prompt: dict) -> str:
    """Queue a prompt in the API format. Returns the job's id."""
    try:
        return json.loads(call(f"{url}/prompt", {"prompt": prompt}))["prompt_id"]
    except urllib.error.HTTPError as error:
        raise Failure(f"the server refuses the prompt: {reasons(error.read())}") from None


def reasons(answer: bytes) -> str:
    """Why a prompt is refused: the errors of its nodes, or else that of the whole."""
    try:
        answer = json.loads(answer)
        nodes = answer.get("node_errors") or {}
        found = [
            f"{node}: {error['message']} ({error['details']})"
            for node, about in nodes.items()
            for error in about["errors"]
        ]
        return "; ".join(found) or answer["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return repr(answer)[:200]


def wait(url: str, job: str) -> dict:
    """The outputs of a job once it has ended: node -> what it saved."""
    began = heard = time.monotonic()
    while time.monotonic() - began < DEADLINE:
        try:
            # In this order: a job goes from the queue to the history.
            queue = json.loads(call(f"{url}/queue"))
            history = json.loads(call(f"{url}/history/{job}"))
            heard = time.monotonic()
        except OSError as error:
            if time.monotonic() - heard > PATIENCE:
                raise Failure(f"the server has gone: {error}") from None
        else:
            if job in history:
                return outputs(history[job])
            if not any(item[1] == job for items in queue.values() for item in items):
                raise Failure("the server has no such job: it was deleted, or the server restarted")
        time.sleep(INTERVAL)
    raise Failure(f"the job has not ended within {DEADLINE} s")


def outputs(entry: dict) -> dict:
    """Those of a job in the history, if it has succeeded."""
    for kind, about in (entry.get("status") or {}).get("messages", []):
        if kind == "execution_error":
            node, text = about["node_id"], about["exception_message"].strip()
            raise Failure(f"the node {node} ({about['node_type']}): {text}")
        if kind == "execution_interrupted":
            raise Failure("the job was interrupted")
    return entry["outputs"]


def main(text: str, output: str, url: str = "http://127.0.0.1:8188") -> None:
    """Draw a prompt with the workflow beside this file, and save the picture."""
    if not Path(output).parent.is_dir() or Path(output).is_dir():
        raise Failure(f"{output} is a folder or in one that does not exist")
    prompt = json.loads(Path(__file__).with_name("text_to_image_api.json").read_text())
    prompt["prompt"]["inputs"]["text"] = text
    url = url.rstrip("/")
    try:
        saved = wait(url, submit(url, prompt)).get("save", {}).get("images", [])
        if not saved:
            raise Failure("the job saved no picture")
        picture = call(f"{url}/view?{urllib.parse.urlencode(saved[0])}")
    except (OSError, ValueError, LookupError, TypeError) as error:  # also of what is not its answer
        raise Failure(f"{url} does not answer as ComfyUI does: {error}") from None
    Path(output).write_bytes(picture)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (Failure, OSError) as error:
        sys.exit(f"client.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
