"""The kernels on a GPU; without one, in Triton's interpreter, which runs them on a CPU (see
conftest.py)."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.graphs import EmulatedSteps, emulated
from tests.support.models import dequantized, model_of
from tokenshuffle_core import engine
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.sampler import pad_left, sample

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from tokenshuffle_core.engine import triton_kernels as kernels
from tokenshuffle_core.engine.cuda_graphs import StaticCache
from tokenshuffle_core.engine.gpu_layers import (
    MOST_ROWS,
    MOST_TOKENS,
    GpuLinear,
    GpuTransformer,
    check,
    fits,
)
from tokenshuffle_core.engine.quantize import (
    KINDS,
    CastLinear,
    QuantizedLinear,
    quantize,
    rounds_activations,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PLAIN = kernels.PLAIN.value
# A LLaMA that is just large enough: heads of 32, so that a kernel has 16 rotary pairs.
SMALL = {"dim": 64, "heads": 2, "kv_heads": 2, "hidden": 96, "layers": 1}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
if DEVICE.type == "cuda":  # the interpreter cannot multiply it
    TOLERANCE[torch.bfloat16] = 4e-2


@pytest.fixture(autouse=True)
def no_kernel_fails(caplog):
    yield
    assert not [r for r in caplog.records if "without Triton" in r.message]


def randn(*shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(DEVICE, dtype)


def assert_close(found, expected, dtype) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 16, 16), (5, 48, 320), (40, 32, 768)])
def test_product(rows, outputs, columns, dtype):
    x, weight = randn(rows, columns, dtype=dtype), randn(outputs, columns, dtype=dtype)
    found = kernels.linear(x, (weight, weight, PLAIN))
    assert_close(found, F.linear(x.double(), weight.double()), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_surrounds_a_product(dtype):
    """RMSNorm before it, the gate of SwiGLU and a residual after it: against the formulas."""
    x, gate, up = (randn(n, 96, dtype=dtype) for n in (3, 32, 32))
    norm, residual = randn(96, dtype=dtype), randn(3, 32, dtype=dtype)
    found = kernels.linear(
        x, (gate, gate, PLAIN), norm=norm, eps=1e-5, up=(up, up, PLAIN), residual=residual
    )
    x, gate, up, norm, residual = (t.double() for t in (x, gate, up, norm, residual))
    h = F.rms_norm(x, (96,), norm, 1e-5)
    assert_close(found, F.silu(h @ gate.T) * (h @ up.T) + residual, dtype)


@torch.inference_mode()
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("columns", [256, 640])
def test_product_with_small_weights(kind, columns):
    """Against the product with the weights that they stand for."""
    if kind == "fp8" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    plain = nn.Linear(columns, 48, bias=False, device=DEVICE)
    layer = QuantizedLinear.of(plain, KINDS[kind])
    x = randn(3, columns)
    found = GpuLinear(layer)(x)
    assert_close(found, F.linear(x, layer.dequantized(torch.float32)), torch.float32)


@torch.inference_mode()
def test_product_with_16_bit_weights_in_float32():
    """A model that was loaded for a CPU, moved to a GPU."""
    layer = CastLinear(320, 48, bias=False, device=DEVICE)
    layer.weight.data = layer.weight.half()
    x = randn(3, 320)
    assert_close(GpuLinear(layer)(x), x.double() @ layer.weight.double().T, torch.float32)


@torch.inference_mode()
def test_linear_layer_with_a_bias():
    plain = nn.Linear(64, 32, device=DEVICE)
    x = randn(2, 3, 64)
    torch.testing.assert_close(GpuLinear(plain)(x), plain(x), rtol=1e-5, atol=1e-5)
    wide = randn(2, 4, 3, 64)[:, :, 1]  # rows that do not follow each other in memory
    torch.testing.assert_close(GpuLinear(plain)(wide), plain(wide), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        GpuLinear(plain)(x.expand(300, -1, -1, -1)), plain(x.expand(300, -1, -1, -1))
    )


@torch.inference_mode()
def test_linear_layer_of_the_last_token_of_each_row():
    """A view with gaps between its rows."""
    plain = nn.Linear(64, 32, device=DEVICE)
    x = randn(3, 5, 64)[:, -1:]
    torch.testing.assert_close(GpuLinear(plain)(x), plain(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_first_picture_of_a_batch_and_the_others(monkeypatch):
    """Without guidance and window, the head reads the prompt's hidden states as they are."""
    model = model_of(1, **SMALL).to(DEVICE)
    settings = GenerationConfig(cfg=1.0, temperature=0.0)

    def codes(**more) -> torch.Tensor:
        random = [torch.Generator(DEVICE) for _ in range(3)]
        prompts = [[1, 2, 3], [1, 9, 8], [1, 5, 6]]
        *_, last = sample(model, prompts, [], (1, 2), settings, random, 0, **more)
        return last.codes

    expected = codes(engine=False)
    with on_a_gpu(monkeypatch):
        assert torch.equal(codes(), expected)


