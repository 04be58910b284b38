"""The worst files of strangers, given to a server that must draw after each."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.mutations import PIECES, set_metadata
from tokenshuffle_core.checkpoints import native
from tokenshuffle_core.files import open_safetensors

from .test_prompts import fail, succeed

pytestmark = pytest.mark.slow
ERROR = "execution_error"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def with_piece(piece: dict):
    """In the place of how the text tokenizer splits text."""

    def change(metadata: dict[str, str]) -> None:
        parts = json.loads(metadata[native.TEXT_TOKENIZER]) | {"pre_tokenizer": piece}
        metadata[native.TEXT_TOKENIZER] = json.dumps(parts)

    return change


def far_ids(metadata: dict[str, str]) -> None:
    parts = json.loads(metadata[native.TEXT_TOKENIZER])
    parts["model"]["vocab"] |= {"x": 10**6}
    metadata[native.TEXT_TOKENIZER] = json.dumps(parts)


def configured(old: str, new: str):
    def change(metadata: dict[str, str]) -> None:
        assert old in metadata[native.CONFIG]
        metadata[native.CONFIG] = metadata[native.CONFIG].replace(old, new)

    return change


CHANGES = {
    **{f"piece-{i}": with_piece(piece) for i, piece in enumerate(PIECES)},
    "no-text-tokenizer": lambda metadata: metadata.pop(native.TEXT_TOKENIZER),
    "far-ids": far_ids,
    "blocks": configured('"res_blocks": 1', '"res_blocks": 10000'),
    "layers": configured('"layers": 2', '"layers": 10000'),
    "floats": configured("[1, 1, 2]", "[1, 1, 2.0]"),
    "true": configured('"window_head": 0', '"window_head": true'),
    "theta": configured('"rope_theta": 10000.0', '"rope_theta": 1e999'),
    "nested": lambda metadata: metadata.update({native.CONFIG: "[" * 200_000}),
    "card": lambda metadata: metadata.update({"modelspec.title": "x" * 10**7}),
}


@pytest.fixture
def hostile(server, tiny):
    """Names of models that cannot be loaded, and of codes."""
    models = server.base / "models" / "tokenshuffle" / "hostile"
    codes = server.base / "output" / "codes" / "hostile"
    models.mkdir()
    codes.mkdir(parents=True)
    for name, change in CHANGES.items():
        shutil.copy(tiny, models / f"{name}.safetensors")
        metadata = open_safetensors(tiny).metadata()
        change(metadata)
        set_metadata(models / f"{name}.safetensors", metadata)
    for name, value in (("nan", torch.nan), ("large", 3e38)):
        tensors = load_file(tiny)
        tensors["model.head.weight"][3, 5] = value
        save_file(tensors, models / f"{name}.safetensors", open_safetensors(tiny).metadata())
    torch.save({"model": Evil(server.base / "ran")}, models / "code.pt")
    (models / "bare.pt").write_bytes(pickle.dumps(Evil(server.base / "ran")))
    header = b"{'descr':'<i8','fortran_order':False,'shape':(1,1000000,1000000)}\n"
    (codes / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header)
    np.savez(codes / "archive.npz", np.zeros((1, 4, 4), np.int64))
    (codes / "archive.npz").rename(codes / "archive.npy")
    yield models, codes
    shutil.rmtree(models)
    shutil.rmtree(codes)


def test_the_queue_lives_after_each(server, prompt, hostile):
    models, codes = hostile
    prompt["text"]["inputs"]["text"] = "x" * 40
    refused = []
    for seed, file in enumerate(sorted(models.iterdir())):
        named = prompt["loader"]["inputs"] | {"checkpoint": f"hostile/{file.name}"}
        wrong = prompt | {"loader": {"class_type": "TokenShuffleLoader", "inputs": named}}
        entry = server.run(wrong)
        if entry["status"]["status_str"] != "success":
            (found,) = (data for kind, data in entry["status"]["messages"] if kind == ERROR)
            sentence = found["exception_message"].strip()
            assert file.name in sentence
            assert len(sentence) < 1000
            assert "\n" not in sentence
            refused.append(file.stem)
        server.get(f"/tokenshuffle/model?checkpoint=hostile/{file.name}")
        prompt["sampler"]["inputs"]["seed"] = seed
        succeed(server, prompt)
    # Three of the pieces do no harm here.
    assert len(refused) == len(list(models.iterdir())) - 3, refused
    for file in sorted(codes.iterdir()):
        load = {"file": f"codes/hostile/{file.name} [output]"}
        prompt["sampler"] = {"class_type": "TokenShuffleLoadCodes", "inputs": load}
        assert file.name in fail(server, prompt)["exception_message"]
    assert not (server.base / "ran").exists()
