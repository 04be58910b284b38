from functools import reduce

import pytest

from tokenshuffle_core.adapt.card import changed_card
from tokenshuffle_core.checkpoints import SIZES

OLD = {
    "modelspec.title": "X",
    "modelspec.author": "Y",
    "modelspec.license": "MIT",
    "modelspec.description": "Draws apples.",
    "tokenshuffle.scores": "97 % of apples",
    SIZES: "64x64",
}


@pytest.mark.parametrize(
    ("card", "begin"),
    [
        (OLD, "Made from X by Y: "),
        ({"modelspec.title": "X"}, "Made from X: "),
        ({}, "Made from a model without a title: "),
    ],
)
@pytest.mark.parametrize("steps", [["a"], ["a", "b", "c"]])
def test_what_is_said_of_a_model_that_was_made_from_another(card, begin, steps):
    made = reduce(changed_card, steps, card)
    assert made.pop("modelspec.description") == begin + ", ".join(steps)
    assert made.pop("modelspec.title") == begin.partition(" by ")[0].removesuffix(": ")
    assert made.items() <= card.items()
    assert made.keys() == card.keys() & {"modelspec.license", SIZES}
