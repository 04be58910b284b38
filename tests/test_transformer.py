"""Against LLaMA, Qwen2 and Qwen3 of the transformers library with the same random weights."""

import dataclasses

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.transformer import KVCache, Transformer

CONFIG = PRESETS["tiny"].model


QWEN2, QWEN3 = {"qkv_bias": True}, {"qk_norm": True, "head_dim": 32}


def reference_of(transformer: Transformer):
    config = transformer.config
    model, shape = LlamaModel, LlamaConfig
    if config.qkv_bias:
        model, shape = Qwen2Model, Qwen2Config
    elif config.qk_norm:
        model, shape = Qwen3Model, Qwen3Config
    llama = model(
        shape(
            vocab_size=8, hidden_size=config.dim, intermediate_size=config.hidden,
            num_hidden_layers=config.layers, num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads, rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta, max_position_embeddings=config.context,
            head_dim=config.head_size,
        )
    )  # fmt: skip
    names = {
        "attention_norm": "input_layernorm", "attention.": "self_attn.",
        "mlp_norm": "post_attention_layernorm", "blocks.": "layers.",
    }  # fmt: skip
    weights = {}
    for name, weight in transformer.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = weight
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    assert missing == ["embed_tokens.weight"]
    assert not unexpected
    return llama.eval()


SHAPES = [{"kv_heads": 4}, {"kv_heads": 2}, {"kv_heads": 1}, QWEN2, QWEN3]


@pytest.fixture(params=SHAPES, ids=str)
def transformer(request) -> Transformer:
    torch.manual_seed(1)
    module = Transformer(dataclasses.replace(CONFIG, **request.param)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


@torch.inference_mode()
def test_hidden_states_equal_llamas(transformer):
    x = torch.randn(2, 9, CONFIG.dim)
    expected = reference_of(transformer)(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(transformer(x), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_left_padding_changes_nothing(transformer):
    x = torch.randn(1, 7, CONFIG.dim)
    padded = torch.cat([torch.randn(1, 4, CONFIG.dim), x], dim=1)
    batch = torch.cat([padded, torch.randn(1, 11, CONFIG.dim)])
    hidden = transformer(batch, torch.tensor([4, 0]))
    torch.testing.assert_close(hidden[:1, 4:], transformer(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("padding", [(0, 0), (2, 0)])
@pytest.mark.parametrize("parts", [(5, 1, 1, 1), (3, 4, 1), (8,)])
def test_cached_parts_equal_the_full_forward(transformer, padding, parts):
    padding = torch.tensor(padding)
    x = torch.randn(2, sum(parts), CONFIG.dim)
    full = transformer(x, padding)
    cache = KVCache(transformer.config, padding, capacity=10, dtype=torch.float32)
    hidden = torch.cat([transformer(part, cache=cache) for part in x.split(parts, 1)], 1)
    torch.testing.assert_close(hidden[1], full[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden[0, padding[0] :], full[0, padding[0] :], rtol=1e-5, atol=1e-5)
    assert cache.length == sum(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_caches_size_is_what_it_allocates(dtype):
    """Of a model with fewer heads of keys and values than heads."""
    assert CONFIG.kv_heads < CONFIG.heads
    cache = KVCache(CONFIG, torch.zeros(3, dtype=torch.int64), 17, dtype)
    allocated = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert KVCache.nbytes(CONFIG, rows=3, positions=17, dtype=dtype) == allocated
