import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from tokenshuffle_core.shuffle import TokenShuffle, TokenUnshuffle, shuffle, unshuffle


@pytest.mark.parametrize("window", [1, 2, 4])
def test_rearrangement_is_pixel_unshuffle_up_to_channel_order(window):
    x = torch.randn(2, 8, 12, 5)
    expected = F.pixel_unshuffle(x.movedim(-1, 1), window)
    expected = rearrange(expected, "b (c w) i j -> b i j (w c)", c=5)
    assert torch.equal(shuffle(x, window), expected)
    assert torch.equal(unshuffle(shuffle(x, window), window), x)


def test_window_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="window of 3 does not divide a grid of 8x6"):
        shuffle(torch.zeros(1, 6, 8, 4), 3)


@pytest.mark.parametrize("module", [TokenShuffle, TokenUnshuffle])
def test_window_1_is_the_plain_model(module):
    x = torch.randn(2, 4, 4, 16)
    layer = module(16, 1, 2)
    assert torch.equal(layer(x), x)
    assert not list(layer.parameters())


def test_compress_is_shared_by_all_codes_of_a_window():
    layer = TokenShuffle(16, 2, blocks=0)
    x = torch.randn(1, 2, 2, 16)
    fused = layer(x)
    assert fused.shape == (1, 1, 1, 16)
    each = [x[0, i, j] @ layer.compress.weight.T for i in (0, 1) for j in (0, 1)]
    torch.testing.assert_close(fused.flatten(), torch.cat(each))


def test_shuffle_and_unshuffle_have_the_papers_shapes():
    x = torch.randn(2, 8, 4, 32)
    fused = TokenShuffle(32, 2, 2)(x)
    assert fused.shape == (2, 4, 2, 32)
    assert TokenUnshuffle(32, 2, 2)(fused).shape == x.shape


def test_fuse_block_is_a_residual_mlp():
    layer = TokenShuffle(8, 2, 1).fuse[0]
    x = torch.randn(3, 8)
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.norm.weight
    expected = x + F.gelu(normed @ layer.up.weight.T) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)
