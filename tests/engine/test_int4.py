import pytest
import torch
from torch import nn

from tests.support.models import dequantized, model_of
from tokenshuffle_core import pipeline
from tokenshuffle_core.checkpoints import skeleton
from tokenshuffle_core.config import GenerationConfig, ModelConfig
from tokenshuffle_core.engine import cpu_linear, int4, packed_nbytes, prepare
from tokenshuffle_core.engine.cpu_linear import MANY_IN_16_BITS, CpuLinear
from tokenshuffle_core.engine.quantize import (
    QuantizedLinear,
    quantize,
    rounds_activations,
)
from tokenshuffle_core.sampler import sample
from tokenshuffle_core.transformer import Block, KVCache, rotary_angles

CPU = torch.device("cpu")
# Whole groups, a shorter last one, none whole, and odd ones.
COLUMNS = [128, 256, 704, 32, 1, 131, 255, 257]


def layer_of(columns: int, rows: int = 48, kind: torch.dtype = torch.uint8) -> QuantizedLinear:
    torch.manual_seed(columns)
    return QuantizedLinear.of(nn.Linear(columns, rows, bias=False), kind)


def number(packed: list[int], columns: int, column: int) -> int:
    """The layout in words: of a group of `size` columns, the first half is in the low bits."""
    group, place = divmod(column, 128)
    size = min(128, columns - 128 * group)
    half = (size + 1) // 2
    byte = packed[64 * group + place % half]
    return (byte >> 4 if place >= half else byte & 15) - 8


@pytest.mark.parametrize("columns", COLUMNS)
def test_layout(columns):
    layer = layer_of(columns, rows=3)
    packed, scale = layer.weight.tolist(), layer.scale.double().tolist()
    expected = [
        [number(packed[row], columns, c) * scale[row][c // 128] for c in range(columns)]
        for row in range(3)
    ]
    found = layer.dequantized(torch.float64)
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))
    assert layer.weight.nbytes == 3 * sum(
        (min(128, columns - c) + 1) // 2 for c in range(0, columns, 128)
    )


@pytest.mark.parametrize("columns", COLUMNS)
def test_no_group_is_worse_than_with_its_largest_weight_at_the_end_of_the_range(columns):
    torch.manual_seed(0)
    x = torch.randn(40, columns) * torch.logspace(-6, 6, 40)[:, None]
    x[3], x[4, ::2] = 0, 0
    found = int4.dequantized(*int4.quantized(x), columns, torch.float32)
    for first in range(0, columns, 128):
        group = x[:, first : first + 128].double()
        step = group.gather(1, group.abs().argmax(1, keepdim=True)) / -8
        plain = (group / step).nan_to_num(0).round().clamp(-8, 7) * step
        errors = [(w - group).norm(dim=1) for w in (found[:, first : first + 128].double(), plain)]
        assert (errors[0] <= errors[1] + 2**-8 * group.norm(dim=1)).all()  # the scale's rounding
        if group.shape[1] == 128:  # of normal numbers
            assert (errors[0] / errors[1]).nanmean() < 0.99
    assert (found[3] == 0).all()
    assert (found[4, ::2] == 0).all()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 128, 131, 704])
@pytest.mark.parametrize("in_16_bits", [True, False])
def test_products_on_a_cpu_are_those_of_the_dequantised_weights(
    columns, in_16_bits, dtype, monkeypatch
):
    """Activations are not rounded, whatever the number of rows."""
    if not in_16_bits:  # as on a CPU that is not x86
        monkeypatch.setattr(cpu_linear, "multiplies_float16", lambda: False)
    layer = layer_of(columns)
    layer.scale[::2] *= 2.0**-12  # one scale for all of float16 does not suffice
    fast, whole = CpuLinear(layer), layer.dequantized(torch.float64)
    small = in_16_bits and "fbgemm" in torch.backends.quantized.supported_engines
    assert fast.products[0].nbytes == (2 if small else 4) * whole.numel()
    for rows in (1, 2, 8, MANY_IN_16_BITS, MANY_IN_16_BITS + 1):
        x = torch.randn(rows, columns).to(dtype)
        expected = x.double() @ whole.T
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert (fast(x) - expected).abs().max() < bound * expected.abs().max()
        assert fast(x).dtype == dtype


# Two groups, the second shorter, in the blocks; window heads with one.
CASES = [(1, {}), (2, {}), (2, {"window_head": 16}), (4, {"window_head": 16})]


