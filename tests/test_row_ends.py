"""A token after each row of windows but the last: part of the sequence, but not of the steps."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.graphs import emulated
from tests.support.models import CONFIG, random_checkpoint
from tokenshuffle_core import engine
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.guidance import guide
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.sampler import pad_left, sample

END = 7
SETTINGS = GenerationConfig(cfg=3.0, schedule="constant", temperature=0)
TEXTS = [[1, 5, 9], [1, 9]]


def model_with(*windows: int, **changes) -> TokenShuffleModel:
    torch.manual_seed(0)
    config = replace(CONFIG, windows=windows, row_end=END, **changes)
    model = TokenShuffleModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_with(1, 2)


def drawn(model, grid, settings=SETTINGS, seeds=(1,), given=None, **more) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = [[ids] * len(seeds) for ids in TEXTS]
    *_, last = sample(model, *texts, grid, settings, generators, 0, given, **more)
    return last.codes


@torch.inference_mode()
def test_the_sequence_is_that_of_a_llama_that_reads_the_ends_as_text():
    model = model_with(1)
    shape = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.text_vocabulary,
            hidden_size=shape.dim,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=shape.norm_eps,
            rope_theta=shape.rope_theta,
        )
    ).eval()
    weights = {
        f"layers.{name.removeprefix('blocks.')}" if name.startswith("blocks.") else name: x
        for name, x in model.transformer.state_dict().items()
    }
    for ours, name in {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        ".attention.": ".self_attn.",
    }.items():  # fmt: skip
        weights = {key.replace(ours, name): x for key, x in weights.items()}
    weights["embed_tokens.weight"] = model.text_embedding.weight
    theirs.model.load_state_dict(weights)
    codes = torch.randint(0, 64, (1, 3, 4))
    text, end = torch.tensor([TEXTS[0]]), torch.tensor([[END]])
    parts = [theirs.model.embed_tokens(text)]
    for row in range(3):
        parts.append(model.code_embedding(codes[:, row]))
        parts.append(theirs.model.embed_tokens(end))
    hidden = theirs.model(inputs_embeds=torch.cat(parts[:-1], 1)).last_hidden_state
    before = [2 + row * 5 + column for row in range(3) for column in range(4)]
    expected = model.head(hidden[:, before])
    found = model(text, torch.zeros(1, dtype=torch.int64), codes).codes[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("grid", [(3, 4), (1, 3), (3, 1)])
def test_decoding_equals_a_loop_over_full_forward_passes(model, window, grid):
    rows, columns = grid
    expected = torch.zeros(1, rows * window, columns * window, dtype=torch.int64)
    with torch.inference_mode():
        for t in range(rows * columns):
            branches = [
                model(*pad_left([ids], 0, "cpu"), expected, window).codes[0, t] for ids in TEXTS
            ]
            top, left = t // columns * window, t % columns * window
            part = guide(*branches, torch.tensor(3.0)).argmax(-1).view(window, window)
            expected[0, top : top + window, left : left + window] = part
    found = drawn(model, grid, replace(SETTINGS, window=window), engine=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("columns", [1, 3, 8])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kept", [None, (2, 0), (3, 1)])
def test_no_engine_and_no_number_of_windows_ahead_changes_a_picture(
    model, monkeypatch, columns, window, kept
):
    grid, settings = (5, columns), replace(SETTINGS, temperature=0.4, window=window)
    given = None
    if kept:
        given = torch.full((3, 5, columns), -1)
        given[:, : kept[0]] = 5
        given[:, :, : kept[1]] = 6
        given = given.repeat_interleave(window, 1).repeat_interleave(window, 2)
    seeds = 1, 2, 3
    expected = drawn(model, grid, settings, seeds, given, engine=False)
    if kept:
        assert torch.equal(expected[given >= 0], given[given >= 0])
    for ahead in (2, 7, 50):
        assert torch.equal(
            drawn(model, grid, settings, seeds, given, ahead=ahead, engine=False), expected
        )
    assert torch.equal(drawn(model, grid, settings, seeds, given), expected)
    for ahead in (1, 2, 7):
        with emulated(monkeypatch) as made:
            again = [drawn(model, grid, settings, seeds, given, ahead=ahead) for _ in range(2)]
        assert made
        assert torch.equal(again[0], expected)
        assert torch.equal(again[1], expected)
    engine.release(model)


def test_row_ends_cost_no_step(model, monkeypatch):
    steps = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda *a, **k: steps.append(a[1].shape[1]) or step(*a, **k))
    drawn(model, (4, 6), ahead=1, engine=False)
    assert len(steps) == 4 * 6 - 1
    assert sum(steps) == 4 * 6 - 1 + 3  # each end is appended once, together with a window


def test_it_is_trained_as_it_is_decoded(model):
    """Logits of windows after rows depend on the row's end."""
    text, padding = pad_left([TEXTS[0]], 0, "cpu")
    codes = torch.randint(0, 64, (1, 4, 4))
    with torch.no_grad():
        before = model(text, padding, codes, 2).codes
        model.text_embedding.weight[END] += 1
        after = model(text, padding, codes, 2).codes
        model.text_embedding.weight[END] -= 1
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2:] - before[:, 2:]).abs().max() > 1e-3


def test_a_row_end_needs_a_token_and_a_place():
    with pytest.raises(ValueError, match="row_end must be a whole number from 0 to 511"):
        replace(CONFIG, row_end=512)
    with pytest.raises(ValueError, match="row_end needs rope_axes 1"):
        replace(CONFIG, row_end=1, rope_axes=2)
    pipeline = random_checkpoint()
    shape = replace(CONFIG, windows=(1,), row_end=3, context=4 + 64 + 24, max_prompt=64)
    pipeline.config = replace(pipeline.config, model=shape)
    fits = replace(pipeline.config.generation, width=16, height=20, any_size=True)
    assert pipeline.grid(fits) == (5, 4)  # 20 windows and 4 row ends
    with pytest.raises(ValueError, match="16x24 takes 29 positions"):
        pipeline.grid(replace(fits, height=24))
