import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tokenshuffle_core.engine import strips
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.presets import LLAMAGEN_VQ8, LLAMAGEN_VQ16, PRESETS
from tokenshuffle_core.quantizers import VectorQuantizer

TINY = PRESETS["tiny"].image_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(TINY).eval()


@torch.inference_mode()
@pytest.mark.parametrize("stride", [8, 16])
def test_a_code_stands_for_a_stride_of_pixels(stride):
    multipliers = (1,) * stride.bit_length()
    module = ImageTokenizer(dataclasses.replace(TINY, channel_multipliers=multipliers))
    assert module.config.stride == stride
    images = torch.rand(2, 3, 2 * stride, 3 * stride)
    codes = module.encode(images)
    assert codes.shape == (2, 2, 3)
    assert codes.dtype == torch.int64
    assert module.decode(codes).shape == images.shape


@pytest.mark.parametrize(("config", "stride"), [(LLAMAGEN_VQ16, 16), (LLAMAGEN_VQ8, 8)])
def test_the_preset_has_llamagens_size(config, stride):
    with torch.device("meta"):
        module = ImageTokenizer(config)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert 68e6 < count < 73e6  # the paper's table: 72 M and 70 M
    assert config.stride == stride


def test_the_nearest_code_has_the_smallest_distance_on_the_sphere():
    quantizer = VectorQuantizer(32, 4)
    latent = 5 * torch.randn(2, 4, 3, 3)
    book = F.normalize(quantizer.codebook.weight, dim=-1)
    points = F.normalize(latent, dim=1).movedim(1, -1)
    expected = torch.cdist(points.flatten(0, 2), book).argmin(-1).view(2, 3, 3)
    assert torch.equal(quantizer.nearest(latent), expected)
    assert torch.equal(quantizer.nearest(latent * 100), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(latent), expected)


def test_the_gradient_goes_straight_through_the_quantiser():
    quantizer = VectorQuantizer(32, 4)
    latent = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantized = quantizer(latent)
    torch.testing.assert_close(quantized.vectors, quantizer.vectors(quantized.codes))
    weight = torch.randn_like(quantized.vectors)
    (gradient,) = torch.autograd.grad((quantized.vectors * weight).sum(), latent)
    (expected,) = torch.autograd.grad((F.normalize(latent, dim=1) * weight).sum(), latent)
    torch.testing.assert_close(gradient, expected)


def test_the_quantisers_loss_is_the_formula():
    quantizer = VectorQuantizer(32, 4)
    latent = torch.randn(1, 4, 2, 2)
    quantized = quantizer(latent)
    error = F.normalize(latent, dim=1) - quantizer.vectors(quantized.codes)
    torch.testing.assert_close(quantized.loss, 1.25 * error.square().mean())


@pytest.mark.parametrize("size", [(6, 8), (8, 1), (1, 1)])
def test_sizes_that_are_no_multiple_of_the_stride_are_refused(tokenizer, size):
    with pytest.raises(ValueError, match=r"does not fit: .* multiples of 4"):
        tokenizer.encode(torch.rand(1, 3, *size))


@pytest.mark.parametrize("code", [-1, 64])
def test_codes_of_another_codebook_are_refused(tokenizer, code):
    with pytest.raises(ValueError, match="from 0 to 63"):
        tokenizer.decode(torch.full((1, 2, 2), code))


@torch.inference_mode()
@pytest.mark.parametrize("strip", [1, 2000])
@pytest.mark.parametrize("size", [(8, 8), (36, 20), (20, 68)])
@pytest.mark.parametrize("room", [0, 10**9])
def test_strips_are_the_whole_picture(tokenizer, strip, size, room, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", strip)
    tokenizer = copy.deepcopy(tokenizer)  # with norms that do something
    for parameter in tokenizer.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    images, plan = torch.rand(2, 3, *size), strips.Plan(room, bf16=False)
    whole = tokenizer.latent(images)
    torch.testing.assert_close(tokenizer.latent(images, plan), whole, rtol=1e-4, atol=1e-5)
    vectors = F.normalize(whole, dim=1)
    pixels = tokenizer.pixels(vectors)
    torch.testing.assert_close(tokenizer.pixels(vectors, plan), pixels, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("levels", [(), (0, 1), (2,)])
@pytest.mark.parametrize("room", [0, 10**9])
@pytest.mark.parametrize("hold", [True, False])
def test_strips_with_attention_at_other_levels(levels, room, hold, monkeypatch):
    config = dataclasses.replace(TINY, attention_levels=levels)
    module, whole = ImageTokenizer(config).eval(), torch.rand(2, 3, 36, 20)
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    latent, pixels = module.latent(whole), module.pixels(F.normalize(module.latent(whole), dim=1))
    monkeypatch.setattr(strips, "STRIP", 200)  # so that attention comes in pieces as well
    plan = strips.Plan(room, bf16=False, hold=hold)
    torch.testing.assert_close(module.latent(whole, plan), latent, rtol=1e-4, atol=1e-5)
    found = module.pixels(F.normalize(latent, dim=1), plan)
    torch.testing.assert_close(found, pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [(3,), (-1,), (True,), (0.0,)])
def test_attention_at_levels_that_are_not_there(levels):
    with pytest.raises(ValueError, match="each of attention_levels must be a whole number"):
        dataclasses.replace(TINY, attention_levels=levels)


@torch.inference_mode()
def test_statistics_of_strips_join_to_those_of_the_map():
    """A map whose mean is ten times its deviation, and drifts."""
    norm = torch.nn.GroupNorm(4, 8, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 10 + torch.randn(2, 8, 40, 24) + torch.linspace(0, 3, 40)[:, None]
    normalised = strips.Normalised(norm)
    for part in x.split(7, dim=2):
        normalised.add(part)
    expected = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6))
    torch.testing.assert_close(normalised(x), expected.float(), rtol=2e-3, atol=2e-3)