@pytest.mark.parametrize("kind", ["int4", "fp8"])
@pytest.mark.parametrize(("window", "changes"), CASES)
def test_jacobi_steps_and_dequantised_weights_give_the_same_codes(kind, window, changes):
    model = model_of(window, dim=160, hidden=144, **changes)
    for parameter in model.parameters():  # logits that neither all agree nor are all noise
        parameter.data *= 0.5
    quantize(model, kind)
    assert not rounds_activations(model, CPU)
    plain, settings = dequantized(model), GenerationConfig(cfg=2.0, temperature=0.7)

    def codes(model, seed: int, ahead: int, engine: bool) -> torch.Tensor:
        random = [torch.Generator().manual_seed(seed)]
        *_, last = sample(
            model, [[1, 5, 6]], [[1, 2]], (4, 5), settings, random, 0, None, ahead, engine
        )
        return last.codes

    for seed in range(3):
        expected = codes(plain, seed, 1, False)
        assert expected.unique().numel() > 3
        for ahead in (1, 8):
            assert torch.equal(codes(model, seed, ahead, True), expected)
        assert torch.equal(codes(model, seed, 8, False), expected)


@torch.inference_mode()
def test_logits_of_the_bundled_model_are_those_of_the_dequantised_weights():
    loaded = pipeline.load()
    quantize(loaded.model, "int4")
    plain = dequantized(loaded.model)
    prepare(loaded.model, CPU)
    text, padding = torch.tensor([[1, 5, 9, 2]]), torch.zeros(1, dtype=torch.int64)
    codes = torch.randint(0, 1024, (1, 4, 4))
    found, expected = (m(text, padding, codes).codes for m in (loaded.model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    linear = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    if "fbgemm" in torch.backends.quantized.supported_engines:  # exact in 16 bits
        assert packed_nbytes(loaded.model) == sum(2 * layer.weight.numel() for layer in linear)


@pytest.mark.parametrize(("kind", "rounds"), [("int8", True), ("fp8", False), ("int4", False)])
def test_which_weights_round_activations_on_a_cpu(kind, rounds):
    """Independently of the function: an input's last bits reach the product, or do not."""
    model = model_of(2)
    assert not rounds_activations(model, CPU)
    quantize(model, kind)
    assert rounds_activations(model, CPU) == rounds
    layer = model.transformer.blocks[0].attention.q_proj
    x = torch.ones(1, layer.columns)
    near = x.clone()
    near[0, 3] -= 1e-4
    assert torch.equal(layer(x), layer(near)) == rounds
    if kind != "fp8":  # of which a GPU is asked
        assert not rounds_activations(model, torch.device("cuda"))


EMU = ModelConfig(  # the size of Emu3.5
    text_vocabulary=151_854, codebook_size=131_072, dim=5120, layers=64, heads=64, kv_heads=8,
    hidden=25_600, windows=(1,), context=5120, head_dim=128, qk_norm=True, text_head=True,
    rope_theta=1e6,
)  # fmt: skip


def test_34_billion_weights_and_their_cache_fit_24_gb():
    """Counted by hand: a matrix takes half a byte a weight and two bytes for each 128 of a row."""
    model = quantize(skeleton(EMU), "int4")
    attention = 2 * 5120 * 64 * 128 + 2 * 5120 * 8 * 128
    linear = 64 * (attention + 3 * 5120 * 25_600) + 5120 * (131_072 + 151_854)
    others = 5120 * (131_072 + 151_854) + 64 * (2 * 5120 + 2 * 128) + 5120
    found = sum(x.numel() * (1 if x.dtype == torch.uint8 else 2) for x in model.parameters())
    assert linear + others > 34e9
    assert found == linear // 2 + linear // 128 * 2 + 2 * others
    cache = KVCache.nbytes(EMU, 2, 4300, torch.bfloat16)
    assert cache == 2 * 64 * 2 * 8 * 4300 * 128 * 2
    assert found + cache < 24e9


@pytest.mark.slow
@torch.inference_mode()
def test_a_block_at_full_width():
    """The relative error of what a block of Emu3.5's size adds to its input, with random weights
    of which a few are large."""
    torch.manual_seed(0)
    block, x = Block(EMU).bfloat16(), torch.randn(1, 16, EMU.dim).bfloat16()
    for name, weight in block.named_parameters():
        if "proj" in name:
            weight.normal_(std=0.02)
            weight.view(-1)[:: 10**6] *= 20
    angles = rotary_angles(torch.arange(16)[None], EMU)
    added = [block(x, angles, None, None, 0) - x]
    added.append(quantize(block, "int4")(x, angles, None, None, 0) - x)
    error = (added[1].double() - added[0].double()).norm() / added[0].double().norm()
    assert 0.05 < error < 0.3
