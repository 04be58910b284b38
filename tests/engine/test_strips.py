"""Strips against whole maps, with what CUDA refuses and what memory they take."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import TINY
from tokenshuffle_core import image_tokenizer
from tokenshuffle_core.engine import strips
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.presets import LLAMAGEN_VQ8, LLAMAGEN_VQ16

CPU = torch.device("cpu")
PLAN = strips.Plan(10**9, bf16=False)
cuda = pytest.mark.gpu


def random_tokenizer(config) -> ImageTokenizer:
    torch.manual_seed(0)
    module = ImageTokenizer(config).eval()
    for parameter in module.parameters():  # norms that do something
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture
def as_cuda(monkeypatch):
    """Group normalisation refuses on the CPU what its CUDA kernel refuses."""
    kernel = torch.native_group_norm

    def strict(x, *rest):
        if not x.is_contiguous():
            raise RuntimeError("Expected X.is_contiguous(memory_format) to be true, but got false")
        return kernel(x, *rest)

    monkeypatch.setattr(torch, "native_group_norm", strict)
    with pytest.raises(RuntimeError, match="is_contiguous"):
        strips.moments(torch.randn(1, 8, 4, 4), 4, 1e-6)  # the CPU's way
    monkeypatch.setattr(strips, "CHANNELS_LAST_NORM", ())
    monkeypatch.setattr(strips, "HOLDING", ())
    monkeypatch.setattr(strips, "NATIVE_BF16", False)  # a CPU's own


@torch.inference_mode()
@pytest.mark.parametrize("room", [0, 10**9])
@pytest.mark.parametrize("size", [(8, 8), (36, 20)])
def test_pictures_on_cuda_are_those_of_whole_maps(as_cuda, size, room, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 500)
    monkeypatch.setattr(image_tokenizer, "LARGE", room)
    module = random_tokenizer(TINY.image_tokenizer)
    images = torch.rand(2, 3, *size)
    latent = module.latent(images)
    torch.testing.assert_close(
        module.latent(images, strips.Plan(room, False)), latent, rtol=1e-4, atol=1e-5
    )
    codes = module.quantizer.nearest(latent)
    assert torch.equal(module.encode(images), codes)
    pixels = module.pixels(module.quantizer.vectors(codes)).clamp(0, 1)
    torch.testing.assert_close(module.decode(codes), pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels_last_norm", [("cpu",), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_in_float64(dtype, channels_last_norm, monkeypatch):
    """Of a map whose channels have means far apart, and far from 0."""
    monkeypatch.setattr(strips, "CHANNELS_LAST_NORM", channels_last_norm)
    x = torch.randn(2, 8, 12, 10) + torch.arange(8.0)[:, None, None] + 10
    x = x.to(dtype, memory_format=torch.channels_last)[:, :, 2:7]
    mean, variance = strips.moments(x, 4, 1e-6)
    grouped = x.double().reshape(2, 4, -1)
    torch.testing.assert_close(mean, grouped.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, grouped.var(-1, correction=0), rtol=1e-4, atol=0)


@torch.inference_mode()
def test_each_function_computes_what_its_layers_do(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 300)
    torch.manual_seed(0)
    norm1, norm2 = nn.GroupNorm(2, 8, eps=1e-6), nn.GroupNorm(2, 12, eps=1e-6)
    conv1, conv2 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
    shortcut, down = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 3, stride=2)
    x = torch.randn(2, 8, 14, 10)
    block = shortcut(x) + conv2(F.silu(norm2(conv1(F.silu(norm1(x))))))
    large = strips.as_map(x)
    for found, expected in (
        (strips.residual(norm1, conv1, norm2, conv2, shortcut, large, PLAN), block),
        (strips.upsample(conv1, large, PLAN), conv1(F.interpolate(x, scale_factor=2.0))),
        (strips.downsample(down, large, PLAN), down(F.pad(x, (0, 1, 0, 1)))),
        (strips.output(norm1, conv1, large), conv1(F.silu(norm1(x)))),
        (strips.output(None, conv1, large), conv1(x)),
    ):
        assert found.shape == expected.shape
        torch.testing.assert_close(strips.hold(found), expected, rtol=1e-4, atol=1e-5)
        for start, stop in ((0, 3), (3, 4), (1, 7)):  # also rows that begin and end anywhere
            rows = found.rows(start, stop)
            torch.testing.assert_close(rows, expected[:, :, start:stop], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_map_may_be_written_over_the_one_it_is_computed_from(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 1)  # two rows, as few as there may be
    x = torch.randn(1, 4, 9, 6).contiguous(memory_format=torch.channels_last)
    expected = F.avg_pool2d(F.pad(x, (0, 0, 2, 2)), (5, 1), 1)
    source = strips.as_map(x)

    def rows(start: int, stop: int) -> torch.Tensor:
        top, bottom = max(0, start - 2), min(9, stop + 2)
        padding = (0, 0, top - start + 2, stop + 2 - bottom)
        return F.avg_pool2d(F.pad(source.rows(top, bottom), padding), (5, 1), 1)

    found = strips.hold(source._replace(rows=rows, held=None), over=x)
    assert found is x
    torch.testing.assert_close(found, expected)


@torch.inference_mode()
@pytest.mark.parametrize("strip", [10**9, 200])
def test_attention_on_other_devices_is_that_of_a_cpu(strip, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", strip)
    q, k, v = torch.randn(3, 2, 8, 30).transpose(2, 3).unsqueeze(2)
    weights = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
    torch.testing.assert_close(strips.attention(q, k, v), weights @ v)
    monkeypatch.setattr(strips, "HOLDING", ())
    torch.testing.assert_close(strips.attention(q, k, v), weights @ v)


class Sizes(TorchDispatchMode):
    """Counts the bytes that live at the same time, of the tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most, self.attention = {}, 0, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


