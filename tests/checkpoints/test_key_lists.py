"""The published names and shapes of the largest models, from `transformers` without data: all are
read, and each becomes what our model needs there."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tests.support.cosmos import Cosmos, write_cosmos
from tests.support.public_models import COSMOS, OF_QWEN, OF_SIMPLEAR, _added
from tests.support.published import randomise, write_merges, write_ranks
from tests.support.vqgan import VQGAN, write_ibq
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints.checkpoint import named_shapes
from tokenshuffle_core.checkpoints.source import Source

CORPUS = ["a red apple"] * 3


def write_names(folder: Path, model: nn.Module, shards: int) -> dict[str, tuple[int, ...]]:
    """Safetensors with the names and shapes of a model and holes in the place of its numbers."""
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    index = {}
    for i in range(shards):
        file, header, end = folder / f"model-{i + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in sorted(shapes)[i::shards]:
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            index[name] = file.name
        text = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return shapes


def simplear(folder: Path, layers: int, dim: int, heads: int, hidden: int, tied: bool):
    write_merges(folder, CORPUS)
    text = _added(folder, OF_QWEN + OF_SIMPLEAR)
    write_cosmos(randomise(Cosmos()), folder.parent / COSMOS)
    return "SimpARForCausalLM", transformers.Qwen2Config(
        vocab_size=text + 64_000, hidden_size=dim, intermediate_size=hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
        max_position_embeddings=32_768, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=tied,
    )  # fmt: skip


def emu(folder: Path):
    ranks, codes = len(write_ranks(folder, CORPUS)), 131_072
    vq = randomise(VQGAN(codes=(codes, 4), multipliers=(1, 1, 1, 2, 2), attended=(0,)))
    write_ibq(vq, folder.parent / "Emu3.5-VisionTokenizer")
    return "Emu3ForCausalLM", transformers.Qwen3Config(
        vocab_size=ranks + 211 + codes, hidden_size=5120, intermediate_size=25_600,
        num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=32_768, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="files with holes take their whole size there")
@pytest.mark.parametrize(
    ("make", "shards", "billions"),
    [
        pytest.param(
            lambda folder: simplear(folder, 24, 896, 14, 4864, True), 1, 0.4, marks=pytest.mark.slow
        ),
        (lambda folder: simplear(folder, 28, 1536, 12, 8960, False), 2, 1.5),
        (emu, 14, 32.4),
    ],
    ids=["SimpleAR-0.5B", "SimpleAR-1.5B", "Emu3.5-Image"],
)
def test_every_published_name_is_read(tmp_path, monkeypatch, make: Callable, shards, billions):
    folder = tmp_path / "model"
    folder.mkdir()
    architecture, config = make(folder)
    kind = type(config).__name__.removesuffix("Config")
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    shapes = write_names(folder, theirs, shards)
    assert sum(torch.Size(x).numel() for x in shapes.values()) >= billions * 1e9
    named = {"architectures": [architecture]}
    named |= {"model_type": "Emu3"} if "Emu" in architecture else {}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | named))
    checkpoint = checkpoints.read(folder)
    asked = set()

    def nothing(self: Source, name: str) -> torch.Tensor:  # reading it would take 64 GB
        asked.add(name)
        return torch.empty(self.shapes[name], dtype=torch.bfloat16, device="meta")

    monkeypatch.setattr(Source, "__getitem__", nothing)
    expected = named_shapes(checkpoint.skeleton(), checkpoint.model_weights, "")
    for name, shape in expected.items():
        assert checkpoint.model_weights[name]().shape == shape, name
    assert asked == shapes.keys()
    rows = checkpoint.config.model.text_vocabulary + checkpoint.config.model.codebook_size
    assert rows == config.vocab_size
