from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.models import CONFIG
from tokenshuffle_core.engine.cpu_transformer import CpuTransformer
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.transformer import KVCache, Transformer


def transformer_of(**changes) -> Transformer:
    torch.manual_seed(0)  # with some, one activation in 8 bits is rounded the other way
    made = Transformer(replace(CONFIG, **changes)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@torch.inference_mode()
@pytest.mark.parametrize(
    "shape",
    [{"kv_heads": 1}, {"kv_heads": CONFIG.heads}, {"qkv_bias": True, "kv_heads": 2},
     {"qk_norm": True, "head_dim": 48}],
)  # fmt: skip
@pytest.mark.parametrize("padding", [[0], [0, 0], [0, 2], [3, 0, 1, 0]])
@pytest.mark.parametrize("lengths", [(5, 1, 1, 1), (4, 2, 1), (2, 5)])
@pytest.mark.parametrize("weights", [None, "int8", "fp8", "int4"])
def test_hidden_states_are_the_transformers(shape, padding, lengths, weights):
    transformer = transformer_of(**shape)
    if weights:
        quantize(transformer, weights)
    caches = [
        KVCache(transformer.config, torch.tensor(padding), 10, torch.float32) for _ in range(2)
    ]
    fast = CpuTransformer(transformer)
    for length in lengths:
        x = torch.randn(len(padding), length, CONFIG.dim)
        found, expected = fast(x, cache=caches[0]), transformer(x, cache=caches[1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert caches[0].length == caches[1].length


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_as_many_rows_as_the_products_take_and_one_more(dtype):
    transformer = transformer_of()
    transformer.to(dtype).float()
    fast = CpuTransformer(transformer)
    for rows in (fast.rows, fast.rows + 1):
        padding = torch.zeros(rows, dtype=torch.int64)
        x = torch.randn(rows, 1, CONFIG.dim)
        found, expected = (
            compute(x, cache=KVCache(transformer.config, padding, 2, torch.float32))
            for compute in (fast, transformer)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_transformer():
    transformer = transformer_of()
    fast, x = CpuTransformer(transformer), torch.randn(1, 3, CONFIG.dim)
    weight = transformer.blocks[0].attention.q_proj.weight
    found = torch.autograd.grad(fast(x).square().sum(), weight)
    assert torch.equal(*found, *torch.autograd.grad(transformer(x).square().sum(), weight))
