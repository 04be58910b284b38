"""The pack's models under ComfyUI's memory management."""

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from scripts import comfyui, workflows
from tests.support.public_models import write_simplear
from tokenshuffle_core.checkpoints import BUNDLED
from tokenshuffle_core.pipeline import load

from .test_prompts import allow_any_size

PLENTY = 2**34

pytestmark = pytest.mark.slow  # its server takes half a minute to start


@pytest.fixture(scope="module", params=["tiny", "simplear"])
def cards(server, tiny, request, tmp_path_factory) -> dict[float | str, dict]:
    """What small_card.py found, by the share of the model's bytes that the card has free, and the
    dtypes by ComfyUI's options; for a model of our own, and for one as published: a Qwen2 with
    tied weights."""
    checkpoint = tiny
    if request.param == "simplear":
        checkpoint = tmp_path_factory.mktemp("models") / "SimpleAR-0.5B-RL"
        write_simplear(checkpoint)
    model = load(checkpoint, dtype=torch.float32).model
    size = sum(weight.nbytes for weight in model.parameters())
    # At 0.6, the largest layer of each fits: a table of codes is almost half of SimpleAR here.
    free = {0.0: 0, 0.6: int(0.6 * size), 1.0: PLENTY}
    command = [server.host.python, Path(__file__).with_name("small_card.py"), server.host.clone]
    command += [comfyui.PACK, checkpoint, *map(str, free.values())]
    # On one thread, since sums of several may differ from run to run.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=alone
    ).stdout
    first, *results, seam, last = [
        json.loads(line) for line in output.splitlines() if line.startswith("{")
    ]
    assert [result["model"]["size"] for result in results] == [size] * 3
    return {**first, **dict(zip(free, results, strict=True)), **seam, **last}


def test_packed_weights_count_and_go_with_the_model(cards):
    found = cards["cpu"]
    assert found["same_codes"]
    assert found["packed"] > 0
    assert found["more"] == found["packed"]
    assert found["all_loaded"]
    assert found["kept"]  # for the next picture
    assert found["after"] == 0
    assert found["same_weights"]


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_small_card_holds_a_part_and_computes_the_same(cards, share):
    if share and cards[share]["floor"]:
        pytest.skip("this ComfyUI keeps at least 128 MiB of a model on the card")
    model = cards[share]["model"]
    assert model["loaded"] <= share * model["size"]
    assert model["owner"] == "host"
    if share:
        assert model["loaded"] > 0
    for same in ("same_codes", "same_image", "same_encoding"):
        assert cards[share][same], same


def test_large_card_holds_both_until_it_is_told_to_unload(cards):
    for module in ("model", "vq"):
        assert cards[1.0][module]["loaded"] == cards[1.0][module]["size"]
    assert cards[1.0]["same_codes"]
    assert cards[1.0]["model"]["owner"] == "engine"
    assert cards[1.0]["known"] == 2
    assert cards[1.0]["after"] == [0, 0]


def test_layers_are_the_engines_until_comfyui_moves_weights(cards):
    """The steps of `seam`, in their order. A patch is applied in place."""
    found = cards["seam"]
    assert found["owned"] == {
        "new": "host",
        "first": "engine",
        "second": "engine",
        "patched": "engine",
        "without the patch": "engine",
        "moved": "host",
        "streaming": "host",
        "loaded again": "engine",
        "unloaded": "host",
    }
    assert [name for name, same in found["same"].items() if not same] == ["patched"]
    assert found["kept"]["second"]
    assert not found["kept"]["patched"]
    assert found["freed"]
    assert found["fetched"] > 0
    assert found["sizes"] == 1


def test_comfyuis_options_choose_the_dtype(cards):
    assert cards["dtypes"] == {
        "force_fp16": "torch.float16",
        "fp32_unet": "torch.float32",
        "bf16_unet": "torch.bfloat16",
        "fp16_unet": "torch.float16",
        "fp8_e4m3fn_unet": "torch.bfloat16",  # the model has no 8 bit weights
        "fp32_vae": "torch.float32, torch.float32",
        "fp16_vae": "torch.float16, torch.float16",
        "bf16_vae": "torch.bfloat16, torch.bfloat16",
    }


@pytest.mark.slow
def test_a_hundred_prompts_leave_the_servers_memory_as_it_was(server, prompt):
    """The bundled model's KV cache has 2 MB for such a picture: a leak of it would be seen."""
    prompt["loader"]["inputs"]["checkpoint"] = BUNDLED.name
    prompt["sampler"]["inputs"] |= {"width": 32, "height": 32}
    allow_any_size(prompt)

    def run(seed: int) -> int:
        prompt["sampler"]["inputs"]["seed"] = seed
        assert server.run(prompt)["status"]["status_str"] == "success"
        return psutil.Process(server.pid).memory_info().rss

    for seed in range(20):  # caches fill, and the allocator takes what it needs
        before = run(seed)
    for seed in range(20, 120):
        after = run(seed)
    assert after - before < 20 * 2**20


def test_interrupt_gives_the_memory_back(server, prompt):
    def allocated() -> int:  # virtual memory: pages of the cache count before they are written
        return psutil.Process(server.pid).memory_info().vms

    # The bundled model's cache is large enough to stand out from the heaps of the server's threads.
    prompt["loader"]["inputs"]["checkpoint"] = BUNDLED.name
    prompt["sampler"]["inputs"] |= {"width": 32, "height": 32, "batch_size": 64}
    allow_any_size(prompt)
    server.run(prompt)  # takes what the server keeps: the model, threads and their heaps
    before = allocated()
    prompt["sampler"]["inputs"] |= {"width": 512, "height": 512}
    prompt_id = workflows.submit(server.url, prompt)
    # 64 pictures with two prompts each, 1024 positions, 6 layers' keys and values of 4 heads by 64.
    cache = 64 * 2 * 1024 * 6 * 2 * 4 * 64 * 4
    deadline = time.monotonic() + 60
    while allocated() < before + cache:
        assert time.monotonic() < deadline, "the picture was never begun"
        time.sleep(0.05)
    workflows.http(f"{server.url}/interrupt", {})
    entry = workflows.wait(server.url, prompt_id, timeout=10)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    time.sleep(1)
    assert allocated() < before + cache / 2
