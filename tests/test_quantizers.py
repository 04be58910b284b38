"""The quantisers against their formulas."""

import math
from dataclasses import replace

import pytest
import torch

from tests.support.models import TINY
from tokenshuffle_core import quantizers
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.quantizers import ScalarQuantizer, VectorQuantizer, quantizer_of

LEVELS = (8, 8, 8, 5, 5, 5)  # of Cosmos' tokenizers with 64,000 codes


def digits_of(code: int, levels: tuple[int, ...]) -> list[int]:
    digits = []
    for n in levels:
        code, digit = divmod(code, n)
        digits.append(digit)
    return digits


@pytest.mark.parametrize("levels", [LEVELS, (3, 2), (7,)])
def test_a_scalar_quantisers_codes_count_through_its_levels(levels):
    quantizer = ScalarQuantizer(levels)
    every = torch.arange(math.prod(levels))
    vectors = quantizer.vectors(every[None, None])
    assert torch.equal(quantizer.nearest(vectors)[0, 0], every)
    for code in every[:: max(1, len(every) // 50)].tolist():
        expected = [
            (d - n // 2) / (n // 2) for d, n in zip(digits_of(code, levels), levels, strict=True)
        ]
        torch.testing.assert_close(vectors[0, :, 0, code], torch.tensor(expected))


def test_a_scalar_quantiser_rounds_what_it_has_bounded():
    torch.manual_seed(0)
    quantizer, latent = ScalarQuantizer(LEVELS), 3 * torch.randn(2, 6, 5, 7)
    codes = quantizer.nearest(quantizer.project(latent))
    for place in ((0, 0, 0), (1, 4, 6), (0, 2, 3), (1, 1, 1)):
        digits = []
        for z, n in zip(latent[place[0], :, place[1], place[2]].tolist(), LEVELS, strict=True):
            half = (n - 1) * (1 + 1e-3) / 2
            offset = 0.0 if n % 2 else 0.5
            digits.append(round(math.tanh(z + math.atanh(offset / half)) * half - offset) + n // 2)
        assert digits_of(int(codes[place]), LEVELS) == digits
    ends = quantizer.nearest(quantizer.project(torch.full((1, 6, 1, 2), 1e4)))
    assert ends.unique().tolist() == [math.prod(LEVELS) - 1]


def test_the_gradient_goes_through_the_bound():
    quantizer, latent = ScalarQuantizer((5, 4)), torch.randn(1, 2, 3, 3, requires_grad=True)
    quantized = quantizer(latent)
    torch.testing.assert_close(quantized.vectors, quantizer.vectors(quantized.codes))
    assert quantized.loss == 0
    (found,) = torch.autograd.grad(quantized.vectors.sum(), latent)
    (expected,) = torch.autograd.grad(quantizer.project(latent).sum(), latent)
    torch.testing.assert_close(found, expected)


def test_vectors_as_they_are():
    """The largest dot product, which a long vector wins more often."""
    quantizer = VectorQuantizer(32, 4, normalised=False)
    latent = torch.randn(2, 4, 3, 3)
    book = quantizer.codebook.weight
    codes = quantizer.nearest(latent)
    expected = torch.einsum("bdhw,cd->bhwc", latent, book).argmax(-1)
    assert torch.equal(codes, expected)
    assert torch.equal(quantizer.vectors(codes), book[codes].movedim(-1, 1))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("products", [1, 100, 32 * 7])
def test_a_large_codebook_in_parts(products, normalised, monkeypatch):
    """Of single points, of several with a rest, and of more than a row."""
    quantizer, latent = VectorQuantizer(32, 4, normalised), torch.randn(2, 4, 3, 5)
    expected = quantizer.nearest(latent)
    monkeypatch.setattr(quantizers, "PRODUCTS", products)
    assert torch.equal(quantizer.nearest(latent), expected)
    assert quantizer.nearest(latent[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize(
    "changes",
    [{"quantizer": "dot"}, {"quantizer": "fsq", "levels": (4, 4, 2), "codebook_size": 32}],
)
def test_an_image_tokenizer_with_another_quantiser(changes):
    torch.manual_seed(0)
    config = replace(TINY.image_tokenizer, codebook_dim=3, **changes)
    module = ImageTokenizer(config).eval()
    pictures = torch.rand(2, 3, 4 * config.stride, 2 * config.stride)
    with torch.inference_mode():
        codes = module.encode(pictures)
        assert codes.shape == (2, 4, 2)
        assert codes.max() < config.codebook_size
        decoded = module.decode(codes)
        expected = module.pixels(module(pictures)[1].vectors).clamp(0, 1)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
    assert type(quantizer_of(config)) is type(module.quantizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "none"}, "quantizer must be one of normalised, dot, fsq"),
        ({"levels": (8, 8)}, "levels are those of the quantizer fsq"),
        ({"quantizer": "fsq"}, "levels .* whose product is codebook_size"),
        ({"quantizer": "fsq", "levels": (True, 8)}, "each of levels must be a whole number"),
    ],
)
def test_shapes_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY.image_tokenizer, **changes)
