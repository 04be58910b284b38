"""Options, completion, codes on disk and charts, on a real server."""

import copy
import subprocess

import numpy as np
import pytest
import torch

from scripts import comfyui
from tokenshuffle_core.config import WEIGHT_KINDS
from tokenshuffle_core.images import read_codes
from tokenshuffle_core.pipeline import load

from .test_prompts import allow_any_size, fail, pixels, succeed


def node(kind: str, **inputs) -> dict:
    return {"class_type": f"TokenShuffle{kind}", "inputs": inputs}


def test_options_take_the_place_of_the_samplers_own(server, prompt):
    prompt["sampler"]["inputs"] |= {"temperature": 0.5, "top_k": 7}
    expected = succeed(server, prompt)
    options = {"schedule": "half-linear", "temperature": 0.5, "top_k": 7, "top_p": 1.0}
    prompt["options"] = node("Options", **options)
    prompt["sampler"]["inputs"] |= {"temperature": 2.0, "top_k": 1, "options": ["options", 0]}
    np.testing.assert_array_equal(succeed(server, prompt), expected)


def completion(prompt, **inputs):
    """The prompt, with a completion of its picture between the sampler and the decoder."""
    prompt = copy.deepcopy(prompt)
    prompt["complete"] = node(
        "Complete", model=["loader", 0], positive=["text", 0], codes=["sampler", 0], seed=99,
        cfg=1.0, **inputs,
    )  # fmt: skip
    prompt["codes"] = node("SaveCodes", codes=["complete", 0], filename_prefix="codes/after")
    prompt["before"] = node("SaveCodes", codes=["sampler", 0], filename_prefix="codes/before")
    prompt["decode"]["inputs"]["codes"] = ["complete", 0]
    return prompt


def newest(server, name: str):
    return read_codes(max((server.base / "output" / "codes").glob(f"{name}_*.npy")))


@pytest.mark.parametrize(("top", "left"), [(16, 0), (0, 8), (24, 16)])
def test_completion_keeps_the_top_and_the_left(server, prompt, top, left):
    prompt["sampler"]["inputs"]["batch_size"] = 2
    succeed(server, completion(prompt, keep_top=top, keep_left=left))
    before, after = newest(server, "before"), newest(server, "after")
    kept = np.zeros(before.shape[1:], dtype=bool)
    stride = 48 // before.shape[1]
    kept[: top // stride], kept[:, : left // stride] = True, True
    same = (before == after).numpy()
    assert same[:, kept].all()
    assert not same[:, ~kept].all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"keep_top": 20, "keep_left": 0},
            "keep_top 20 does not fit: this model needs a multiple of 8, the nearest are 16",
        ),
        ({"keep_top": 48, "keep_left": 0}, "leave nothing to generate"),
        ({"keep_top": 0, "keep_left": 4}, "keep_left 4 does not fit"),
    ],
)
def test_completion_that_cannot_be(server, prompt, values, words):
    message = fail(server, completion(prompt, **values))
    assert message["node_id"] == "complete"
    assert words in message["exception_message"]


def test_saved_codes_come_back(server, prompt):
    expected = succeed(server, completion(prompt, keep_top=16, keep_left=0))
    info = server.get("/object_info/TokenShuffleLoadCodes")["TokenShuffleLoadCodes"]
    kind, options = info["input"]["required"]["file"]
    file = [
        name for name in (kind if isinstance(kind, list) else options["options"]) if "after" in name
    ]
    prompt["load"] = node("LoadCodes", file=max(file))
    prompt["decode"]["inputs"]["codes"] = ["load", 0]
    np.testing.assert_array_equal(succeed(server, prompt), expected)


