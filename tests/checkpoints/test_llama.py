"""A LLaMA of the `transformers` library as the start of a model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.published import llama, llamagen_vq, write_llama, write_merges
from tokenshuffle_core import checkpoints
from tokenshuffle_core.pipeline import load

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def vq(tmp_path):
    path = tmp_path / "vq.pt"
    torch.save({"model": llamagen_vq()}, path)
    return path


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "shards", "changes"),
    [
        ("Llama", 1, {}),
        ("Llama", 3, {}),
        ("Llama", 1, {"rope_parameters": LLAMA_3}),
        ("Llama", 1, {"head_dim": 32}),
        ("Qwen2", 1, {"sliding_window": 128}),
        ("Qwen3", 1, {"head_dim": 32}),
    ],
)
def test_text_logits_are_the_originals(tied, kind, shards, changes, vq, tmp_path):
    theirs = llama(tied, kind, **changes)
    folder = write_llama(theirs, tmp_path / "llama", shards)
    start = tmp_path / "start.safetensors"
    checkpoints.convert(folder, start, image_tokenizer=vq, windows=(2, 1))
    ours = load(start)
    assert ours.config.model.windows == (2, 1)
    assert ours.config.model.text_head != tied
    text = torch.randint(0, 330, (2, 200))
    expected = theirs(text).logits
    hidden = ours.model.transformer(ours.model.text_embedding(text))
    found = ours.model.text_logits(hidden)[..., :330]
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_start_can_be_trained(vq, tmp_path):
    folder = write_llama(llama(False), tmp_path / "llama")
    checkpoints.convert(folder, tmp_path / "start.safetensors", image_tokenizer=vq)
    made = load(tmp_path / "start.safetensors")
    ids = made.text_tokenizer.encode("a red apple")
    framed = torch.tensor([made.text_tokenizer.frame(ids, 2, 2)])
    codes = torch.randint(0, 64, (1, 4, 4))
    made.model.train()
    logits = made.model(framed, torch.zeros(1, dtype=torch.int64), codes, with_text=True)
    torch.nn.functional.cross_entropy(
        logits.codes.flatten(0, 2), made.model.targets(codes).flatten()
    ).backward()
    assert made.model.code_embedding.weight.grad.abs().sum() > 0


def test_a_qwen_with_vocab_and_merges_alone(vq, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_llama(llama(True, "Qwen2"), tmp_path / "qwen")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no text tokenizer: tokenizer\.json, vocab"):
        checkpoints.read(folder, image_tokenizer=vq)
    write_merges(folder, ["a red apple, 一个红苹果"] * 3, "added_tokens.json")
    checkpoints.convert(folder, tmp_path / "start.safetensors", image_tokenizer=vq)
    ours = load(tmp_path / "start.safetensors").text_tokenizer
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder, split_special_tokens=True)
    for text in ("a red apple", "一个红苹果 café <|t2i|> 123"):
        assert ours.encode(text) == theirs.encode(text)
    assert len(ours) > len(theirs)  # ours come after theirs
    assert ours.frame([], 2, 2)[0] == len(theirs) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"head_dim": "x"}, "config.json is not that of a LLaMA"),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "not supported"),
    ],
)
def test_another_transformer_is_refused(changes, message, vq, tmp_path):
    folder = write_llama(llama(True), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        checkpoints.read(folder, image_tokenizer=vq)


@pytest.mark.parametrize(
    "found", [{"rope_scaling": "x"}, {"max_position_embeddings": float("inf")},
              {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}],
)  # fmt: skip
def test_a_strange_configuration(found, vq, tmp_path):
    folder = write_llama(llama(True), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | found))
    with pytest.raises(ValueError, match=r"config\.json is not that of a LLaMA"):
        checkpoints.read(folder, image_tokenizer=vq)


def test_weights_that_a_llama_has_not(vq, tmp_path):
    folder = write_llama(llama(True), tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(64)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"o_proj\.bias does not belong in a LLaMA"):
        checkpoints.read(folder, image_tokenizer=vq)


def test_without_an_image_tokenizer(tmp_path):
    folder = write_llama(llama(True), tmp_path / "llama")
    with pytest.raises(ValueError, match="name the image tokenizer"):
        checkpoints.read(folder)
