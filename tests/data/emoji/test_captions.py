"""Captions: what they say, in ten languages and in the forms that people write."""

import itertools
import random

import pytest

from tokenshuffle_core.data.emoji import captions
from tokenshuffle_core.data.emoji.build import LANGUAGES, STYLES
from tokenshuffle_core.data.emoji.compose import arrange
from tokenshuffle_core.data.emoji.english import plural, with_article
from tokenshuffle_core.data.emoji.phrases import PHRASES
from tokenshuffle_core.data.emoji.pictures import BACKGROUNDS


@pytest.mark.parametrize("language", PHRASES)
def test_both_orders_of_a_pair_mean_the_same_place(language):
    """Each way names both, and its mirror image, a dog left of a cat, is none of its ways."""
    phrases = PHRASES[language]
    assert set(phrases.styles) == set(STYLES)
    assert set(phrases.backgrounds) == set(BACKGROUNDS)
    assert len(set(phrases.backgrounds.values())) == len(BACKGROUNDS)
    for kind in ("beside", "above"):
        ways = captions.ways(kind, ["cat", "dog"], language)
        assert len(ways) == len(set(ways)) >= 2
        assert all("cat" in way and "dog" in way for way in ways)
        assert {way.index("cat") < way.index("dog") for way in ways} == {True, False}
        assert not set(ways) & set(captions.ways(kind, ["dog", "cat"], language))
    assert not set(captions.ways("beside", ["cat", "dog"], language)) & set(
        captions.ways("above", ["cat", "dog"], language)
    )
    for copies in (2, 3, 4, 5):
        ways = captions.ways("count", ["cat"] * copies, language)
        assert any(str(copies) in way for way in ways)
        assert any(phrases.numbers[copies][0] in way for way in ways)


@pytest.mark.parametrize(
    ("arguments", "caption"),
    [
        (("row", ["cat", "dog", "owl"], "3d"), "cat, dog and owl, 3d style"),
        (("count", ["owl"] * 5, "3d"), "five owls, 3d style"),
        (("single", ["unicorn"], "3d", "orange"), "a unicorn, 3d style, on an orange background"),
        (("single", ["hourglass"], None), "an hourglass"),
        (("single", ["grapes"], "3d"), "grapes, 3d style"),
        (("count", ["mouse"] * 3, "3d"), "three mice, 3d style"),
        (("count", ["garlic"] * 2, None), "2 x garlic"),
        (("beside", ["cat", "owl"], None, "red"), "a cat left of an owl, on a red background"),
        (("above", ["cat", "dog"], None), "a cat above a dog"),
        (("count", ["собака"] * 4, None, "blue", "ru"), "четыре штуки: собака, синий фон"),
        (("beside", ["猫", "狗"], "3d", "white", "zh"), "猫在狗的左边，3D风格"),
        (
            ("above", ["ネコ", "イヌ"], "flat", "red", "ja"),
            "上にネコ、下にイヌ、フラットスタイル、赤い背景",
        ),
        (("beside", ["katze", "hund"], "3d", "white", "de"), "links katze, rechts hund, 3D-Stil"),
    ],
)
def test_canonical_captions(arguments, caption):
    assert captions.composed(*arguments) == caption


@pytest.mark.parametrize(
    ("name", "one", "several"),
    [
        ("glass of milk", "a glass of milk", "glasses of milk"),
        ("bow and arrow", "a bow and arrow", "bows and arrows"),
        ("face blowing a kiss", "a face blowing a kiss", "faces blowing a kiss"),
        ("cherries", "cherries", None),
        ("sushi", "sushi", None),
        ("octopus", "an octopus", "octopuses"),
        ("tropical fish", "a tropical fish", "tropical fish"),
        ("maple leaf", "a maple leaf", "maple leaves"),
        ("fox", "a fox", "foxes"),
        ("butterfly", "a butterfly", "butterflies"),
        ("monkey", "a monkey", "monkeys"),
        ("ufo", "a ufo", "ufos"),
    ],
)
def test_english_nouns(name, one, several):
    assert (with_article(name), plural(name)) == (one, several)