@torch.inference_mode()
@pytest.mark.parametrize("failing", ["linear", "attend"])
def test_a_kernel_that_fails_leaves_the_plain_layers(failing, monkeypatch, caplog):
    """Also in the middle of a step."""
    model = model_of(2, **SMALL).to(DEVICE)
    expected = codes_of(model, (2, 2), engine=False)

    def fail(*arguments, **more):
        raise OutOfResources(2, 1, "shared memory")

    with on_a_gpu(monkeypatch):
        monkeypatch.setattr(kernels, failing, fail)
        assert torch.equal(codes_of(model, (2, 2), ahead=2), expected)
    assert not model.transformer.works
    assert caplog.records
    caplog.clear()


@pytest.mark.parametrize(
    ("rows", "outputs", "fitting"), [(16, 32, True), (24, 32, False), (32, 24, False)]
)
def test_which_layers_fit(rows, outputs, fitting):
    assert fits(nn.Linear(rows, outputs, device=DEVICE), DEVICE) == fitting
    assert not fits(nn.Linear(32, 32, device="meta"), DEVICE)
    turned = nn.Linear(32, 32, device=DEVICE)
    turned.weight = nn.Parameter(turned.weight.T)
    assert not fits(turned, DEVICE)


def test_which_transformers_fit():
    plain = model_of(2, **SMALL).to(DEVICE).transformer
    assert GpuTransformer.takes(plain, DEVICE)
    plain.blocks[0].attention.q_proj = nn.Linear(64, 64, bias=True, device=DEVICE)
    assert not GpuTransformer.takes(plain, DEVICE)
    for shape in ({"qkv_bias": True}, {"qk_norm": True}):
        assert GpuTransformer.takes(model_of(2, **SMALL | shape).to(DEVICE).transformer, DEVICE)
    wide = model_of(2, **SMALL, qk_norm=True, head_dim=96).to(DEVICE)  # in no tile of powers of two
    assert not GpuTransformer.takes(wide.transformer, DEVICE)
    other = model_of(2, **SMALL | {"heads": 4, "kv_heads": 4}).to(DEVICE)  # heads of 16
    assert not GpuTransformer.takes(other.transformer, DEVICE)


def test_every_layer_of_a_step_takes_its_rows():
    """With a window of 4, or the sums of a step would depend on the number of windows."""
    assert engine.ROWS <= MOST_TOKENS
    assert engine.ROWS * 4**2 <= MOST_ROWS


@torch.inference_mode()
def test_attention_does_not_depend_on_the_number_of_queries():
    """Bit for bit."""
    keys, values = (randn(1, 2, 80, 32) for _ in range(2))
    queries, padding = randn(20, 4, 32), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    whole = kernels.attend(queries, keys, values, padding, torch.tensor(50, device=DEVICE))
    for i in range(20):
        alone = kernels.attend(
            queries[i : i + 1], keys, values, padding, torch.tensor(50 + i, device=DEVICE)
        )
        assert torch.equal(alone, whole[i : i + 1])


@torch.inference_mode()
@pytest.mark.parametrize(("most", "reaches"), [(64, 1), (1, 2)])
def test_one_graph_where_attention_stops_at_the_length(most, reaches, monkeypatch):
    monkeypatch.setattr("tokenshuffle_core.engine.gpu_layers.MOST_TOKENS", most)
    monkeypatch.setattr("tokenshuffle_core.engine.cuda_graphs.CHUNK", 4)
    model = model_of(2, **SMALL).to(DEVICE)
    expected = codes_of(model, (2, 3), engine=False)
    with on_a_gpu(monkeypatch):
        assert torch.equal(codes_of(model, (2, 3), ahead=1), expected)
        _, kept = engine.KEPT[model]
    assert len(kept.replays) == reaches


def test_swapped_layers_round_no_activations(monkeypatch):
    """On a GPU that multiplies float8."""
    monkeypatch.setattr("tokenshuffle_core.engine.quantize._multiplies_fp8", lambda device: True)
    model, gpu = quantize(model_of(2, **SMALL), "fp8"), torch.device("cuda", 0)
    assert rounds_activations(model, gpu)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear) and not name.startswith("transformer."):
            model.set_submodule(name, GpuLinear(layer))
    assert rounds_activations(model, gpu)
    model.transformer = GpuTransformer(model.transformer)
    assert not rounds_activations(model, gpu)


