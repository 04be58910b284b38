from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.models import CONFIG
from tokenshuffle_core.adapt.lora import add_lora
from tokenshuffle_core.engine.cpu_transformer import FewRows
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.transformer import KVCache, Transformer

CPU = torch.device("cpu")


def transformer_of(**changes) -> Transformer:
    made = Transformer(replace(CONFIG, **changes)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@torch.inference_mode()
@pytest.mark.parametrize("kv_heads", [1, CONFIG.heads])
@pytest.mark.parametrize("padding", [[0], [0, 0], [0, 2], [3, 0, 1, 0]])
@pytest.mark.parametrize("lengths", [(5, 1, 1, 1), (4, 2, 1), (2, 5)])
@pytest.mark.parametrize("weights", [None, "int8", "fp8"])
def test_hidden_states_are_the_transformers(kv_heads, padding, lengths, weights):
    transformer = transformer_of(kv_heads=kv_heads)
    if weights:
        quantize(transformer, weights)
    caches = [
        KVCache(transformer.config, torch.tensor(padding), 10, torch.float32) for _ in range(2)
    ]
    few_rows = FewRows.of(transformer, CPU)
    for length in lengths:
        x = torch.randn(len(padding), length, CONFIG.width)
        found, expected = few_rows(x, caches[0]), transformer(x, cache=caches[1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert caches[0].length == caches[1].length


def test_other_layers_devices_and_types_are_left_to_the_transformer():
    transformer = transformer_of()
    assert FewRows.of(transformer, CPU)
    assert not FewRows.of(transformer, torch.device("meta"))
    assert not FewRows.of(transformer_of().bfloat16(), CPU)
    transformer.blocks[0].mlp.up_proj = nn.Linear(CONFIG.width, CONFIG.hidden, bias=False)
    assert not FewRows.of(transformer, CPU)


def test_a_lora_in_training_is_left_to_the_transformer():
    transformer = transformer_of()
    add_lora(transformer, 2)
    assert not FewRows.of(transformer, CPU)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_many_rows_are_left_to_the_transformer(dtype, monkeypatch):
    transformer = transformer_of()
    transformer.to(dtype).float()
    few_rows, left = FewRows.of(transformer, CPU), []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer, "forward", lambda *args, **named: left.append(1) or forward(*args, **named)
    )
    for rows in (few_rows.rows, few_rows.rows + 1):
        padding = torch.zeros(rows, dtype=torch.int64)
        x, found = torch.randn(rows, 1, CONFIG.width), []
        for compute in (few_rows, lambda x, cache: forward(transformer, x, cache=cache)):
            cache = KVCache(transformer.config, padding, 2, torch.float32)
            found.append(compute(x, cache))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        assert len(left) == rows - few_rows.rows


def test_weights_share_one_memory_and_can_be_trained_on():
    transformer = transformer_of()
    before = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    with torch.inference_mode():
        FewRows(transformer)
        FewRows(transformer)
    attention = transformer.blocks[0].attention
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    storages = {projection.weight.untyped_storage().data_ptr() for projection in projections}
    assert len(storages) == 1
    assert attention.q_proj.weight.untyped_storage().nbytes() == 4 * sum(
        projection.weight.numel() for projection in projections
    )
    for name, weight in transformer.state_dict().items():
        assert torch.equal(weight, before[name])
    transformer(torch.randn(1, 3, CONFIG.width)).square().sum().backward()
    torch.optim.SGD(transformer.parameters(), lr=0.1).step()
    assert not torch.equal(attention.q_proj.weight, before["blocks.0.attention.q_proj.weight"])


@torch.inference_mode()
def test_weights_that_a_host_changes_are_seen_by_the_next_decoding():
    transformer = transformer_of()
    FewRows(transformer)
    attention = transformer.blocks[0].attention
    attention.k_proj.weight = nn.Parameter(torch.randn_like(attention.k_proj.weight))
    cache, other = (
        KVCache(transformer.config, torch.zeros(2, dtype=torch.int64), 4, torch.float32)
        for _ in range(2)
    )
    x = torch.randn(2, 1, CONFIG.width)
    found, expected = FewRows(transformer)(x, cache), transformer(x, cache=other)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