def test_a_picture_without_names_in_a_language_is_captioned_in_the_others():
    rng = random.Random(0)
    names = {"en": ["owl"], "de": ["eule"], "hi": ["उल्लू"]}
    texts = captions.variations(arrange("count", ("owl",) * 2, "3d", "red"), [names] * 2, rng)
    assert any("eule" in text for text in texts)
    assert not any("उल्लू" in text for text in texts)


def test_captions_have_the_forms_that_people_write():
    shown = arrange("coloured", ("red apple",), "flat", "white", colours=("blue",))
    names = {"en": ["red apple", "apple fruit"], "de": ["roter apfel"], "nl": ["rode appel"]}
    rng = random.Random(0)
    texts = [text for _ in range(40) for text in captions.variations(shown, [names], rng)]
    wanted = {
        "a blue apple, flat style", "a blue apple in flat style", "flat a blue apple",
        "a blue apple", "an emoji of a blue apple, flat style", "blauer apfel, flacher Stil",
        "blaue apfel im flachen Stil",
    }  # fmt: skip
    assert wanted <= set(texts)
    assert not any("red" in text or "roter" in text for text in texts)
    assert not any("appel" in text for text in texts)  # no adjectives in Dutch yet
    sized = arrange("sized", ("owl",), "3d", "red", extent="small")
    texts = captions.variations(sized, [{"en": ["owl"]}], random.Random(1))
    assert all(any(word in text for word in ("small", "tiny", "little")) for text in texts)


def test_another_colour_leaves_out_names_that_say_one():
    shown = arrange("coloured", ("rose",), "flat", "white", colours=("blue",))
    names = {
        "en": ["rose", "red rose"],
        "ru": ["красная роза"],
        "zh": ["红玫瑰", "玫瑰"],
        "de": ["rose", "rot-rose"],
    }
    rng = random.Random(0)
    texts = [text for _ in range(30) for text in captions.variations(shown, [names], rng)]
    assert any("玫瑰" in text for text in texts)
    assert not any(word in text for text in texts for word in ("red", "красная", "роза", "红"))
    assert captions.says_a_colour("синяя звезда", "ru")
    assert not captions.says_a_colour("redwood", "en")


def test_no_lead_comes_before_a_place():
    shown = arrange("beside", ("cat", "dog"), "3d", "white")
    names = [
        {"fr": ["chat"], "ja": ["猫"], "en": ["cat"]},
        {"fr": ["chien"], "ja": ["犬"], "en": ["dog"]},
    ]
    rng = random.Random(0)
    texts = [text for _ in range(30) for text in captions.variations(shown, names, rng)]
    leads = [lead.partition("{}") for of in PHRASES.values() for lead in of.leads]
    assert any("à gauche" in text for text in texts)
    for text in texts:
        assert not any(text.startswith(start) for start, _, end in leads if start), text
        assert not text.startswith("3D")


@pytest.mark.parametrize("language", LANGUAGES)
def test_ten_languages_have_all_phrases(language):
    phrases = PHRASES[language]
    assert set(phrases.adjectives) == set(BACKGROUNDS)
    assert set(phrases.in_styles) == set(STYLES)
    forms = [form for forms in phrases.adjectives.values() for form in forms]
    assert len(set(forms)) == len(forms)
    assert all("{}" in form for form in (*phrases.small, *phrases.big, *phrases.leads))
    assert not set(phrases.small) & set(phrases.big)
    pairs = {
        corners: captions.ways("corners", ["cat", "dog"], language, corners)
        for corners in itertools.permutations(range(4), 2)
    }
    ways = [way for each in pairs.values() for way in each]
    assert len(set(ways)) == len(ways) >= 24
    assert all("cat" in way and "dog" in way for way in ways)
    (row, *_) = captions.ways("row", ["cat", "dog", "owl"], language)
    assert row.index("cat") < row.index("dog") < row.index("owl")
