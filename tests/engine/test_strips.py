"""Strips against whole maps, with what CUDA refuses and what memory they take."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.support.models import TINY
from tokenshuffle_core import image_tokenizer
from tokenshuffle_core.config import LLAMAGEN_VQ8, LLAMAGEN_VQ16
from tokenshuffle_core.engine import strips
from tokenshuffle_core.image_tokenizer import ImageTokenizer

CPU = torch.device("cpu")
PLAN = strips.Plan(10**9, bf16=False)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


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
    x = torch.randn(2, 8, 14, 10).contiguous(memory_format=torch.channels_last)
    block = shortcut(x) + conv2(F.silu(norm2(conv1(F.silu(norm1(x))))))
    for found, expected in (
        (strips.residual(norm1, conv1, norm2, conv2, shortcut, x, PLAN), block),
        (strips.upsample(conv1, x, PLAN), conv1(F.interpolate(x, scale_factor=2.0))),
        (strips.downsample(down, x, PLAN), down(F.pad(x, (0, 1, 0, 1)))),
        (strips.output(norm1, conv1, x), conv1(F.silu(norm1(x)))),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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
    for room in (0, 10**9):
        plan = strips.Plan(room, False)
        found = module.latent(images, plan)
        torch.testing.assert_close(found.cpu(), latent, rtol=1e-3, atol=1e-4)
        found = module.pixels(F.normalize(latent.cuda(), dim=1), plan)
        torch.testing.assert_close(found.cpu(), pixels, rtol=1e-3, atol=1e-4)
