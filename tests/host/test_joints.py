"""Where the pack meets ComfyUI's own nodes, and where one model's values meet another model."""

import copy
import json
import struct
import urllib.parse
import uuid

import numpy as np
import pytest
import torch
from websockets.sync.client import connect

from scripts import workflows
from tokenshuffle_core.images import read_codes, write_codes

from .test_nodes import completion, node
from .test_prompts import allow_any_size, fail, succeed


def core(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def saving(source: str, name: str) -> dict:
    return node("SaveCodes", codes=[source, 0], filename_prefix=f"codes/{name}")


def codes_in(server, entry: dict, name: str) -> np.ndarray:
    """What a Save Codes node wrote, by the name that it told the API."""
    (saved,) = entry["outputs"][name]["codes"]
    assert saved["type"] == "output"
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    served = workflows.http(f"{server.url}/view?{urllib.parse.urlencode(saved)}")
    assert served == path.read_bytes()
    return read_codes(path).numpy()


def run(server, prompt: dict) -> dict:
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


def said(server, prompt: dict) -> dict[str, list[str]]:
    """The lines of text that each node showed while the prompt ran."""
    client, lines = uuid.uuid4().hex, {}
    with connect(f"{server.url.replace('http', 'ws')}/ws?clientId={client}", max_size=None) as ws:
        workflows.http(f"{server.url}/prompt", {"prompt": prompt, "client_id": client})
        while True:
            message = ws.recv(timeout=120)
            if isinstance(message, bytes):
                kind, length = struct.unpack(">II", message[:8])
                if kind == 3:  # text
                    name = message[8 : 8 + length].decode()
                    lines.setdefault(name, []).append(message[8 + length :].decode())
                continue
            event = json.loads(message)
            assert event["type"] != "execution_error", event["data"]
            if event["type"] == "executing" and event["data"]["node"] is None:
                return lines


def test_comfyuis_nodes_take_codes_for_a_latent(server, prompt):
    prompt["sampler"]["inputs"]["batch_size"] = 3
    changed = {
        "flip": core("LatentFlip", samples=["sampler", 0], flip_method="x-axis: vertically"),
        "pick": core("LatentFromBatch", samples=["sampler", 0], batch_index=1, length=2),
        "repeat": core("RepeatLatentBatch", samples=["pick", 0], amount=2),
        "join": core("LatentBatch", samples1=["flip", 0], samples2=["pick", 0]),
    }
    savers = {f"keep {name}": saving(name, "changed") for name in ("sampler", *changed)}
    entry = run(server, prompt | changed | savers)
    kept = {name: codes_in(server, entry, f"keep {name}") for name in ("sampler", *changed)}
    drawn = kept["sampler"]
    expected = {
        "flip": drawn[:, ::-1],
        "pick": drawn[1:],
        "repeat": np.concatenate([drawn[1:], drawn[1:]]),
        "join": np.concatenate([drawn[:, ::-1], drawn[1:]]),
    }
    assert not np.array_equal(expected["flip"], drawn)
    for name, codes in expected.items():
        np.testing.assert_array_equal(kept[name], codes, err_msg=name)


def test_a_blend_of_latents_has_the_nearest_codes(server, prompt):
    """Three quarters of one picture's vectors are nearest to that picture's codes, mostly."""
    other = prompt["sampler"]["inputs"] | {"seed": 8}
    prompt["other"] = prompt["sampler"] | {"inputs": other}
    prompt["blend"] = core(
        "LatentBlend", samples1=["sampler", 0], samples2=["other", 0], blend_factor=0.75
    )
    prompt |= {f"keep {name}": saving(name, "blend") for name in ("sampler", "other", "blend")}
    entry = run(server, prompt)
    first, second, blend = (
        codes_in(server, entry, f"keep {name}") for name in ("sampler", "other", "blend")
    )
    assert (blend == first).mean() > 0.7 > 0.1 > (blend == second).mean()


def test_a_latent_comes_back_from_disk(server, prompt):
    expected = succeed(server, prompt)
    entry = run(server, prompt | {"disk": core(
        "SaveLatent", samples=["sampler", 0], filename_prefix="latents/drawn"
    )})  # fmt: skip
    (saved,) = entry["outputs"]["disk"]["latents"]
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    (server.base / "input").mkdir(exist_ok=True)
    path.rename(server.base / "input" / "drawn.latent")
    prompt["load"] = core("LoadLatent", latent="drawn.latent")
    prompt["decode"]["inputs"]["codes"] = ["load", 0]
    np.testing.assert_array_equal(succeed(server, prompt), expected)
    prompt["keep"] = saving("load", "without an owner")
    message = fail(server, prompt)
    assert message["node_id"] == "keep"
    assert "Load Latent do not: connect the vq" in message["exception_message"]
    prompt["keep"]["inputs"]["vq"] = ["loader", 1]
    prompt["codes"] = saving("sampler", "with an owner")
    entry = run(server, prompt)
    kept, drawn = (codes_in(server, entry, name) for name in ("keep", "codes"))
    np.testing.assert_array_equal(kept, drawn)


def test_the_image_tokenizer_is_a_vae(server, prompt):
    """For ComfyUI's nodes, whole and tiled. Its own encoding says what is right."""
    (expected,) = succeed(server, prompt)
    prompt["decode"] = core("VAEDecode", samples=["sampler", 0], vae=["loader", 1])
    np.testing.assert_array_equal(succeed(server, prompt)[0], expected)
    prompt["decode"] = core(
        "VAEDecodeTiled", samples=["sampler", 0], vae=["loader", 1], tile_size=64, overlap=16,
        temporal_size=64, temporal_overlap=8,
    )  # fmt: skip
    tiled = succeed(server, prompt)[0].astype(int)
    np.testing.assert_allclose(tiled, expected, atol=1)
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    prompt |= {
        "own": node("VQEncode", image=["decode", 0], vq=["loader", 1]),
        "whole": core("VAEEncode", pixels=["decode", 0], vae=["loader", 1]),
        "tiled": core("VAEEncodeTiled", pixels=["decode", 0], vae=["loader", 1], **tiles),
    }
    prompt |= {
        f"picture {name}": node("VQDecode", codes=[name, 0], vq=["loader", 1], tiled=False)
        for name in ("own", "whole", "tiled")
    }
    pictures = []
    for name in ("own", "whole", "tiled"):
        prompt["save"]["inputs"]["images"] = [f"picture {name}", 0]
        pictures += succeed(server, prompt)
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])
    assert (pictures[0] != expected).any()


