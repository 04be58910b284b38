import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tests.support.graphs import emulated
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine import release
from tokenshuffle_core.guidance import guide, scale_at
from tokenshuffle_core.noise import AT_ONCE, GumbelNoise, draw_gumbel
from tokenshuffle_core.pipeline import Pipeline, seeds_from
from tokenshuffle_core.sampler import filter_logits, pad_left, sample, sample_codes

SETTINGS = GenerationConfig(width=32, height=16, cfg=3.0, top_k=20, top_p=0.95)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(pipeline, settings, *, seed=0, count=1, prompt="a red apple", negative="", **more):
    prompts = [pipeline.encode_prompt(prompt)] * count
    seeds = seeds_from(seed, count)
    *_, last = pipeline.sample(prompts, pipeline.encode_prompt(negative), settings, seeds, **more)
    return last.codes


@pytest.mark.parametrize("k", [1, 5, 63, 64])
def test_top_k_is_that_of_transformers(k):
    logits = torch.randn(6, 64)
    expected = TopKLogitsWarper(k)(None, logits)
    assert torch.equal(filter_logits(logits, k, 1.0), expected)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p):
    logits = 3 * torch.randn(6, 64)
    expected = TopPLogitsWarper(p)(None, logits)
    assert torch.equal(filter_logits(logits, 0, p), expected)


def test_filters_together_are_applied_in_turn():
    logits = 3 * torch.randn(2, 4, 64)
    flat = logits.flatten(0, 1)
    expected = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(10)(None, flat))
    assert torch.equal(filter_logits(logits, 10, 0.8).flatten(0, 1), expected)


def test_samples_follow_the_softmax():
    logits = torch.randn(8)
    settings = replace(SETTINGS, temperature=0.7, top_k=0, top_p=1.0)
    draws = 20_000
    noise = draw_gumbel((draws, 8), generators(0))
    codes, _ = sample_codes(logits.expand(1, draws, 8), settings, noise)
    expected = (logits / 0.7).softmax(-1) * draws
    chi_square = ((codes[0].bincount(minlength=8) - expected).square() / expected).sum()
    assert chi_square < 24.3  # the 0.1 % point for seven degrees of freedom


def test_noise_that_is_drawn_at_once_is_that_of_one_window_after_another():
    alone, together = generators(0, 1), generators(0, 1)
    windows = [draw_gumbel((4, 8), alone) for _ in range(6)]
    assert torch.equal(draw_gumbel((6, 4, 8), together), torch.stack(windows, 1))


def test_noise_is_kept_for_as_long_as_it_is_needed(monkeypatch):
    monkeypatch.setitem(AT_ONCE, "cpu", 3 * 4 * 8)  # three windows
    noise = GumbelNoise(2, (4, 8), 5, torch.device("cpu"))
    noise.start(generators(0, 1))
    expected = draw_gumbel((40, 4, 8), generators(0, 1))
    for first in range(0, 30, 2):
        noise.draw(first + 5)
        index = torch.arange(first, first + 5)
        assert torch.equal(noise.at(index), expected[:, index])


def test_temperature_0_is_greedy():
    logits = torch.randn(2, 4, 64)
    codes, chosen = sample_codes(logits, replace(SETTINGS, temperature=0), None)
    assert torch.equal(codes, logits.argmax(-1))
    assert torch.equal(chosen, logits.amax(-1, keepdim=True))


