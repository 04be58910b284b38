import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tokenshuffle_core.config import LLAMAGEN_VQ8, LLAMAGEN_VQ16, PRESETS
from tokenshuffle_core.image_tokenizer import ImageTokenizer, VectorQuantizer

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
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} cannot be encoded.*multiples of 4"):
        tokenizer.encode(torch.rand(1, 3, *size))


@pytest.mark.parametrize("code", [-1, 64])
def test_codes_of_another_codebook_are_refused(tokenizer, code):
    with pytest.raises(ValueError, match="from 0 to 63"):
        tokenizer.decode(torch.full((1, 2, 2), code))


@torch.inference_mode()
def test_tiles_without_overlap_are_decoded_apart(tokenizer):
    codes = torch.randint(0, 64, (1, 8, 16))
    expected = torch.cat([tokenizer.decode(part) for part in codes.split(8, dim=2)], dim=3)
    torch.testing.assert_close(tokenizer.decode(codes, tile=8, overlap=0), expected)
    assert torch.equal(tokenizer.decode(codes, tile=16), tokenizer.decode(codes))


@torch.inference_mode()
def test_overlapping_tiles_fade_linearly_into_each_other(tokenizer):
    codes = torch.randint(0, 64, (1, 8, 12))
    left, right = tokenizer.decode(codes[..., :8]), tokenizer.decode(codes[..., 4:])
    tiled = tokenizer.decode(codes, tile=8, overlap=4)
    torch.testing.assert_close(tiled[..., :16], left[..., :16])
    torch.testing.assert_close(tiled[..., 32:], right[..., 16:])
    ramp = torch.arange(1, 17) / 17
    expected = left[..., 16:] * ramp.flip(0) + right[..., :16] * ramp
    torch.testing.assert_close(tiled[..., 16:32], expected)


@torch.inference_mode()
def test_tiles_never_exceed_their_size(tokenizer):
    seen = []
    hook = tokenizer.decoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[-2:])
    )
    tokenizer.decode(torch.randint(0, 64, (1, 30, 17)), tile=16, overlap=4)
    hook.remove()
    assert len(seen) == 6
    assert max(max(shape) for shape in seen) == 16


def test_an_overlap_of_a_whole_tile_is_refused(tokenizer):
    with pytest.raises(ValueError, match="overlap 8 must be smaller than the tile of 8"):
        tokenizer.decode(torch.zeros(1, 20, 20, dtype=torch.int64), tile=8, overlap=8)
