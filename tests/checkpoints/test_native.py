import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.models import random_checkpoint
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints import native
from tokenshuffle_core.files import Planned, write_safetensors
from tokenshuffle_core.pipeline import load


def rewrite(source, target, change):
    """A copy whose tensors and metadata went through `change`."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


def test_round_trip(tiny):
    original, loaded = random_checkpoint(), load(tiny)
    assert loaded.config == original.config
    assert loaded.card["modelspec.title"] == "tiny"
    assert loaded.card["modelspec.architecture"] == "token-shuffle"
    assert loaded.text_tokenizer.to_json() == original.text_tokenizer.to_json()
    for part in ("model", "image_tokenizer"):
        expected = getattr(original, part).state_dict()
        found = getattr(loaded, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_loading_does_not_import_the_compiler(tiny):
    """It takes seconds, and PyTorch imports it to draw numbers on the meta device."""
    code = f"""if True:
        import sys
        from tokenshuffle_core import pipeline
        pipeline.load({str(tiny)!r})
        print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_weights_can_be_stored_and_loaded_in_other_types(tmp_path):
    path = tmp_path / "half.safetensors"
    random_checkpoint().save(path, torch.float16)
    assert {weight.dtype for weight in load_file(path).values()} == {torch.float16}
    loaded = load(path, dtype=torch.bfloat16)
    assert loaded.model.head.weight.dtype == torch.bfloat16
    assert loaded.image_tokenizer.quant_conv.weight.dtype == torch.float32
    wide = load(path, dtype=torch.float32).model
    assert {weight.dtype for weight in wide.state_dict().values()} == {torch.float32}


def test_the_image_tokenizer_can_be_read_alone(tiny, tmp_path):
    module = checkpoints.load_image_tokenizer(tiny)
    checkpoints.save_image_tokenizer(tmp_path / "vq.safetensors", module)
    images = torch.rand(1, 3, 16, 16)
    again = checkpoints.load_image_tokenizer(tmp_path / "vq.safetensors")
    assert torch.equal(again.encode(images), module.encode(images))
    with pytest.raises(ValueError, match=r"vq\.safetensors .* not a Token-Shuffle checkpoint"):
        load(tmp_path / "vq.safetensors")


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny.read_bytes())
    broken = random_checkpoint()
    broken.model.head = torch.nn.Linear(2, 2, device="meta")  # cannot be written
    with pytest.raises(NotImplementedError):
        broken.save(path)
    assert path.read_bytes() == tiny.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("length", [0, 4, 100, 5_000, -1])
def test_truncated_file(tiny, tmp_path, length):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        load(path)


def test_text_named_safetensors(tmp_path):
    path = tmp_path / "notes.safetensors"
    path.write_text("these are notes, not weights")
    with pytest.raises(ValueError, match=r"notes\.safetensors is not a readable safetensors file"):
        load(path)


def test_header_that_claims_more_than_the_file_holds(tmp_path):
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"huge\.safetensors is not a readable"):
        load(path)


def change_config(old: str, new: str):
    def change(tensors: dict, metadata: dict[str, str]) -> None:
        assert old in metadata[native.CONFIG]
        metadata[native.CONFIG] = metadata[native.CONFIG].replace(old, new)

    return change


def beyond(metadata: dict[str, str]) -> str:
    """A text tokenizer one of whose ids is far behind the others."""
    parts = json.loads(metadata[native.TEXT_TOKENIZER])
    parts["model"]["vocab"]["Ġapple"] = 500_000
    return json.dumps(parts)


def bare(metadata: dict[str, str]) -> str:
    """A configuration whose prompts have no special token."""
    parts = json.loads(metadata[native.CONFIG])
    parts["prompt"]["template"] = ["{prompt}"]
    return json.dumps(parts)