def masked(prompt: dict, x: int, y: int, width: int, height: int) -> dict:
    """The completion of the prompt's picture under a mask with a hole, in which it is kept."""
    prompt = completion(prompt, keep_top=40, keep_left=24)  # the mask takes their place
    prompt |= {
        "all": core("SolidMask", value=1.0, width=32, height=48),
        "hole": core("SolidMask", value=0.0, width=width, height=height),
        "mask": core(
            "MaskComposite", destination=["all", 0], source=["hole", 0], x=x, y=y,
            operation="multiply",
        ),
        "masked": core("SetLatentNoiseMask", samples=["sampler", 0], mask=["mask", 0]),
    }  # fmt: skip
    prompt["complete"]["inputs"]["codes"] = ["masked", 0]
    return prompt


@pytest.mark.parametrize(
    ("hole", "keep"),
    [
        ((0, 0, 32, 16), {"keep_top": 16, "keep_left": 0}),
        ((0, 0, 9, 48), {"keep_top": 0, "keep_left": 8}),  # windows are drawn whole
    ],
)
def test_a_noise_mask_is_completion(server, prompt, hole, keep):
    expected = succeed(server, completion(prompt, **keep))
    np.testing.assert_array_equal(succeed(server, masked(prompt, *hole)), expected)


def test_comfyuis_inpainting_encoder_masks_a_picture_for_completion(server, prompt):
    """Two seeds draw what is masked, and keep the upper half."""
    prompt = masked(prompt, 0, 0, 32, 24)
    prompt["picture"] = core("EmptyImage", width=33, height=50, batch_size=1, color=0xFF8000)
    prompt["masked"] = core(
        "VAEEncodeForInpaint", pixels=["picture", 0], vae=["loader", 1], mask=["mask", 0],
        grow_mask_by=0,
    )  # fmt: skip
    prompt["other"] = copy.deepcopy(prompt["complete"])
    prompt["other"]["inputs"]["seed"] += 1
    prompt["others"] = saving("other", "other seed")
    entry = run(server, prompt)
    first, second = (codes_in(server, entry, name) for name in ("codes", "others"))
    same, half = first == second, first.shape[1] // 2
    assert same[:, :half].all()
    assert not same[:, half:].all(-1).any()


