"""The pack's models under ComfyUI's memory management."""

import json
import subprocess
from pathlib import Path

import pytest

from scripts import comfyui
from tokenshuffle_core import checkpoint

PLENTY = 2**34


@pytest.fixture(scope="module")
def cards(server, tiny) -> dict[float, dict]:
    """What small_card.py found, by the share of the model's bytes that the card has free."""
    size = sum(weight.nbytes for weight in checkpoint.load(tiny).model.parameters())
    free = {0.0: 0, 0.5: size // 2, 1.0: PLENTY}
    command = [server.host.python, Path(__file__).with_name("small_card.py"), server.host.clone]
    command += [comfyui.PACK, tiny, *map(str, free.values())]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [result["model"]["size"] for result in results] == [size] * 3
    return dict(zip(free, results, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_small_card_holds_a_part_and_computes_the_same(cards, share):
    if share and cards[share]["floor"]:
        pytest.skip("this ComfyUI keeps at least 128 MiB of a model on the card")
    model = cards[share]["model"]
    assert model["loaded"] <= share * model["size"]
    if share:
        assert model["loaded"] > 0
    for same in ("same_codes", "same_image", "same_encoding"):
        assert cards[share][same]


def test_large_card_holds_both_until_it_is_told_to_unload(cards):
    for module in ("model", "vq"):
        assert cards[1.0][module]["loaded"] == cards[1.0][module]["size"]
    assert cards[1.0]["same_codes"]
    assert cards[1.0]["known"] == 2
    assert cards[1.0]["after"] == [0, 0]