@pytest.mark.parametrize("together", [1, 5, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 32), (4, 2, 48)])
@pytest.mark.parametrize(("length", "split"), [(3, 256), (70, 16), (33, 16)])
def test_attention(together, heads, kv_heads, size, length, split, monkeypatch):
    """To the filled part of a cache, with padding on the left, against torch's."""
    monkeypatch.setattr(kernels, "SPLIT", split)
    monkeypatch.setattr(kernels, "KEYS", 16)
    padding = torch.tensor([0, 2], device=DEVICE)
    keys, values = (randn(2, kv_heads, 96, size) for _ in range(2))
    for stored in (keys, values):
        stored[:, :, length + together :] = torch.nan  # must not be read
    queries = randn(2 * together, heads, size)
    found = kernels.attend(queries, keys, values, padding, torch.tensor(length, device=DEVICE))
    end = length + together
    place, slots = torch.arange(length, end), torch.arange(end)
    seen = (slots <= place[:, None]) & (slots >= padding.cpu()[:, None, None])
    expected = F.scaled_dot_product_attention(
        queries.unflatten(0, (2, together)).transpose(1, 2), keys[:, :, :end], values[:, :, :end],
        seen[:, None].to(DEVICE), enable_gqa=True,
    )  # fmt: skip
    assert_close(found.view(2, together, heads, size), expected.transpose(1, 2), torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 1}, {"rope_axes": 2}, {"qkv_bias": True, "kv_heads": 1},
     {"qk_norm": True, "head_dim": 64}],
)  # fmt: skip
def test_steps_are_those_of_the_plain_transformer(changes):
    model = model_of(2, **SMALL | changes).to(DEVICE)
    text, padding = pad_left([[1, 5, 6, 7], [1, 2]], 0, DEVICE)
    layout = model.layout(4, 12, 2)
    shape = model.config, padding, 40, torch.float32, layout
    caches = StaticCache(*shape), StaticCache(*shape)
    plain, fast = model.transformer, GpuTransformer(model.transformer)
    assert GpuTransformer.takes(plain, DEVICE)
    for cache in caches:
        model.prefill(cache, text)
        cache.hold()
    for count, wrong in [(1, 0), (5, 2)]:
        codes = torch.randint(0, 64, (1, count, 2, 2), device=DEVICE)
        states = []
        for transformer, cache in zip((plain, fast), caches, strict=True):
            model.transformer = transformer
            states.append(model.step(cache, codes))
            cache.drop(torch.tensor(wrong, device=DEVICE))
        assert_close(states[1], states[0], torch.float32)
    assert torch.equal(caches[0].position, caches[1].position)


class RepeatedSteps(EmulatedSteps):
    """The interpreter's work cannot be recorded, so it is done again."""

    def _capture(self, model, count: int):
        return lambda: self._step(model, count)


@contextmanager
def on_a_gpu(monkeypatch):
    """Without one, layers are swapped and steps repeated as there."""
    if DEVICE.type == "cpu":
        kinds = {"cpu": (GpuLinear, GpuTransformer)}
        monkeypatch.setattr("tokenshuffle_core.engine.LAYERS", kinds)
        with emulated(monkeypatch, RepeatedSteps) as made:
            yield
        assert len(made) == 1
    else:
        yield


def codes_of(model, grid: tuple[int, int], **more) -> torch.Tensor:
    settings = GenerationConfig(cfg=3.0, temperature=0.7)
    random = [torch.Generator(DEVICE).manual_seed(0)]
    *_, last = sample(model, [[1, 2, 3]], [[1]], grid, settings, random, 0, **more)
    return last.codes


@torch.inference_mode()
@pytest.mark.parametrize("ahead", [1, 3])
def test_a_picture_is_that_of_the_plain_loop(ahead, monkeypatch):
    """All layers replaced."""
    model = model_of(2, **SMALL, window_head=16).to(DEVICE)
    expected = codes_of(model, (2, 2), engine=False)
    with on_a_gpu(monkeypatch):
        found = codes_of(model, (2, 2), ahead=ahead)
    assert isinstance(model.transformer, GpuTransformer)
    assert isinstance(model.head, GpuLinear)
    assert torch.equal(found, expected)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_picture_with_small_weights_and_windows_ahead(kind, monkeypatch):
    """That of the plain loop with the weights that they stand for."""
    model = model_of(1, **SMALL | {"dim": 128, "hidden": 128}).to(DEVICE)
    quantize(model, kind)
    plain = dequantized(model)
    with on_a_gpu(monkeypatch):
        found = codes_of(model, (1, 4), ahead=3)
    assert isinstance(model.transformer, GpuTransformer)
    assert torch.equal(found, codes_of(plain, (1, 4), engine=False))


def test_the_trial():
    check(DEVICE)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_row_does_not_depend_on_the_number_of_rows(dtype, kind):
    """Bit for bit, so that windows ahead change no picture in 16 bits either."""
    plain = nn.Linear(3072, 4096, bias=False, device=DEVICE, dtype=dtype)
    layer = GpuLinear(QuantizedLinear.of(plain, KINDS[kind]) if kind else plain)
    x = randn(512, 3072, dtype=dtype)
    whole = layer(x)
    for rows in (1, 2, 16, 17, 64, 500):
        assert torch.equal(layer(x[:rows]), whole[:rows])


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windows_ahead_change_no_picture_in_16_bits(dtype):
    model = model_of(2, dim=256, heads=4, kv_heads=2, hidden=512).to(DEVICE, dtype)
    settings = replace(GenerationConfig(), cfg=3.0, temperature=0.9)

    def codes(ahead: int) -> torch.Tensor:
        random = [torch.Generator(DEVICE).manual_seed(0)]
        *_, last = sample(model, [[1, 2, 3]], [[1]], (12, 12), settings, random, 0, ahead=ahead)
        return last.codes

    alone = codes(1)
    for ahead in (2, 8, 32):
        assert torch.equal(codes(ahead), alone)
