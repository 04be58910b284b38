"""Models as others published them, in ComfyUI's own folders."""

import pytest

from scripts import workflows

from .test_prompts import allow_any_size


def picture_of(server, prompt) -> tuple[int, int]:
    import io

    from PIL import Image

    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    (image,) = workflows.images(server.url, entry, "save")
    return Image.open(io.BytesIO(image)).size


@pytest.mark.parametrize("checkpoint", ["llamagen/c2i_B_256.pt", "c2i_L_384.pt"])
def test_llamagen(server, prompt, checkpoint):
    prompt["loader"]["inputs"]["checkpoint"] = checkpoint
    prompt["text"] = {
        "class_type": "TokenShuffleClass",
        "inputs": {"model": ["loader", 0], "name": "golden retriever"},
    }
    prompt["sampler"]["inputs"] |= {"schedule": "constant", "cfg": 4.0, "top_k": 50}
    assert picture_of(server, prompt) == (32, 48)


@pytest.mark.parametrize("checkpoint", ["Janus-Pro-1B", "Janus-1.3B", "from_llama.safetensors"])
def test_janus_in_both_layouts_and_a_start_from_a_llama(server, prompt, checkpoint):
    prompt["loader"]["inputs"]["checkpoint"] = checkpoint
    prompt["sampler"]["inputs"] |= {"schedule": "constant", "cfg": 5.0, "width": 16, "height": 16}
    assert picture_of(server, prompt) == (16, 16)


def test_simplear(server, prompt):
    prompt["loader"]["inputs"]["checkpoint"] = "SimpleAR-1.5B-RL"
    prompt["sampler"]["inputs"] |= {"schedule": "constant", "cfg": 6.0, "width": 256, "height": 256}
    assert picture_of(server, prompt) == (256, 256)


@pytest.mark.parametrize(("checkpoint", "side"), [("Emu3.5-Image", 64), ("Wallaroo", 352)])
def test_models_with_row_ends(server, prompt, checkpoint, side):
    prompt["loader"]["inputs"]["checkpoint"] = checkpoint
    prompt["sampler"]["inputs"] |= {"schedule": "constant", "width": side, "height": side}
    allow_any_size(prompt)
    assert picture_of(server, prompt) == (side, side)


def test_a_class_for_a_model_that_reads_text(server, prompt):
    prompt["text"] = {
        "class_type": "TokenShuffleClass",
        "inputs": {"model": ["loader", 0], "name": "golden retriever"},
    }
    messages = str(server.run(prompt)["status"]["messages"])
    assert "this model reads text, not classes" in messages


def test_a_class_that_does_not_exist(server, prompt):
    prompt["loader"]["inputs"]["checkpoint"] = "llamagen/c2i_B_256.pt"
    prompt["text"]["inputs"]["text"] = "goldn retriver"
    assert "golden retriever (207)" in str(server.run(prompt)["status"]["messages"])


@pytest.mark.parametrize(
    ("checkpoint", "title"),
    [
        ("llamagen/c2i_B_256.pt", "c2i_B_256"),
        ("Janus-Pro-1B", "Janus-Pro-1B"),
        ("SimpleAR-1.5B-RL", "SimpleAR-1.5B-RL"),
    ],
)
def test_the_page_learns_what_it_is(server, checkpoint, title):
    found = server.get(f"/tokenshuffle/model?checkpoint={checkpoint}")
    assert found["card"]["title"] == title
    assert found["windows"] == [1]
    assert found["generation"]["schedule"] == "constant"
