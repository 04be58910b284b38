from dataclasses import replace

import pytest
import torch

from tokenshuffle_core.adapt.grow import grow, kept_share
from tokenshuffle_core.config import Config
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.sampler import pad_left

TEXT, PADDING = pad_left([[1, 5, 2]], 0, "cpu")
CODES = torch.arange(64).view(1, 8, 8)


@pytest.fixture
def parent(pipeline) -> Pipeline:
    shape = replace(pipeline.config.model, windows=(1,))
    config = Config(pipeline.config.image_tokenizer, shape, pipeline.config.generation)
    torch.manual_seed(0)
    model = TokenShuffleModel(shape)
    model.initialise()
    return Pipeline(config, model.eval(), pipeline.image_tokenizer, pipeline.text_tokenizer, {})


@torch.inference_mode()
def test_the_old_window_computes_what_it_did(parent):
    grown = grow(parent, (2, 1, 4), window_head=8)
    assert grown.config.model.window == 2
    expected = parent.model(TEXT, PADDING, CODES).codes
    torch.testing.assert_close(grown.model(TEXT, PADDING, CODES, 1).codes, expected)
    again = grow(grown, (1, 2, 4))
    for window in (1, 2, 4):
        before, after = (one.model(TEXT, PADDING, CODES, window).codes for one in (grown, again))
        torch.testing.assert_close(before, after)


@torch.inference_mode()
@pytest.mark.parametrize("window", [2, 4])
def test_what_is_packed_comes_back_but_for_the_directions_left_out(parent, window):
    model = grow(parent, (window,)).model
    embeddings = model.code_embedding.weight
    x = embeddings[CODES]
    back = model.unshuffle[str(window)](model.shuffle[str(window)](x))
    kept = embeddings.shape[1] // window**2
    left, values, right = torch.linalg.svd(embeddings, full_matrices=False)
    best = (left[:, :kept] * values[:kept]) @ right[:kept]  # Eckart-Young
    torch.testing.assert_close(back, best[CODES], rtol=1e-4, atol=1e-6)
    share = 1 - (embeddings - best).square().sum() / embeddings.square().sum()
    assert kept_share(parent, window) == pytest.approx(share.item(), rel=1e-4)


@torch.inference_mode()
def test_embeddings_of_low_rank_come_back_whole(parent):
    weight = parent.model.code_embedding.weight
    parent.model.code_embedding.weight.copy_(torch.randn(64, 8) @ torch.randn(8, weight.shape[1]))
    model = grow(parent, (2,)).model
    x = model.code_embedding(CODES)
    torch.testing.assert_close(model.unshuffle["2"](model.shuffle["2"](x)), x, rtol=1e-3, atol=1e-4)
    assert kept_share(parent, 2) == pytest.approx(1, abs=1e-5)


def test_window_that_the_width_does_not_allow(parent):
    with pytest.raises(ValueError, match="multiple of window squared"):
        grow(parent, (3,))
