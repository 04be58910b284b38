"""Text to image on a running ComfyUI: python client.py "a red apple" apple.png [URL]"""

import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

text, output, url, *_ = [*sys.argv[1:], "http://127.0.0.1:8188"]


def call(path, data=None):
    body = data and json.dumps(data).encode()
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(url + path, body, headers)).read()


prompt = json.loads(Path(__file__).with_name("text_to_image_api.json").read_text())
prompt["prompt"]["inputs"]["text"] = text
number = json.loads(call("/prompt", {"prompt": prompt}))["prompt_id"]
while not (history := json.loads(call(f"/history/{number}"))):
    time.sleep(0.5)
(image,) = history[number]["outputs"]["save"]["images"]
Path(output).write_bytes(call(f"/view?{urllib.parse.urlencode(image)}"))
