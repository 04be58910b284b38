import dataclasses

import pytest
import torch

from tokenshuffle_core.config import PRESETS
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.sampler import pad_left

CONFIG = PRESETS["tiny"].model


def model_of(window: int) -> TokenShuffleModel:
    torch.manual_seed(window)
    model = TokenShuffleModel(dataclasses.replace(CONFIG, window=window))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def windows_of(codes, window):
    rows, columns = codes.shape[1:]
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            yield codes[:, top : top + window, left : left + window]


@torch.inference_mode()
@pytest.mark.parametrize("window", [1, 2, 4])
def test_decoding_step_by_step_gives_the_teacher_forced_logits(window):
    model = model_of(window)
    text, padding = pad_left([[1, 5, 6, 7, 2], [1, 2, 9]], 0, "cpu")
    codes = torch.randint(0, 64, (2, 8, 12))
    expected = model(text, padding, codes).codes
    windows = list(windows_of(codes, window))
    assert expected.shape == (2, len(windows), window**2, CONFIG.codebook_size)
    cache, logits = model.prefill(text, padding, len(windows) - 1)
    torch.testing.assert_close(logits, expected[:, 0], rtol=1e-4, atol=1e-5)
    for t, part in enumerate(windows[:-1], 1):
        logits = model.step(cache, part)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_targets_are_the_windows_in_raster_order(window):
    codes = torch.randint(0, 64, (2, 8, 12))
    expected = torch.stack([part.flatten(1) for part in windows_of(codes, window)], dim=1)
    assert torch.equal(model_of(window).targets(codes), expected)


@torch.inference_mode()
def test_a_window_sees_only_the_windows_before_it():
    model = model_of(2)
    text, padding = pad_left([[1, 5]], 0, "cpu")
    codes = torch.randint(0, 64, (1, 4, 4))
    changed = codes.clone()
    changed[:, 0, 2] = (changed[:, 0, 2] + 1) % 64  # a code of window 1
    before, after = model(text, padding, codes).codes, model(text, padding, changed).codes
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])


def test_code_logits_belong_to_their_place_in_the_window():
    """With a head of one feature, the gradient of one code's logit reaches one slice of d."""
    model = model_of(2)
    model.unshuffle.fuse = torch.nn.Identity()
    hidden = torch.randn(1, 1, CONFIG.width, requires_grad=True)
    model.code_logits(hidden)[0, 0, 2].sum().backward()
    quarter = CONFIG.width // 4
    touched = hidden.grad[0, 0].abs() > 0
    assert touched[2 * quarter : 3 * quarter].all()
    assert touched.sum() == quarter


def test_text_logits_are_tied_to_the_text_embedding():
    model = model_of(2)
    text, padding = pad_left([[1, 5, 2]], 0, "cpu")
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    logits = model(text, padding, codes, with_text=True)
    hidden = model.transformer(model.text_embedding(text))
    torch.testing.assert_close(logits.text, hidden @ model.text_embedding.weight.T)
    assert model(text, padding, codes).text is None


def test_the_papers_model_has_its_size():
    config = PRESETS["paper-2.7b"].model
    assert (config.width, config.layers, config.head_size) == (3072, 20, 128)
    with torch.device("meta"):
        model = TokenShuffleModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2.7e9 * 0.95 < count < 2.7e9 * 1.05
    d, hidden = config.width, config.hidden
    blocks = config.layers * (4 * d * d + 3 * d * hidden + 2 * d) + d
    embeddings = (config.text_vocabulary + 2 * config.codebook_size) * d
    fuse = 2 * (config.fuse_blocks * (4 * d * d + d) + d * d // 4)
    assert count == blocks + embeddings + fuse
