import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenshuffle_core.linear import Linear


@pytest.mark.parametrize("columns", [64, 768, 1024, 1031, 1250, 2048])
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 3), (2, 2), (5, 1), (8,), (9,), (2, 40)])
def test_few_rows_are_those_of_torch(columns, shape):
    layer, x = Linear(columns, 96), torch.randn(*shape, columns)
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
    layer, x = Linear(columns, 96).to(dtype), torch.randn(rows, columns, dtype=dtype)
    exact = x.double() @ layer.weight.double().T
    error = (layer(x) - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("columns", [512, 2048])
def test_weights_may_change(columns, mode):
    layer, x = Linear(columns, 16), torch.randn(2, columns)
    with mode():
        layer(x)
        layer.weight += 1
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=1e-4, atol=1e-4)
        for _ in range(4):  # the memory of the one before may be used again
            layer.weight = nn.Parameter(torch.randn(16, columns))
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("columns", "rows", "copies"), [(512, 16, 0), (1024, 16, 0), (2048, 16, 1), (2048, 2048, 0)]
)
def test_a_second_copy_of_a_wide_matrix_alone(columns, rows, copies):
    layer = Linear(columns, rows)
    layer(torch.randn(2, columns))
    assert (layer._cut[2] is not None) == copies


def test_gradients_are_those_of_torch():
    layer, x = Linear(64, 16), torch.randn(2, 64)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_(True)
    F.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
