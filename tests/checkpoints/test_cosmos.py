"""The folded image tokenizer against the published layers in three dimensions."""

import pytest
import torch
from safetensors.torch import save_file

from tests.support.cosmos import Cosmos
from tests.support.published import randomise
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints import cosmos
from tokenshuffle_core.checkpoints.checkpoint import fill, skeleton
from tokenshuffle_core.checkpoints.source import Source


@pytest.fixture(scope="module")
def theirs():
    return randomise(Cosmos().double())


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("cosmos") / "tokenizer.safetensors"
    save_file(theirs.state_dict(), path)
    config, weights = cosmos.image_tokenizer(Source(path))
    return fill(skeleton(config), weights, "cosmos: ", "cpu", torch.float64)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(32, 48), (16, 16)])
def test_it_computes_what_the_published_layers_do(theirs, ours, height, width):
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, height, width, dtype=torch.float64)
    expected = theirs.latent(pictures * 2 - 1)
    found = ours.latent(pictures)
    assert found.shape == expected.shape == (2, 6, height // 16, width // 16)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    codes = ours.encode(pictures)
    vectors = ours.quantizer.vectors(codes)
    expected = (theirs.pixels(vectors.double()) + 1) / 2
    torch.testing.assert_close(ours.pixels(vectors.double()), expected, rtol=1e-10, atol=1e-10)


def test_converted_it_is_an_image_tokenizer_as_any_other(theirs, tmp_path):
    published, converted = tmp_path / "cosmos.safetensors", tmp_path / "ours.safetensors"
    save_file({name: x.bfloat16() for name, x in theirs.state_dict().items()}, published)
    checkpoints.convert(published, converted)
    pictures = torch.rand(1, 3, 32, 48)
    expected = checkpoints.load_image_tokenizer(published).encode(pictures)
    ours = checkpoints.load_image_tokenizer(converted)
    assert torch.equal(ours.encode(pictures), expected)
    assert ours.decode(expected).shape == pictures.shape


def test_another_number_of_levels_is_refused(theirs, tmp_path):
    weights = theirs.state_dict()
    weights["quant_conv.conv3d.weight"] = weights["quant_conv.conv3d.weight"][:4].clone()
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="codes of 4 numbers instead of 6"):
        checkpoints.load_image_tokenizer(tmp_path / "a.safetensors")


def test_at_its_true_size_it_is_a_quarter_smaller():
    with torch.device("meta"):
        theirs = Cosmos(128, 16)
    weights = theirs.state_dict()
    assert sum(x.numel() for x in weights.values()) == 112_472_182  # as published

    class Shapes(dict):
        path, shapes = "cosmos", {name: tuple(x.shape) for name, x in weights.items()}
        shape_of, count = Source.shape_of, Source.count

    config, ours = cosmos.image_tokenizer(Shapes(weights))
    count = sum(x.numel() for x in skeleton(config).state_dict().values())
    assert count - 6 * 64_000 == pytest.approx(82.3e6, rel=1e-3)
    assert config.stride == 16
    assert len(ours) > 100