META = torch.device("meta")  # computes nothing, and is treated as a GPU


def decoding_on_a_gpu(module: ImageTokenizer, size: int, dtype: torch.dtype) -> int:
    """The most bytes that live while a picture is decoded in `dtype`, by the sizes alone."""
    codes = torch.zeros(1, size // module.config.stride, size // module.config.stride, device=META)
    module = module.to(dtype)
    with Sizes() as sizes:
        vectors = module.quantizer.vectors(codes.long())
        module.pixels(vectors, module._plan(META, dtype))
    return sizes.most


@torch.inference_mode()
@pytest.mark.parametrize(
    ("config", "size", "dtype"),
    [
        (LLAMAGEN_VQ16, 512, torch.float16),
        (LLAMAGEN_VQ16, 1024, torch.float16),
        (LLAMAGEN_VQ16, 2048, torch.float16),
        (LLAMAGEN_VQ16, 1024, torch.float32),
        (LLAMAGEN_VQ8, 1024, torch.float16),
    ],
)
def test_large_pictures_on_a_gpu_take_a_gibibyte(config, size, dtype):
    """At 2048 pixels, a map of 128 channels has 2^29 values, a gibibyte in 16 bits: none is held.
    Maps at 1024 pixels, 2^27 values or 256 MiB, are."""
    with META:
        module = ImageTokenizer(config)
    found = decoding_on_a_gpu(module, size, dtype)
    bound = module.working_nbytes(1, size**2, META)
    assert found <= bound <= 2.5 * found
    if dtype == torch.float16:
        assert bound <= 2**30
    pictures = 7 * 12 * size**2 * dtype.itemsize
    assert module.working_nbytes(8, size**2, META) <= max(bound, 2**30) + pictures


@torch.inference_mode()
@pytest.mark.parametrize("strip", [2**20, 2**12])
def test_float16_keeps_the_pictures(strip, monkeypatch):
    """The bundled image tokenizer, with a card's rounding. Codes come from float32."""
    monkeypatch.setattr(strips, "NATIVE_BF16", False)
    module = load(dtype=torch.float32).image_tokenizer
    image = torch.rand(1, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    codes = module.encode(image)
    expected = module.decode(codes)
    monkeypatch.setattr(strips, "STRIP", strip)
    monkeypatch.setattr(strips, "HOLDING", ())
    monkeypatch.setattr(image_tokenizer, "LARGE", strip)
    monkeypatch.setattr(image_tokenizer, "HALF", ("cpu",))
    found = module.decode(codes)
    assert found.dtype == torch.float16
    assert 0 < (found - expected).abs().max() < 1 / 255
    assert torch.equal(module.encode(image), codes)
    monkeypatch.setattr(module, "decode_dtype", torch.float32)  # as a host's user may want it
    torch.testing.assert_close(module.decode(codes), expected, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("strip", [2**20, 500])
def test_pictures_that_overflow_float16_are_decoded_in_float32(strip, monkeypatch, caplog):
    monkeypatch.setattr(strips, "NATIVE_BF16", False)
    module = random_tokenizer(TINY.image_tokenizer)
    module.decoder.conv_in.weight *= 1e6  # the norms take it back
    codes = torch.randint(0, 64, (2, 5, 6))
    expected = module.decode(codes)
    monkeypatch.setattr(strips, "STRIP", strip)
    monkeypatch.setattr(image_tokenizer, "HALF", ("cpu",))
    found = module.decode(codes)
    assert "overflows" in caplog.text
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-3)


def peak(function, path) -> int:
    """The most bytes that live at the same time of those that PyTorch allocates in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    profiled.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


def small(config) -> ImageTokenizer:
    multipliers = config.channel_multipliers
    return random_tokenizer(
        replace(TINY.image_tokenizer, channels=16, channel_multipliers=multipliers)
    )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LLAMAGEN_VQ16, LLAMAGEN_VQ8], ids=["VQ-16", "VQ-8"])
@pytest.mark.parametrize(
    ("strip", "large"), [(2**20, 2**27), (2**12, 2**27), (2**12, 2**10)],
    ids=["whole", "strips", "strips without room"],
)  # fmt: skip
def test_decoding_takes_no_more_memory_than_it_says(
    config, strip, large, dtype, tmp_path, monkeypatch
):
    """Strips have four rows, as those of 2048 pixels on a CPU."""
    monkeypatch.setattr(strips, "STRIP", strip)
    monkeypatch.setattr(image_tokenizer, "LARGE", large)
    module = small(config).to(dtype)
    codes = torch.randint(0, 64, (1, 96 // module.config.stride, 64 // module.config.stride))
    bound = module.working_nbytes(1, 96 * 64, CPU)
    found = peak(lambda: module.decode(codes), tmp_path / "decode.json")
    assert found <= bound <= 3 * found


@torch.inference_mode()
@pytest.mark.parametrize("levels", [(0, 1), (4,)])
@pytest.mark.parametrize("strip", [2**20, 2**12])
@pytest.mark.parametrize("codes", [64, 2**14])
def test_encoding_takes_no_more_memory_than_it_says(levels, strip, codes, tmp_path, monkeypatch):
    """With attention on large maps, and with a large codebook."""
    monkeypatch.setattr(strips, "STRIP", strip)
    changes = {"attention_levels": levels, "codebook_size": codes}
    module = random_tokenizer(replace(small(LLAMAGEN_VQ16).config, **changes))
    bound = module.working_nbytes(1, 96 * 64, CPU, encode=True)
    picture = torch.rand(1, 3, 96, 64)
    found = peak(lambda: module.encode(picture), tmp_path / "encode.json")
    assert found <= bound


@torch.inference_mode()
def test_saving_memory_is_counted(tmp_path, monkeypatch):
    """Of two pictures; small maps have nothing to save."""
    monkeypatch.setattr(strips, "STRIP", 2**12)
    monkeypatch.setattr(image_tokenizer, "SMALL", 2**10)
    module = small(LLAMAGEN_VQ16)
    codes = torch.randint(0, 64, (2, 4, 4))
    found, bounds = [], []
    for save in (False, True):
        found.append(peak(lambda: module.decode(codes, save), tmp_path / "decode.json"))  # noqa: B023
        bounds.append(module.working_nbytes(2, 64 * 64, CPU, save))
        assert found[-1] <= bounds[-1] <= 3 * found[-1]
    assert found[1] < found[0]
    assert bounds[1] < bounds[0]
    assert module.working_nbytes(1, 16, CPU) == module.working_nbytes(1, 16, CPU, True)


@cuda
@torch.inference_mode()
def test_large_pictures_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(strips, "GPU_STRIP", 2000)
    module = random_tokenizer(TINY.image_tokenizer)
    images = torch.rand(2, 3, 68, 36)
    latent = module.latent(images)
    pixels = module.pixels(F.normalize(latent, dim=1))
    module, images = module.cuda(), images.cuda()
    for room, hold in ((0, True), (10**9, True), (0, False)):
        plan = strips.Plan(room, False, hold)
        found = module.latent(images, plan)
        torch.testing.assert_close(found.cpu(), latent, rtol=1e-3, atol=1e-4)
        found = module.pixels(F.normalize(latent.cuda(), dim=1), plan)
        torch.testing.assert_close(found.cpu(), pixels, rtol=1e-3, atol=1e-4)


@cuda
@torch.inference_mode()
def test_a_picture_of_2048_pixels_on_cuda():
    module = ImageTokenizer(LLAMAGEN_VQ16).eval().cuda()
    codes = torch.randint(0, 16384, (1, 128, 128), device="cuda")
    module.decode(codes[:, :32, :32])  # workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    picture = module.decode(codes)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= module.working_nbytes(1, 2048**2, codes.device) <= 2**30
    module.decode_dtype = torch.float32
    assert (module.decode(codes) - picture).abs().max() < 8 / 255  # random weights amplify rounding
