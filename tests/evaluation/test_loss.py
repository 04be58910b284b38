import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenshuffle_core.bulk import Job, draw_all
from tokenshuffle_core.config import GenerationConfig, PromptConfig
from tokenshuffle_core.evaluation.intervals import mean
from tokenshuffle_core.evaluation.loss import picture_nats, validation_loss
from tokenshuffle_core.text_tokenizer import IMAGE_START, PAD, TextTokenizer


@pytest.fixture
def pairs():
    """Prompts of different lengths, pictures of two sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (4, 6), (8, 8), (4, 6), (8, 8)]
    prompts = ["", "a red apple, 3d style", "apple", "a dog", "three stars on a blue background"]
    codes = [torch.randint(64, size, generator=generator) for size in sizes]
    return list(zip(prompts, codes, strict=True))


def nats_by_hand(pipeline, prompt: str, codes: torch.Tensor, window: int = 2) -> float:
    """One picture alone, without padding; log softmax and the order of windows in numpy."""
    rows, columns = codes.shape[0] // window, codes.shape[1] // window
    ids = pipeline.text_tokenizer.frame(pipeline.encode_prompt(prompt), rows, columns)
    with torch.inference_mode():
        padding = torch.zeros(1).long()
        logits = pipeline.model(torch.tensor([ids]), padding, codes[None], window).codes
    logits = logits[0].numpy().astype(np.float64)
    total = 0.0
    for row in range(rows):
        for column in range(columns):
            for i in range(window * window):
                target = codes[row * window + i // window, column * window + i % window]
                line = logits[row * columns + column, i]
                total += np.log(np.exp(line - line.max()).sum()) + line.max() - line[target]
    return total


def test_every_code_counts_the_same(pipeline, pairs):
    nats = [nats_by_hand(pipeline, *pair) for pair in pairs]
    found = validation_loss(pipeline, pairs, batch=2)
    total = sum(codes.numel() for _, codes in pairs)
    assert found.value == pytest.approx(sum(nats) / total, rel=1e-5)
    assert found.n == 5
    of_means = sum(n / codes.numel() for n, (_, codes) in zip(nats, pairs, strict=True)) / 5
    assert abs(found.value - of_means) > 1e-3  # the mean of the pictures' means is another one
    for batch in (1, 5):
        again = validation_loss(pipeline, pairs, batch)
        assert (again.value, again.low) == pytest.approx((found.value, found.low), rel=1e-5)


def test_the_interval_is_students_where_the_pictures_are_alike(pipeline, pairs):
    alike = pairs[::2]
    each = [nats_by_hand(pipeline, *pair) / 64 for pair in alike]
    found, expected = validation_loss(pipeline, alike), mean(each)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-4)


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_codebook(pipeline, pairs):
    blank = copy.copy(pipeline)
    blank.model = copy.deepcopy(pipeline.model)
    blank.model.head.weight.data.zero_()
    found = validation_loss(blank, pairs)
    assert found.value == pytest.approx(math.log(64), rel=1e-6)
    assert found.high - found.low == pytest.approx(0, abs=1e-6)


def test_a_prompt_that_is_too_long_is_cut(pipeline):
    ids = pipeline.text_tokenizer.encode("a red apple " * 50)
    longest = pipeline.config.model.max_prompt
    assert len(ids) > longest
    short = pipeline.text_tokenizer.text_of(ids[:longest])
    assert pipeline.text_tokenizer.encode(short) == ids[:longest]
    codes = torch.zeros(1, 4, 4).long()
    found, expected = (
        picture_nats(pipeline, [prompt], codes, 2) for prompt in ("a red apple " * 50, short)
    )
    torch.testing.assert_close(found, expected)


@torch.inference_mode()
def test_what_follows_the_prompt_is_not_cut(pipeline, tmp_path):
    """By Janus' template, which ends in " Assistant:"."""
    template = ("<|begin|>", "User: {prompt} Assistant:", IMAGE_START)
    text = pipeline.text_tokenizer.to_json()
    text = TextTokenizer.from_json(text, PromptConfig(template=template, pad=PAD))
    asked = replace(pipeline, text_tokenizer=text)
    most = pipeline.config.model.max_prompt
    after = text.tokenizer.encode(" Assistant:", add_special_tokens=False).ids
    ids = text.encode("a red apple " * 50)
    kept = [*ids[: most - len(after)], *after]
    assert len(ids) > most == len(kept)
    settings = GenerationConfig(32, 16, cfg=1.0)
    job = Job("a red apple " * 50, 3, tmp_path / "apple.png", settings)
    ((_, drawn),) = draw_all(asked, [job], cut=True)
    *_, expected = asked.sample([kept], [], settings, [3])
    assert torch.equal(drawn, expected.codes[0])
    found = picture_nats(asked, [job.prompt], drawn[None], 2)
    framed = torch.tensor([text.frame(kept, *expected.codes[0, ::2, ::2].shape)])
    logits = pipeline.model(framed, torch.zeros(1).long(), drawn[None]).codes
    nats = F.cross_entropy(logits.flatten(0, 2), pipeline.model.targets(drawn[None]).flatten())
    assert found.item() == pytest.approx(nats.item() * drawn.numel(), rel=1e-5)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_each_window_of_an_elastic_model(elastic, pairs, window):
    alike = pairs[::2]
    nats = [nats_by_hand(elastic, *pair, window) for pair in alike]
    found = validation_loss(elastic, alike, window=window)
    assert found.value == pytest.approx(sum(nats) / (3 * 64), rel=1e-5)
