"""A real ComfyUI server with this pack, once for every host that scripts/comfyui.py set up."""

import json
import shutil
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scripts import comfyui, workflows
from tests.support.loras import write_random_lora
from tests.support.public_models import write_emu, write_simplear, write_wallaroo
from tests.support.published import (
    janus,
    llama,
    write_janus,
    write_llama,
    write_llamagen,
    write_original_janus,
)
from tokenshuffle_core import checkpoints
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.text_tokenizer import TextTokenizer

from .pages import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NEWEST_ALONE = (
    "test_page", "test_nodes", "test_preview", "test_search", "test_canvas", "test_panels",
    "test_prompts", "test_joints", "test_wrong_inputs", "test_translations",
    "test_client", "test_files", "test_workflows", "test_published",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    host: comfyui.Host
    url: str
    base: Path
    log: Path
    pid: int
    start: list[str]  # what it had printed when it was ready

    def get(self, path: str):
        return json.loads(workflows.http(self.url + path))

    def run(self, prompt: dict) -> dict:
        return workflows.wait(self.url, workflows.submit(self.url, prompt))

    def refusal(self, prompt: dict) -> dict:
        """The answer to a prompt that does not get past validation."""
        with pytest.raises(urllib.error.HTTPError) as error:
            workflows.submit(self.url, prompt)
        assert error.value.code == 400
        return json.loads(error.value.read())


def pytest_itemcollected(item):
    """What is the same on every host is tested by default on the newest alone, which saves
    minutes; one worker of pytest-xdist takes all, so that each server starts once."""
    item.add_marker(pytest.mark.host)
    item.add_marker(pytest.mark.xdist_group("host"))
    *others, _ = comfyui.hosts() or [None]
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if item.path.stem in NEWEST_ALONE and params.get("server") in others:
        item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint with random weights: 8 pixels a window, 64 windows a side at most."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)  # of weights drawn anew, now and then two pictures are the same
    model = TokenShuffleModel(config.model)
    model.initialise()
    text_tokenizer = TextTokenizer.train(["a red apple"], 512, config.model.max_grid)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    parts = (config, model, ImageTokenizer(config.image_tokenizer), text_tokenizer, {})
    Pipeline(*parts).save(path)
    return path


@pytest.fixture(
    scope="session", params=comfyui.hosts() or [None], ids=lambda host: getattr(host, "name", "")
)
def server(request, tiny, tmp_path_factory):
    host = request.param
    if host is None:
        pytest.skip(f"no ComfyUI host: {comfyui.HOW_TO_GET_ONE}")
    base = tmp_path_factory.mktemp(f"comfyui-{host.name}")
    comfyui.prepare_base(base)
    models = base / "models" / "tokenshuffle"
    models.mkdir()
    (models / "tiny.safetensors").write_bytes(tiny.read_bytes())
    (models / "broken.safetensors").write_bytes(tiny.read_bytes()[:1000])
    write_llamagen(models / "llamagen")
    write_janus(janus(), models / "Janus-Pro-1B")
    write_simplear(models / "SimpleAR-1.5B-RL")
    write_emu(models / "Emu3.5-Image")
    write_wallaroo(models / "Wallaroo")
    write_original_janus(janus(), models / "Janus-1.3B")
    write_llama(llama(True), base / "llama")
    vq = models / "llamagen" / "vq_ds16_c2i.pt"
    checkpoints.convert(base / "llama", models / "from_llama.safetensors", image_tokenizer=vq)
    others = base / "models" / "checkpoints"
    others.mkdir(exist_ok=True)
    write_llamagen(others).rename(others / "c2i_L_384.pt")
    (others / "sd.safetensors").write_bytes(b"")  # of another kind, which is not listed
    (base / "models" / "loras").mkdir()
    write_random_lora(base / "models" / "loras" / "tiny.safetensors", tiny)
    port = comfyui.free_port()
    log_path = base / "log.txt"
    extra = ["--preview-method", "auto"]
    with log_path.open("w") as log, comfyui.running(host, base, port, extra, log) as process:
        url, started = f"http://127.0.0.1:{port}", log_path.read_text().splitlines()
        yield Server(host, url, base, log_path, process.pid, started)
        assert process.poll() is None, "the server died during the tests"


@pytest.fixture
def prompt():
    """A text-to-image prompt in the API format for the tiny model; a new one for every test."""
    return {
        "loader": _node("TokenShuffleLoader", checkpoint="tiny.safetensors"),
        "text": _node("TokenShufflePrompt", model=["loader", 0], text="a red apple"),
        "sampler": _node(
            "TokenShuffleSampler",
            model=["loader", 0],
            positive=["text", 0],
            width=32,
            height=48,
            batch_size=1,
            seed=7,
            cfg=2.0,
            schedule="half-linear",
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        ),
        "decode": _node(
            "TokenShuffleVQDecode", codes=["sampler", 0], vq=["loader", 1], tiled=False
        ),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def _node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    programs = [found for name in BROWSERS if (found := shutil.which(name))]
    if not programs:
        pytest.skip(f"no browser: one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=programs[0], args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session", params=["dark", pytest.param("light", marks=pytest.mark.slow)])
def page(request, server, browser):
    """The dark theme with nodes on the canvas; the light one with Vue nodes where there are any."""
    opened = Page(
        browser.new_page(viewport={"width": 1600, "height": 1000}),
        f"{server.host.version}-{request.param}",
    )
    opened.open(server.url)
    opened.set("Comfy.ColorPalette", request.param)
    if request.param == "light" and not server.host.version.startswith("0.3."):
        opened.set("Comfy.VueNodes.Enabled", True)
    yield opened
    opened.page.close()
    assert opened.complaints == []
