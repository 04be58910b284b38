import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.loras import write_random_lora
from tests.support.models import model_of
from tokenshuffle_core import engine
from tokenshuffle_core.adapt.lora import add_lora, merge_lora
from tokenshuffle_core.checkpoints import BUNDLED
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine.cpu_linear import CpuLinear
from tokenshuffle_core.engine.cpu_transformer import CpuTransformer
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.sampler import pad_left, sample
from tokenshuffle_core.transformer import KVCache

CPU = torch.device("cpu")


def codes_of(loaded, settings, seeds: list[int], engine: bool) -> torch.Tensor:
    prompts = [loaded.encode_prompt("a red apple, 3d style")] * len(seeds)
    steps = loaded.sample(prompts, [], settings, seeds, engine=engine)
    return list(steps)[-1].codes


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_pictures_are_those_of_the_plain_loop(temperature, stored):
    """With several windows a step, and of two pictures with one."""
    loaded = load(dtype=torch.float32 if stored == torch.float32 else None)
    if stored == torch.float32:  # numbers that 16 bits do not hold
        for parameter in loaded.model.parameters():
            parameter.data *= 1 + 1e-4
    settings = replace(loaded.config.generation, temperature=temperature)
    for seeds in ([0], [1], [7, 8]):
        fast = codes_of(loaded, settings, seeds, True)
        assert any(isinstance(module, CpuTransformer) for module in loaded.model.modules())
        assert torch.equal(fast, codes_of(loaded, settings, seeds, False))
        assert not engine.packed_nbytes(loaded.model)


@pytest.mark.parametrize("kind", [None, "int8", "fp8", "int4"])
def test_release_leaves_what_was_loaded(kind):
    model = load().model
    if kind:
        quantize(model, kind)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    pointers = {name: p.data_ptr() for name, p in parameters.items()}
    for _ in range(2):
        engine.prepare(model, CPU)
        assert dict(model.named_modules()).keys() == modules.keys()
        assert dict(model.named_parameters()).keys() == parameters.keys()
        assert dict(model.named_modules()) != modules
        engine.release(model)
        assert engine.packed_nbytes(model) == 0
        assert dict(model.named_modules()) == modules
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
        tensors = {id(x) for m in model.modules() for x in vars(m).values() if torch.is_tensor(x)}
        assert not tensors


def test_bytes_beside_the_weights():
    """Two for each weight of a linear layer, where the file has 16 bits a weight."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this CPU has no kernel that multiplies 16-bit weights")
    model = load().model
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    engine.prepare(model, CPU)
    assert engine.packed_nbytes(model) == sum(2 * layer.weight.numel() for layer in linear)


def test_weights_are_packed_once_and_again_when_they_changed():
    model = load().model
    engine.prepare(model, CPU)
    before = model.transformer
    engine.prepare(model, CPU)
    assert model.transformer is before
    with torch.no_grad():
        model.transformer.blocks[3].mlp.up_proj.weight.mul_(2)
    engine.prepare(model, CPU)
    assert model.transformer is not before
    before = model.head
    model.head.weight = nn.Parameter(model.head.weight * 2)
    engine.prepare(model, CPU)
    assert model.head is not before
    assert model.head.weight is before.weight


def changes(tmp_path):
    """What changes a model, by name."""

    def merge(model) -> None:
        write_random_lora(tmp_path / "lora.safetensors", BUNDLED)
        merge_lora(model, tmp_path / "lora.safetensors")

    def exchange(model) -> None:
        block = model.transformer.blocks[2]
        block.mlp.up_proj = nn.Linear(*block.mlp.up_proj.weight.T.shape, bias=False)

    return {"int8": lambda model: quantize(model, "int8"), "merge": merge, "exchange": exchange}


@pytest.mark.parametrize("change", ["int8", "merge", "exchange"])
def test_a_model_may_be_changed_after_it_has_drawn(change, tmp_path):
    loaded = load()
    # The engine adds in another order, which other settings may show.
    settings = replace(loaded.config.generation, temperature=0.3, cfg=2.0)
    before = codes_of(loaded, settings, [0], True)
    changes(tmp_path)[change](loaded.model)
    found = codes_of(loaded, settings, [0], True)
    assert not torch.equal(found, before)
    assert torch.equal(found, codes_of(loaded, settings, [0], False))


@torch.inference_mode()
@pytest.mark.parametrize("change", ["in place", "dtype", "load_state_dict", "deepcopy"])
def test_a_model_that_has_drawn_computes_with_its_weights_as_they_are(change):
    """Not only in `sample`, which prepares anew: a step and a forward of its own as well."""
    with torch.inference_mode(False):
        model, plain = load().model, load().model
        engine.prepare(model, CPU)
        if change == "deepcopy":
            model = copy.deepcopy(model)
        for each in (model, plain):
            state = {name: weight / 2 for name, weight in each.state_dict().items()}
            if change == "load_state_dict":
                each.load_state_dict(state)
            elif change == "dtype":
                each.to(torch.float64)
            else:
                with torch.no_grad():
                    for parameter in each.parameters():
                        parameter.mul_(0.5)
    text, padding = pad_left([[1, 5, 6]], 0, "cpu")
    codes = torch.arange(16).view(1, 1, 4, 4)[:, :, :2, :2]
    found, expected = [], []
    for each, states in ((model, found), (plain, expected)):
        cache = KVCache(each.config, padding, 10, each.code_embedding.weight.dtype)
        first = each.prefill(cache, text)
        states += [first, each.step(cache, codes), each.head(first)]
        states.append(each(text, padding, codes.repeat(1, 1, 2, 2)[:, 0]).codes)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_threads_that_prepare_one_model_leave_it_whole():
    model = load().model
    before = dict(model.named_modules())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: engine.prepare(model, CPU), range(8)))
    assert isinstance(model.transformer, CpuTransformer)
    engine.release(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("changes", [{"qk_norm": True, "head_dim": 16}, {"qkv_bias": True}])
def test_blocks_of_qwen_are_swapped_and_draw_the_same(changes):
    model = model_of(2, **changes)
    for parameter in model.parameters():
        parameter.data *= 0.5
    engine.prepare(model, CPU)
    assert isinstance(model.transformer, CpuTransformer)
    engine.release(model)
    settings = GenerationConfig(cfg=2.0, temperature=0.7)
    for seed in range(3):
        drawn = [
            list(
                sample(
                    model, [[1, 5, 6]], [[1, 2]], (4, 5), settings,
                    [torch.Generator().manual_seed(seed)], 0, None, ahead, fast,
                )
            )[-1].codes
            for ahead, fast in ((1, False), (1, True), (8, True))
        ]  # fmt: skip
        assert drawn[0].unique().numel() > 3
        assert all(torch.equal(codes, drawn[0]) for codes in drawn)


def test_only_plain_layers_are_swapped():
    model = add_lora(model_of(2), 2)
    before = dict(model.named_modules())
    engine.prepare(model, CPU)
    bases = {name for name in before if name.endswith(".base")}
    assert {n for n, m in model.named_modules() if m is not before[n]} == bases
    other = model_of(2)
    engine.prepare(other, torch.device("meta"))
    assert not [m for m in other.modules() if isinstance(m, (CpuLinear, CpuTransformer))]
    engine.prepare(other.bfloat16(), CPU)
    assert isinstance(other.head, CpuLinear)
    assert not isinstance(other.transformer, CpuTransformer)
