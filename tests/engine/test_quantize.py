import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tokenshuffle_core import pipeline
from tokenshuffle_core.adapt.grow import grow
from tokenshuffle_core.adapt.lora import add_lora, read_lora, save_lora
from tokenshuffle_core.checkpoints import BUNDLED
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.config import WEIGHT_KINDS
from tokenshuffle_core.engine.quantize import (
    KINDS,
    VNNI,
    QuantizedLinear,
    kind_of,
    quantize,
    quantized,
)
from tokenshuffle_core.training.start import Changes, trained_pipeline


@pytest.mark.parametrize(("kind", "bound"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_numbers_are_the_nearest(kind, bound):
    """int8 is off by at most half a step of the row's largest over 127, fp8 by its last bit. For
    int4 see test_int4.py."""
    x = torch.randn(20, 64) * torch.logspace(-3, 3, 20)[:, None]
    numbers, scale = quantized(x, KINDS[kind])
    error = (numbers.float() * scale - x).abs()
    size = x.abs().amax(1, keepdim=True) if kind == "int8" else x.abs() + 1e-2 * scale
    assert (error <= bound * size * 1.001).all()


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.05), ("int4", 0.2)])
@pytest.mark.parametrize("shape", [(1,), (2, 1), (3, 40)])
def test_layer_computes_what_the_whole_weights_do(kind, bound, shape):
    layer = nn.Linear(128, 96, bias=False)
    small = QuantizedLinear.of(layer, KINDS[kind])
    x = torch.randn(*shape, 128) * torch.logspace(-2, 2, shape[-1])[:, None]  # rows of all sizes
    expected = layer(x)
    error = (small(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert small(x).shape == expected.shape
    # A CPU without VNNI has one bit less for the activations.
    assert error.max() < (bound if VNNI or kind != "int8" else 1.5 * bound)


@torch.inference_mode()
def test_scaled_multiplication_of_fp8():
    """The kernel that GPUs use; PyTorch has it on CPUs as well."""
    layer, x = nn.Linear(128, 96, bias=False), torch.randn(2, 3, 128)
    error = QuantizedLinear.of(layer, torch.float8_e4m3fn)._scaled(x) - layer(x)
    assert error.norm() < 0.05 * layer(x).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_file_keeps_what_was_made(kind, tiny, tmp_path, capsys):
    small, again = tmp_path / "small.safetensors", tmp_path / "again.safetensors"
    assert main(["quantize", "--model", str(tiny), "--weights", kind, "-o", str(small)]) == 0
    loaded, whole = pipeline.load(small), pipeline.load(tiny)
    assert kind_of(loaded.model) == kind
    assert kind_of(whole.model) is None
    made = quantize(whole.model, kind).state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == made[name].dtype
        assert torch.equal(tensor.float(), made[name].float())
    assert "tokenshuffle.weights" not in loaded.card
    loaded.save(again)
    for name, tensor in load_file(again).items():
        assert torch.equal(tensor.float(), load_file(small)[name].float())
    run = ["generate", "a", "--seed", "3", "-o"]
    asked = [str(tmp_path / "asked.png"), "--model", str(tiny), "--weights", kind]
    stored = [str(tmp_path / "stored.png"), "--model", str(small)]
    assert main(run + asked) == main(run + stored) == 0
    asked, stored = (Image.open(tmp_path / f"{name}.png") for name in ("asked", "stored"))
    assert asked.tobytes() == stored.tobytes()
    capsys.readouterr()
    other = next(name for name in KINDS if name != kind)
    assert main(["quantize", "--model", str(small), "--weights", other, "-o", str(again)]) == 2
    assert f"weights are already {kind}" in capsys.readouterr().err


def test_what_changes_weights_needs_whole_ones(tiny, tmp_path):
    small, lora = tmp_path / "small.safetensors", tmp_path / "lora.safetensors"
    save_lora(lora, add_lora(pipeline.load(tiny).model, 2))
    parts = pipeline.load(tiny)
    quantize(parts.model, "int8")
    parts.save(small)
    for change in (
        lambda: read_lora(lora, parts.model),
        lambda: grow(parts, (1,)),
        lambda: trained_pipeline(small, tmp_path, Changes()),
    ):
        with pytest.raises(
            ValueError, match="weights are int8: only 16- or 32-bit ones can be changed"
        ):
            change()


def test_a_file_with_another_dtype_is_refused(tiny, tmp_path):
    small = tmp_path / "small.safetensors"
    loaded = pipeline.load(tiny)
    quantize(loaded.model, "int8")
    head = loaded.model.head
    head.weight = nn.Parameter(head.weight.float())
    loaded.save(small)
    with pytest.raises(ValueError, match=r"model.head.weight is torch.float32, not torch.int8"):
        pipeline.load(small)


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others():
    layer = QuantizedLinear.of(nn.Linear(48, 32, bias=False), torch.int8)
    x = torch.randn(5, 48)
    x[0] = x[0].abs()
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_float16_does_not_overflow(kind):
    whole = nn.Linear(64, 32, bias=False).half()
    layer = QuantizedLinear.of(whole, KINDS[kind])
    x = 60 * torch.randn(3, 64).half()
    found = F.linear(x, layer.dequantized(torch.float16))
    assert layer(x).isfinite().all()
    # int8: one byte an activation, without VNNI one bit less, of sums up to some 100.
    torch.testing.assert_close(layer(x), found, rtol=5e-2, atol=1 if VNNI or kind != "int8" else 2)


@torch.inference_mode()
def test_a_picture_does_not_depend_on_its_batch():
    loaded = pipeline.load()
    quantize(loaded.model, "int8")
    ids = loaded.encode_prompt("a red apple")
    *_, alone = loaded.sample([ids], [], loaded.config.generation, [3])
    *_, batch = loaded.sample([ids, ids], [], loaded.config.generation, [3, 4])
    assert torch.equal(alone.codes, batch.codes[:1])


def test_only_what_is_quantised_changes_in_a_file_of_16_bits(tmp_path):
    """4-bit numbers and their scales take a bit more than half of what 8-bit ones do."""
    before, sizes = load_file(BUNDLED), {}
    for kind in ("int8", "int4"):
        path = tmp_path / f"{kind}.safetensors"
        assert main(["quantize", "--weights", kind, "-o", str(path)]) == 0
        after = load_file(path)
        small = {name.removesuffix("scale") for name in after if name.endswith(".scale")}
        sizes[kind] = sum(after[f"{name}{x}"].nbytes for name in small for x in ("weight", "scale"))
        for name, tensor in before.items():
            if name.removesuffix("weight") not in small:
                assert tensor.dtype == after[name].dtype == torch.float16
                assert torch.equal(tensor, after[name])
        whole = sum(tensor.nbytes for tensor in after.values())
        assert whole == sizes[kind] + sum(
            x.nbytes for name, x in before.items() if name.removesuffix("weight") not in small
        )
    assert 0.5 < sizes["int4"] / sizes["int8"] < 0.53


def test_info_names_the_kind(tiny, tmp_path, capsys):
    small = tmp_path / "small.safetensors"
    assert main(["quantize", "--model", str(tiny), "--weights", "int4", "-o", str(small)]) == 0
    for path, expected in ((small, ["weights: int4"]), (tiny, [])):
        capsys.readouterr()
        assert main(["info", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("weights:")] == expected