def test_xy_sheet(server, prompt):
    prompt["sheet"] = node(
        "XYSheet", model=["loader", 0], vq=["loader", 1], positive=["text", 0], width=32,
        height=48, seed=7, seeds=2, cfgs="1, 2.0", options=["options", 0],
    )  # fmt: skip
    options = {"schedule": "half-linear", "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    prompt["options"] = node("Options", **options)
    (alone,) = succeed(server, prompt)  # seed 7, cfg 2
    prompt["save"]["inputs"]["images"] = ["sheet", 1]
    pictures = succeed(server, prompt)
    assert len(pictures) == 4
    # Convolutions round differently in a batch of two.
    np.testing.assert_allclose(pictures[2].astype(int), alone, atol=1)
    prompt["save"]["inputs"]["images"] = ["sheet", 0]
    (sheet,) = succeed(server, prompt)
    places = np.lib.stride_tricks.sliding_window_view(sheet, alone.shape)
    for picture in pictures:
        found = (places == picture).all(axis=(-1, -2, -3)).sum()
        assert found == 1, "each picture is on the sheet once"


def test_a_size_of_no_training_is_refused_unless_any_size_allows_it(server, prompt):
    """By the bundled model, whose card lists its sizes; the tiny one draws 32x48 in other tests."""
    prompt["loader"]["inputs"]["checkpoint"] = "emoji.safetensors"
    message = fail(server, prompt)
    assert message["node_id"] == "sampler"
    assert "not trained at 32x48: choose 128x128, " in message["exception_message"]
    assert "any_size" in message["exception_message"]
    allow_any_size(prompt)
    assert succeed(server, prompt)[0].shape == (48, 32, 3)
    completed = completion(prompt, keep_top=16, keep_left=0)
    assert "not trained at 32x48" in fail(server, completed)["exception_message"]
    completed["complete"]["inputs"]["options"] = ["options", 0]
    assert succeed(server, completed)[0].shape == (48, 32, 3)
    prompt["sheet"] = node(
        "XYSheet", model=["loader", 0], vq=["loader", 1], positive=["text", 0], width=32,
        height=48, seed=7, seeds=1, cfgs="1",
    )  # fmt: skip
    prompt["save"]["inputs"]["images"] = ["sheet", 1]
    message = fail(server, prompt)
    assert message["node_id"] == "sheet"
    assert "not trained at 32x48" in message["exception_message"]
    prompt["sheet"]["inputs"]["options"] = ["options", 0]
    assert succeed(server, prompt)[0].shape == (48, 32, 3)


@pytest.mark.parametrize(("cfgs", "words"), [("", "cfgs must be numbers"), ("1, nan", "not nan")])
def test_xy_sheet_of_bad_scales(server, prompt, cfgs, words):
    prompt["sheet"] = node(
        "XYSheet", model=["loader", 0], vq=["loader", 1], positive=["text", 0], width=32,
        height=48, seed=7, seeds=2, cfgs=cfgs,
    )  # fmt: skip
    prompt["save"]["inputs"]["images"] = ["sheet", 0]
    message = fail(server, prompt)
    assert message["node_id"] == "sheet"
    assert words in message["exception_message"]


def test_cfg_plot(server, prompt):
    """The curve starts at 1, at the bottom left, and ends at cfg, at the top right."""
    plot = {
        "plot": node("CFGPlot", cfg=6.0, schedule="linear"),
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["plot", 0], "filename_prefix": "plot"},
        },
    }
    (picture,) = succeed(server, plot)
    rows, columns = np.nonzero((picture == (36, 99, 235)).all(-1))
    first, last = rows[columns == columns.min()].mean(), rows[columns == columns.max()].mean()
    middle = rows[columns == (columns.min() + columns.max()) // 2].mean()
    assert first > last
    assert abs(middle - (first + last) / 2) < 3


def on_the_command_line(server, tmp_path, *options) -> np.ndarray:
    """The picture that the command line makes of the prompt."""
    model = server.base / "models" / "tokenshuffle" / "tiny.safetensors"
    command = [server.host.python, "-m", "tokenshuffle_core", "generate", "a red apple"]
    command += ["--model", model, "--seed", "7", "--cfg", "2", "--width", "32", "--height", "48"]
    command += ["--device", "cpu", "-o", tmp_path / "cli.png", "--overwrite", *options]
    subprocess.run(command, cwd=comfyui.PACK, check=True)
    return pixels((tmp_path / "cli.png").read_bytes())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_lora_changes_the_picture_as_on_the_command_line(server, prompt, tmp_path, stored):
    """Whose changes 16 bits would round."""
    models = server.base / "models" / "tokenshuffle"
    name = f"{str(stored).removeprefix('torch.')}.safetensors"
    load(models / "tiny.safetensors").save(models / name, stored)
    prompt["loader"]["inputs"]["checkpoint"] = name
    (before,) = succeed(server, prompt)
    prompt["lora"] = node("LoraLoader", model=["loader", 0], lora="tiny.safetensors", strength=0.5)
    prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    (changed,) = succeed(server, prompt)
    assert (changed != before).any()
    lora = server.base / "models" / "loras" / "tiny.safetensors"
    options = "--model", models / name, "--lora", f"{lora}=0.5"
    expected = on_the_command_line(server, tmp_path, *options)
    np.testing.assert_array_equal(changed, expected)
    prompt["lora"]["inputs"]["strength"] = 0.0
    np.testing.assert_array_equal(succeed(server, prompt)[0], before)
    (models / name).unlink()


@pytest.mark.parametrize(
    "weights", [pytest.param(k, marks=[pytest.mark.slow] * (k != "int8")) for k in WEIGHT_KINDS]
)
def test_smaller_weights_as_on_the_command_line(server, prompt, tmp_path, weights):
    prompt["loader"]["inputs"]["weights"] = weights
    (made,) = succeed(server, prompt)
    expected = on_the_command_line(server, tmp_path, "--weights", weights)
    np.testing.assert_array_equal(made, expected)
    prompt["lora"] = node("LoraLoader", model=["loader", 0], lora="tiny.safetensors", strength=0.5)
    prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    assert "only 16- or 32-bit ones can be changed" in fail(server, prompt)["exception_message"]


def test_window_that_the_model_lacks_is_an_error_of_the_sampler(server, prompt):
    prompt["sampler"]["inputs"]["window"] = 3
    message = fail(server, prompt)
    assert message["node_id"] == "sampler"
    assert "window 3 is not one of this model's: 2" in message["exception_message"]
