import dataclasses

import pytest
import torch

from tests.support.models import CONFIG, model_of
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.sampler import pad_left
from tokenshuffle_core.transformer import KVCache


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
    cache = KVCache(model.config, padding, 5 + len(windows), torch.float32)
    states = model.prefill(cache, text)
    for t, part in enumerate(windows):
        logits = model.code_logits(states[:, 0])
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-5)
        states = model.step(cache, part[:, None]) if t + 1 < len(windows) else None


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
    model.unshuffle["2"].fuse = torch.nn.Identity()
    hidden = torch.randn(1, 1, CONFIG.dim, requires_grad=True)
    model.code_logits(model.code_states(hidden))[0, 0, 2].sum().backward()
    quarter = CONFIG.dim // 4
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
    assert (config.dim, config.layers, config.head_size) == (3072, 20, 128)
    with torch.device("meta"):
        model = TokenShuffleModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2.7e9 * 0.95 < count < 2.7e9 * 1.05
    d, hidden = config.dim, config.hidden
    blocks = config.layers * (4 * d * d + 3 * d * hidden + 2 * d) + d
    embeddings = (config.text_vocabulary + 2 * config.codebook_size) * d
    fuse = 2 * (config.fuse_blocks * (4 * d * d + d) + d * d // 4)
    assert count == blocks + embeddings + fuse


@torch.inference_mode()
@pytest.mark.parametrize("window", [1, 2, 4])
def test_elastic_model_is_the_model_of_each_of_its_windows(window):
    """All that an elastic model adds is the embedding that tells the window."""
    elastic = TokenShuffleModel(dataclasses.replace(CONFIG, windows=(2, 1, 4), window_head=8))
    elastic.load_state_dict(
        {name: torch.randn_like(weight) * 0.15 for name, weight in elastic.state_dict().items()}
    )
    plain = TokenShuffleModel(dataclasses.replace(CONFIG, windows=(window,), window_head=8))
    weights = elastic.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    codes = torch.randint(0, 64, (1, 8, 8))
    text, padding = pad_left([[1, 5, 2]], 0, "cpu")
    told = elastic(text, padding, codes, window).codes
    assert told.shape == (1, 64 // window**2, window**2, 64)
    elastic.window_embedding.weight.zero_()
    assert not torch.allclose(told, elastic(text, padding, codes, window).codes)
    expected = plain(text, padding, codes).codes
    torch.testing.assert_close(elastic(text, padding, codes, window).codes, expected)


@torch.inference_mode()
@pytest.mark.parametrize("window", [2, 4])
def test_window_head_sees_the_codes_before_each_and_no_others(window):
    model = model_of(window, window_head=16)
    text, padding = pad_left([[1, 5, 2]], 0, "cpu")
    codes = torch.randint(0, 64, (1, 2 * window, 2 * window))
    logits = model(text, padding, codes).codes
    for slot in range(window**2):
        targets = codes.clone()
        row, column = divmod(slot, window)
        targets[:, row, column] = (targets[:, row, column] + 1) % 64
        changed = (model(text, padding, codes, targets=targets).codes != logits).any(-1)[0]
        assert changed[0].tolist() == [other > slot for other in range(window**2)]
        assert not changed[1:].any(), "another window hears of it through the transformer alone"


@torch.inference_mode()
def test_window_head_one_code_after_another_gives_the_teacher_forced_logits():
    model = model_of(4, window_head=16)
    states = torch.randn(3, 16, CONFIG.dim)
    chosen = torch.randint(0, 64, (3, 16))
    expected = model.code_logits(states, None, chosen)
    for slot in range(16):
        unknown = torch.where(torch.arange(16) < slot, chosen, 0)
        logits = model.head(model.head_states(states[:, slot : slot + 1], None, unknown, slot))
        torch.testing.assert_close(logits[:, 0], expected[:, slot])


def test_window_head_is_the_formula():
    model = model_of(2, window_head=16)
    head = model.window_head["2"]
    states, chosen = torch.randn(1, 4, CONFIG.dim), torch.randint(0, 64, (1, 4))
    result = head(states, chosen)
    for i in range(4):
        hidden = head.input(head.norm(states[0, i]))
        for j in range(i):
            hidden = hidden + head.relations[i, j] * head.code_embedding(chosen[0, j])
        expected = states[0, i] + head.output(torch.nn.functional.gelu(hidden))
        torch.testing.assert_close(result[0, i], expected)