FILTERS = [
    replace(SETTINGS, temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in [(0, 0, 1), (1, 0, 1), (0.7, 5, 1), (1, 0, 0.5), (2, 5, 0.9)]
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_a_logit_that_is_not_finite_is_chosen(settings):
    noise = draw_gumbel((4, 16), generators(0))
    _, chosen = sample_codes(torch.randn(1, 4, 16), settings, noise)
    assert chosen.isfinite().all()
    for value in (torch.nan, torch.inf):
        for place in (0, 7, 15):
            logits = torch.randn(1, 4, 16)
            logits[0, 1, place] = value
            _, chosen = sample_codes(logits, settings, noise)
            assert chosen.isfinite().flatten().tolist() == [True, False, True, True]


def test_a_temperature_next_to_0_is_greedy():
    logits = torch.randn(2, 4, 64)
    noise = draw_gumbel((4, 64), generators(0, 1))
    codes, _ = sample_codes(logits, replace(SETTINGS, temperature=1e-300), noise)
    assert torch.equal(codes, logits.argmax(-1))


def broken(pipeline, part: str) -> Pipeline:
    """With nan in the head, whose first logits are not finite, or in the embedding of all codes,
    which only the second window sees."""
    model = copy.deepcopy(pipeline.model)
    release(model)
    model.get_submodule(part).weight.data[3 if part == "head" else ...] = torch.nan
    return replace(pipeline, model=model)


@pytest.mark.parametrize("settings", [SETTINGS, *FILTERS[:2]], ids=str)
@pytest.mark.parametrize("part", ["head", "code_embedding"])
@pytest.mark.parametrize("kind", ["plain", "engine", "graphs"])
def test_logits_that_are_not_finite_are_refused(pipeline, monkeypatch, kind, part, settings):
    bad, ids = broken(pipeline, part), pipeline.encode_prompt("a")
    with emulated(monkeypatch) if kind == "graphs" else nullcontext():
        steps, seen = bad.sample([ids], [], settings, [0], engine=kind != "plain"), []
        with pytest.raises(ValueError, match="logits are not finite"):
            seen.extend(step.position for step in steps)
        assert len(seen) == (part == "code_embedding")  # the window before
        bad.model.load_state_dict(pipeline.model.state_dict())
        release(bad.model)
        *_, last = bad.sample([ids], [], settings, [0], engine=kind != "plain")
    assert torch.equal(last.codes, run(pipeline, settings, prompt="a"))


def test_pad_left():
    ids, padding = pad_left([[1, 2, 3], [4]], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert padding.tolist() == [0, 2]


def test_picture_i_of_a_batch_is_the_picture_of_seed_plus_i(pipeline):
    batch = run(pipeline, SETTINGS, seed=5, count=3)
    for i in range(3):
        assert torch.equal(batch[i], run(pipeline, SETTINGS, seed=5 + i)[0])
    assert not torch.equal(batch[0], batch[1])


def test_prompts_of_different_lengths_share_a_batch(pipeline):
    prompts = [pipeline.encode_prompt(text) for text in ("a", "a red apple on a table")]
    *_, last = pipeline.sample(prompts, [], SETTINGS, [3, 4])
    for i, prompt in enumerate(prompts):
        *_, alone = pipeline.sample([prompt], [], SETTINGS, [3 + i])
        assert torch.equal(last.codes[i], alone.codes[0])


@pytest.mark.parametrize(("rows", "columns"), [(2, 0), (4, 0), (0, 2), (2, 4), (0, 8)])
def test_its_own_given_codes_continue_to_the_same_picture(pipeline, rows, columns):
    whole = run(pipeline, SETTINGS, seed=1, count=2)
    given = torch.full_like(whole, -1)
    given[:, :rows] = whole[:, :rows]
    given[:, :, :columns] = whole[:, :, :columns]
    again = run(pipeline, SETTINGS, seed=1, count=2, given=given)
    assert torch.equal(whole, again)


def test_given_codes_are_kept_and_change_what_follows(pipeline):
    whole = run(pipeline, SETTINGS, seed=1)
    given = torch.full_like(whole, -1)
    given[:, :, 2:4] = (whole[:, :, 2:4] + 1) % pipeline.config.model.codebook_size
    again = run(pipeline, SETTINGS, seed=1, given=given)
    assert torch.equal(again[:, :, 2:4], given[:, :, 2:4])
    assert torch.equal(again[:, :2, :2], whole[:, :2, :2])  # drawn before the first given window
    assert not torch.equal(again[:, :, 4:], whole[:, :, 4:])


def test_every_window_is_yielded_once_in_raster_order(pipeline):
    ids = pipeline.encode_prompt("a red apple")
    steps = [
        (step.position, step.codes.clone()) for step in pipeline.sample([ids], [], SETTINGS, [0])
    ]
    final = steps[-1][1]
    assert [position for position, _ in steps] == list(range(1, 9))  # 2 x 4 windows
    for position, codes in steps:
        finished = torch.zeros(2, 4, dtype=torch.bool)
        finished.view(-1)[:position] = True
        finished = finished.repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(codes[0], final[0] * finished)


def test_guided_greedy_decoding_equals_a_loop_over_full_forward_passes(pipeline):
    """No cache, no batching of the two branches: the formula itself, with a negative prompt."""
    settings = replace(SETTINGS, temperature=0, cfg=4.0)
    codes = run(pipeline, settings, negative="a dog")
    model, tokenizer = pipeline.model, pipeline.text_tokenizer
    framed = [tokenizer.frame(tokenizer.encode(text), 2, 4) for text in ("a red apple", "a dog")]
    expected = torch.zeros(1, 4, 8, dtype=torch.int64)
    with torch.inference_mode():
        for t in range(8):
            branches = [
                model(*pad_left([ids], tokenizer.pad, "cpu"), expected).codes[:, t]
                for ids in framed
            ]
            logits = guide(*branches, scale_at("half-linear", 4.0, t, 8))
            row, column = divmod(t, 4)
            expected[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = logits.argmax(
                -1
            ).reshape(2, 2)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_codes_one_after_another_equal_a_loop_over_full_forward_passes(elastic, window):
    settings = replace(SETTINGS, temperature=0, cfg=3.0, window=window)
    codes = run(elastic, settings)
    model, tokenizer = elastic.model, elastic.text_tokenizer
    rows, columns = 4 // window, 8 // window
    framed = [
        tokenizer.frame(tokenizer.encode(text), rows, columns) for text in ("a red apple", "")
    ]
    expected = torch.zeros(1, 4, 8, dtype=torch.int64)
    with torch.inference_mode():
        for t in range(rows * columns):
            scale = scale_at("half-linear", 3.0, t, rows * columns)
            top, left = t // columns * window, t % columns * window
            for slot in range(window**2):
                branches = [
                    model(*pad_left([ids], tokenizer.pad, "cpu"), expected, window).codes[
                        0, t, slot
                    ]
                    for ids in framed
                ]
                place = 0, top + slot // window, left + slot % window
                expected[place] = guide(*branches, scale).argmax()
    assert torch.equal(codes, expected)


def test_window_that_the_model_lacks(elastic, pipeline):
    for model, known in ((elastic, "2, 1, 4"), (pipeline, "2")):
        with pytest.raises(ValueError, match=f"window 3 is not one of this model's: {known}$"):
            run(model, replace(SETTINGS, window=3))


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, 1), (2.0, 2)])
def test_guidance_off_costs_one_row(pipeline, cfg, rows):
    release(pipeline.model)
    seen = set()
    hook = pipeline.model.transformer.register_forward_pre_hook(
        lambda module, inputs: seen.add(inputs[0].shape[0])
    )
    run(pipeline, replace(SETTINGS, cfg=cfg), engine=False)
    hook.remove()
    assert seen == {rows}


@pytest.mark.parametrize("ahead", [2, 3, 8, 100])
@pytest.mark.parametrize("kept", [(0, 0), (2, 4)])
def test_windows_ahead_change_no_picture(pipeline, ahead, kept):
    """Each picture of a batch, with codes to keep as well, and each window is yielded once."""
    settings = replace(SETTINGS, width=64, height=64, temperature=0.3)
    ids = [pipeline.encode_prompt(text) for text in ("a red apple", "")]
    frames = [[pipeline.text_tokenizer.frame(i, 8, 8)] * 3 for i in ids]
    given = torch.full((3, 16, 16), -1)
    given[:, : kept[0], :] = given[:, :, : kept[1]] = 5

    def run(**more) -> list[tuple[int, torch.Tensor]]:
        steps = sample(
            pipeline.model, *frames, (8, 8), settings, generators(1, 2, 3), 0, given, **more
        )
        return [(step.position, step.codes.clone()) for step in steps]

    alone, together = run(), run(ahead=ahead)
    assert [position for position, _ in alone] == [position for position, _ in together]
    for (_, expected), (_, codes) in zip(alone, together, strict=True):
        assert torch.equal(codes, expected)


def test_right_guesses_save_steps(pipeline, monkeypatch):
    """Greedy and without guidance, a model that always predicts code 0 guesses right."""
    settings = replace(SETTINGS, width=64, height=64, temperature=0, cfg=1.0)
    monkeypatch.setattr(
        pipeline.model.head.weight, "data", torch.zeros_like(pipeline.model.head.weight)
    )
    steps = []
    step = pipeline.model.step
    monkeypatch.setattr(pipeline.model, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    frame = pipeline.text_tokenizer.frame([], 8, 8)
    *_, last = sample(pipeline.model, [frame], [frame], (8, 8), settings, generators(0), 0, ahead=8)
    assert last.codes.sum() == 0
    assert len(steps) == 8  # of 64: the first window comes from the prompt
