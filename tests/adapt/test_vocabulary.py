from dataclasses import replace

import pytest
import torch

from tokenshuffle_core.adapt.vocabulary import change_text_tokenizer
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.sampler import pad_left
from tokenshuffle_core.text_tokenizer import TextTokenizer, special_tokens

CAPTIONS = ["a red apple", "a green pear", "roter apfel", "зелёная груша", "紅蘋果"]
CODES = torch.arange(64).view(1, 8, 8)


@pytest.fixture
def parent(pipeline) -> Pipeline:
    p = pipeline
    return Pipeline(
        p.config, p.model, p.image_tokenizer, p.text_tokenizer, {"modelspec.title": "t"}
    )


@pytest.fixture
def moved(parent) -> Pipeline:
    text = TextTokenizer.train(CAPTIONS, 480, parent.config.model.max_grid)
    return change_text_tokenizer(parent, text)


def test_the_model_fits_the_new_tokenizer_and_keeps_all_else(parent, moved):
    assert moved.config.model == replace(
        parent.config.model, text_vocabulary=len(moved.text_tokenizer)
    )
    before, after = (one.model.state_dict() for one in (parent, moved))
    for name in before.keys() - {"text_embedding.weight"}:
        torch.testing.assert_close(after[name], before[name])


@torch.inference_mode()
def test_a_prompt_of_shared_tokens_draws_the_same(parent, moved):
    logits = []
    for one in (parent, moved):
        ids = [one.text_tokenizer.tokenizer.token_to_id(c) for c in "xyz"]
        text, padding = pad_left(
            [one.text_tokenizer.frame(ids, 4, 4)], one.text_tokenizer.pad, "cpu"
        )
        logits.append(one.model(text, padding, CODES).codes)
    torch.testing.assert_close(*logits)


def test_a_new_token_starts_at_the_mean_of_its_pieces(parent, moved):
    old, new = parent.text_tokenizer, moved.text_tokenizer
    known = parent.model.text_embedding.weight
    specials = special_tokens(parent.config.model.max_grid)
    seen = parts = 0
    for name, token in new.tokenizer.get_vocab().items():
        row = moved.model.text_embedding.weight[token]
        same = old.tokenizer.token_to_id(name)
        if same is not None:
            torch.testing.assert_close(row, known[same])
        elif "\ufffd" not in (text := new.text_of([token])) and (pieces := old.encode(text)):
            seen += 1
            torch.testing.assert_close(row, known[pieces].mean(0))
        else:  # part of a character, or an article: its bytes, each of which is one letter
            parts += 1
            rows = known[[old.tokenizer.token_to_id(letter) for letter in name]]
            torch.testing.assert_close(row, rows.mean(0))
        assert name not in specials or same is not None
    assert seen > 20
    assert parts > 0