@pytest.mark.parametrize(
    ("hole", "words"),
    [
        ((8, 8, 16, 16), "this noise mask keeps more than whole rows at the top"),
        ((0, 32, 32, 16), "this noise mask keeps more than whole rows at the top"),
        ((0, 0, 32, 48), "leave nothing to generate"),
    ],
)
def test_a_noise_mask_that_cannot_be_completed(server, prompt, hole, words):
    message = fail(server, masked(prompt, *hole))
    assert message["node_id"] == "complete"
    assert words in message["exception_message"]


def test_a_picture_is_cropped_in_the_middle_and_the_node_says_so(server, prompt):
    del prompt["save"]
    prompt |= {
        "large": core(
            "ImageScale", image=["decode", 0], upscale_method="bilinear", width=71, height=50,
            crop="disabled",
        ),
        "middle": core("ImageCrop", image=["large", 0], width=68, height=48, x=1, y=1),
        "cropped": node("VQEncode", image=["large", 0], vq=["loader", 1]),
        "encode": node("VQEncode", image=["middle", 0], vq=["loader", 1]),
        "keep cropped": saving("cropped", "crop"),
        "keep encode": saving("encode", "crop"),
    }  # fmt: skip
    lines = said(server, prompt)
    assert lines["cropped"] == ["cropped from 71x50 to 68x48"]
    assert "encode" not in lines
    entry = run(server, prompt | {"keep cropped": saving("cropped", "crop again")})
    np.testing.assert_array_equal(
        codes_in(server, entry, "keep cropped"), codes_in(server, entry, "keep encode")
    )
    prompt["middle"]["inputs"] |= {"width": 2}
    message = fail(server, prompt)
    assert message["node_id"] == "encode"
    assert "2x48 is smaller than one code" in message["exception_message"]


def test_completion_says_what_it_draws(server, prompt):
    """As the sampler does, at a size of no training, before and after it has drawn."""
    prompt["loader"]["inputs"]["checkpoint"] = "emoji.safetensors"
    allow_any_size(prompt)
    prompt = completion(prompt, keep_top=16, keep_left=0)
    prompt["complete"]["inputs"]["options"] = ["options", 0]
    lines = said(server, prompt)
    for name in ("sampler", "complete"):
        note = "32x48, 6 positions, a size that the model was not trained at"
        assert lines[name][0] == lines[name][-1] == note
        assert any(line.startswith("6 / 6 positions") for line in lines[name])


def beside(prompt: dict, checkpoint: str) -> dict:
    """The prompt with a second model."""
    return copy.deepcopy(prompt) | {"beside": node("Loader", checkpoint=checkpoint)}


def test_a_prompt_is_read_by_the_model_that_draws_it(server, prompt):
    """The bundled model has other tokens than the tiny one, and many more."""
    expected = succeed(server, prompt)
    prompt = beside(prompt, "emoji.safetensors")
    prompt["text"]["inputs"]["model"] = ["beside", 0]
    np.testing.assert_array_equal(succeed(server, prompt), expected)


def test_text_and_classes_do_not_mix(server, prompt):
    of_classes = "llamagen/c2i_B_256.pt"
    prompt["text"]["inputs"]["text"] = "golden retriever"
    mixed = beside(prompt, of_classes)
    mixed["sampler"]["inputs"]["model"] = ["beside", 0]
    message = fail(server, mixed)
    assert message["node_id"] == "sampler"
    for words in ("tiny.safetensors, which reads text", f"{of_classes} reads classes"):
        assert words in message["exception_message"]
    prompt["loader"]["inputs"]["checkpoint"] = of_classes
    prompt["text"]["inputs"]["text"] = "a red apple"
    message = fail(server, prompt)
    assert message["node_id"] == "text"
    assert "the Class node" in message["exception_message"]