def test_checkpoint_of_another_kind(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_up.weight": torch.zeros(2, 2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lora\.safetensors .* not a Token-Shuffle checkpoint"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("model.head.weight"), r"model\.head\.weight is missing"),
        (lambda t, m: t.update({"model.extra": torch.zeros(1)}), r"model\.extra has no place"),
        (
            lambda t, m: t.update({"model.head.weight": torch.zeros(3, 3)}),
            r"model\.head\.weight has shape \(3, 3\), the configuration asks for \(64, 32\)",
        ),
        (
            lambda t, m: t.update({"model.head.weight": torch.zeros(64, 32, dtype=torch.int32)}),
            r"model\.head\.weight holds torch\.int32, not weights",
        ),
        (
            lambda t, m: t["model.head.weight"][3, 5:6].fill_(torch.nan),
            r"model\.head\.weight holds numbers that are not finite",
        ),
        (
            lambda t, m: t["image_tokenizer.encoder.conv_in.weight"][0].fill_(-torch.inf),
            r"encoder\.conv_in\.weight holds numbers that are not finite",
        ),
        (lambda t, m: t.pop("model.text_embedding.weight"), r"text_embedding\.weight is missing"),
        (change_config('"dim": 32', '"dim": 32, "width": 32'), "configuration is not one of this"),
        (change_config('"layers": 2', '"layers": 1e9'), "layers must be a whole number"),
        (change_config('"layers": 2', '"layers": 1000000000'), "layers must be .* to 10000, not"),
        (change_config('"hidden": 64', '"hidden": 1000000000000'), "hidden must be a whole number"),
        (change_config('"layers": 2', '"layers": 10000'), "asks for 10004 blocks, for which"),
        (change_config('"res_blocks": 1', '"res_blocks": 9000'), "asks for 27000 blocks"),
        (change_config("[1, 1, 2]", "[1, 1, 2.0]"), "each of channel_multipliers must be a whole"),
        (change_config("[1, 1, 2]", "[1" + ", 1" * 40 + "]"), "number of channel_multipliers"),
        (change_config('"windows": [2]', '"windows": [true]'), "each of windows must be a whole"),
        (change_config('"window_head": 0', '"window_head": true'), "window_head must be a whole"),
        (change_config('"rope_axes": 1', '"rope_axes": true'), "rope_axes must be a whole number"),
        (change_config('"rope_theta": 10000.0', '"rope_theta": 1e999'), "rope_theta must be a num"),
        (change_config('"rope_theta": 10000.0', '"rope_theta": 1e-99'), "rope_theta must be a num"),
        (change_config('"norm_eps": 1e-05', '"norm_eps": NaN'), "norm_eps must be a number"),
        (
            change_config('"rope_scaling": null', '"rope_scaling": [8, 4, 4, 99]'),
            "the third above the second",
        ),
        (change_config('"cfg": 2.0', '"cfg": "' + "9" * 10**6 + '"'), "cfg must be a number"),
        (change_config('"max_prompt": 64', '"max_prompt": 100000000'), "max_prompt must be a wh"),
        (change_config('"dim": 32', '"' + "x" * 10**6 + '": 32'), "is not one of this version"),
        (change_config('"<|begin|>"', '"<|begin|>"' + ', "<|pad|>"' * 10**4), "of 1000 characters"),
        (lambda t, m: m.update({native.CONFIG: "[" * 200_000}), "is not one of this version"),
        (lambda t, m: m.update({native.TEXT_TOKENIZER: "[" * 200_000}), "nested too deep"),
        (lambda t, m: m.pop(native.TEXT_TOKENIZER), "a checkpoint without its text tokenizer"),
        (lambda t, m: m.update({"modelspec.title": "x" * 10**7}), "its model card has more than"),
        (lambda t, m: m.update({native.SIZES: "32x32, 0x7"}), "width must be a whole number from"),
        (lambda t, m: m.update({native.SIZES: "x" * 10**5}), "sizes must be like 128x128"),
        (lambda t, m: m.update({native.TEXT_TOKENIZER: beyond(m)}), "has 500001 tokens, text_voca"),
        (
            lambda t, m: t["model.head.weight"][3, 5:6].fill_(-3e38),
            r"model\.head\.weight holds numbers beyond 1e\+06",
        ),
        (
            lambda t, m: t.update({"model.head.weight": torch.zeros(64, 32).to(torch.complex64)}),
            r"holds torch\.complex64, not weights",
        ),
        (lambda t, m: m.update({native.CONFIG: bare(m)}), "needs a special token beside the prom"),
        (lambda t, m: t.update({"model." + "y" * 10**5: torch.zeros(1)}), "has no place in the"),
        (lambda t, m: m.update({native.CONFIG: "{}"}), "configuration is not one of this"),
        (lambda t, m: m.update({native.CONFIG: "[1"}), "bad.safetensors"),
        (lambda t, m: m.update({native.TEXT_TOKENIZER: "{}"}), "is not a tokenizer.json"),
        (
            change_config('"heads": 4', '"heads": 5'),
            "dim 32 must be an even multiple of heads 5",
        ),
    ],
)
def test_what_does_not_fit_is_named(tiny, tmp_path, change, message):
    path = rewrite(tiny, tmp_path / "bad.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "bad.safetensors" in str(error.value)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        checkpoints.convert(path, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_older_files_call_dim_width(tiny, tmp_path):
    older = rewrite(tiny, tmp_path / "older.safetensors", change_config('"dim": 32', '"width": 32'))
    assert load(older).config == load(tiny).config


def test_more_than_the_disk_has_is_not_begun(tmp_path):
    path, computed = tmp_path / "model.safetensors", []
    path.write_text("what lay there")
    tensors = {"a": Planned((2**60,), torch.uint8, lambda: computed.append(1))}
    with pytest.raises(
        OSError, match=r"model\.safetensors cannot be written: it takes 1,152,9.* MB"
    ):
        write_safetensors(path, tensors, {})
    assert not computed
    assert [each.read_text() for each in tmp_path.iterdir()] == ["what lay there"]


def test_a_full_disk(tiny, tmp_path):
    """The limit on a file's size stands for it."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    parts, path = load(tiny), tmp_path / "model.safetensors"
    path.write_text("what lay there")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors cannot be written"):
            parts.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["what lay there"]
