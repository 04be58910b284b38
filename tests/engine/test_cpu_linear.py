import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenshuffle_core.engine import cpu_linear
from tokenshuffle_core.engine.cpu_linear import MANY, MANY_IN_16_BITS, CpuLinear, product
from tokenshuffle_core.engine.quantize import CastLinear

ENGINES = torch.backends.quantized.supported_engines


def linear(columns: int, rows: int, dtype: torch.dtype = torch.float32) -> CpuLinear:
    return CpuLinear(nn.Linear(columns, rows, bias=False, dtype=dtype))


@pytest.mark.parametrize("columns", [64, 768, 1024, 1031, 1250, 2048])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 3), (2, 2), (5, 1), (8,), (9,), (2, 40)])
def test_few_rows_are_those_of_torch(columns, shape):
    layer, x = linear(columns, 96), torch.randn(*shape, columns)
    expected = F.linear(x, layer.weight)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        turned = x.transpose(0, -2).contiguous().transpose(0, -2)
        torch.testing.assert_close(layer(turned), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [768, 2048])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_short_floats_are_within_their_precision(dtype, columns, rows):
    layer, x = linear(columns, 96, dtype), torch.randn(rows, columns, dtype=dtype)
    exact = x.double() @ layer.weight.double().T
    error = (layer(x) - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("columns", [512, 2048])
def test_a_weight_that_changed_is_noticed(columns):
    layer = linear(columns, 16)
    with torch.no_grad():
        assert layer.products[0].is_current()
        layer.weight += 1
        assert not layer.products[0].is_current()
    for _ in range(4):  # the memory of the one before may be used again
        layer.weight = nn.Parameter(torch.randn(16, columns))
        assert layer.plain[0].weight is layer.weight
        assert not layer.products[0].is_current()
        layer = CpuLinear(layer.plain[0])
        assert layer.products[0].is_current()


def test_biases():
    plain, x = nn.Linear(64, 16), torch.randn(2, 3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(CpuLinear(plain)(x), plain(x), rtol=1e-5, atol=1e-5)


def stored(columns: int, rows: int, dtype: torch.dtype, std: float = 0.02) -> nn.Linear:
    """With the weights of a file of this dtype, in float32."""
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight = nn.Parameter((torch.randn(rows, columns) * std).to(dtype).float())
    return layer


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("std", [1e-4, 0.02, 1.0, 300.0])
@pytest.mark.parametrize("rows", [1, 2, 24, 64])
def test_weights_of_short_floats_lose_nothing(dtype, std, rows):
    plain, x = stored(512, 96, dtype, std), torch.randn(3, rows, 512)
    layer = CpuLinear(plain)
    assert layer.products[0].rows == (MANY_IN_16_BITS if "fbgemm" in ENGINES else MANY)
    exact = x[:1].double() @ plain.weight.double().T
    assert (layer(x[:1]) - exact).norm() < 1e-6 * exact.norm()


def cast(columns: int, rows: int, dtype: torch.dtype) -> CastLinear:
    layer = CastLinear(columns, rows)
    layer.weight.data = layer.weight.to(dtype)
    return layer


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [512, 2048])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_weights_in_16_bits_compute_in_32(dtype, columns, has_kernel, monkeypatch):
    if not has_kernel:  # as on a CPU that is not x86
        monkeypatch.setattr(cpu_linear, "multiplies_float16", lambda: False)
    plain = cast(columns, 96, dtype)
    for kind in (torch.float64, torch.bfloat16):  # a model that has been moved to another type
        x = torch.randn(2, columns).to(kind)
        assert CpuLinear(plain).products[0].of(x).dtype == kind
    for rows in (1, 2, 8, MANY_IN_16_BITS, MANY_IN_16_BITS + 1):
        x = torch.randn(rows, columns)
        exact = x.double() @ plain.weight.double().T + plain.bias
        for layer in (plain, CpuLinear(plain)):
            assert layer(x).dtype == torch.float32
            assert (layer(x) - exact).norm() < 1e-6 * exact.norm()
    assert plain.weight.dtype == dtype


@torch.inference_mode()
def test_weights_of_two_types_are_one_product():
    layers = [cast(256, 64, torch.bfloat16), nn.Linear(256, 32), cast(256, 16, torch.float16)]
    x = torch.randn(2, 256)
    exact = torch.cat([x.double() @ layer.weight.double().T for layer in layers], 1)
    assert (product(layers).of(x) - exact).norm() < 1e-6 * exact.norm()


@torch.inference_mode()
@pytest.mark.parametrize("value", [0.1, 1e-9, torch.inf, torch.nan])
def test_one_weight_that_would_lose_keeps_float32(value):
    layer = stored(512, 96, torch.float16)
    layer.weight[50, 7] = value
    assert product([layer]).rows == MANY or value == 1e-9  # less than 2^-24 of the largest


@torch.inference_mode()
def test_of_all_zeros():
    plain = nn.Linear(64, 16, bias=False)
    plain.weight.zero_()
    assert not CpuLinear(plain)(torch.randn(2, 64)).any()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [256, 2048])
def test_layers_with_one_input_are_one_product(dtype, columns):
    layers, x = [stored(columns, rows, dtype) for rows in (64, 32, 16)], torch.randn(4, columns)
    expected = torch.cat([F.linear(x, layer.weight) for layer in layers], 1)
    torch.testing.assert_close(product(layers).of(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "columns", "share"), [
    (torch.float16, 256, 0.5), (torch.float32, 256, 0.0), (torch.float32, 2048, 1.0),
])  # fmt: skip
def test_bytes_that_are_packed(dtype, columns, share):
    """Of 16-bit numbers a copy of half the size; of others only what has to be cut."""
    layer = stored(columns, 96, dtype)
    expected = share if dtype == torch.float32 or "fbgemm" in ENGINES else 0.0
    assert product([layer]).nbytes == expected * layer.weight.nbytes


def test_gradients_are_those_of_torch():
    layer, x = linear(64, 16), torch.randn(2, 64)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_(True)
    F.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