def test_the_same_model_under_another_name_reads_codes(server, prompt, tiny):
    expected = succeed(server, prompt)
    copy = server.base / "models" / "tokenshuffle" / "again.safetensors"
    copy.write_bytes(tiny.read_bytes())
    prompt = beside(prompt, "again.safetensors")
    prompt["decode"]["inputs"]["vq"] = ["beside", 1]
    try:
        np.testing.assert_array_equal(succeed(server, prompt), expected)
    finally:
        copy.unlink()


def test_codes_of_another_image_tokenizer(server, prompt):
    prompt = beside(prompt, "emoji.safetensors")
    complaint = "these codes are from tiny.safetensors, and emoji.safetensors has another image"
    wrong = {
        "decode": node("VQDecode", codes=["sampler", 0], vq=["beside", 1], tiled=False),
        "complete": node(
            "Complete", model=["beside", 0], positive=["text", 0], codes=["sampler", 0],
            keep_top=16, keep_left=0, seed=1, cfg=1.0,
        ),
        "sheet": node(
            "XYSheet", model=["loader", 0], vq=["beside", 1], positive=["text", 0], width=32,
            height=48, seed=7, seeds=1, cfgs="1",
        ),
    }  # fmt: skip
    for name, made in wrong.items():
        ends = core("PreviewAny", source=[name, 0])
        message = fail(server, {**prompt, name: made, "save": ends})
        assert message["node_id"] == name
        assert complaint in message["exception_message"]


def test_a_latent_and_a_vae_of_a_diffusion_model(server, prompt):
    prompt["empty"] = core("EmptyLatentImage", width=64, height=64, batch_size=1)
    prompt["decode"]["inputs"]["codes"] = ["empty", 0]
    message = fail(server, prompt)
    assert message["node_id"] == "decode"
    assert "(1, 4, 8, 8) has no image codes" in message["exception_message"]
    prompt["vae"] = core("VAELoader", vae_name="pixel_space")
    prompt["decode"]["inputs"] |= {"codes": ["sampler", 0], "vq": ["vae", 0]}
    message = fail(server, prompt)
    assert message["node_id"] == "decode"
    assert "connect the vq of the node that loads the model" in message["exception_message"]


def test_codes_in_any_folder_come_back(server, prompt):
    expected = succeed(server, prompt)
    kept = node("SaveCodes", codes=["sampler", 0], filename_prefix="mine/of today/apple")
    entry = run(server, prompt | {"keep": kept})
    (saved,) = entry["outputs"]["keep"]["codes"]
    prompt["load"] = node(
        "LoadCodes", file=f"{saved['subfolder']}/{saved['filename']} [output]".replace("\\", "/")
    )
    prompt["decode"]["inputs"]["codes"] = ["load", 0]
    np.testing.assert_array_equal(succeed(server, prompt), expected)
    # ComfyUI's nodes work on them all the same, and they are completed as any others.
    prompt["flip"] = core("LatentFlip", samples=["load", 0], flip_method="y-axis: horizontally")
    prompt |= {"keep": saving("load", "plain"), "keep flip": saving("flip", "flipped")}
    entry = run(server, prompt)
    plain, flipped = (codes_in(server, entry, name) for name in ("keep", "keep flip"))
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    made = completion(prompt, keep_top=16, keep_left=0)
    expected = succeed(server, made)
    made["complete"]["inputs"]["codes"] = ["load", 0]
    np.testing.assert_array_equal(succeed(server, made), expected)


@pytest.mark.parametrize("number", [-1, 10**6])
def test_numbers_that_are_no_codes(server, prompt, number):
    folder = server.base / "input" / "below"
    folder.mkdir(parents=True, exist_ok=True)
    write_codes(folder / f"{number}.npy", torch.full((1, 12, 8), number))
    prompt["load"] = node("LoadCodes", file=f"below/{number}.npy")
    made = completion(prompt, keep_top=16, keep_left=0)
    for name in ("decode", "complete"):
        wrong = copy.deepcopy(made)
        wrong[name]["inputs"]["codes"] = ["load", 0]
        message = fail(server, wrong)
        assert message["node_id"] == name
        assert "codes must be from 0 to " in message["exception_message"]
