import json
import re
from dataclasses import replace

import pytest

from tests.test_vocabulary import VOCABULARY
from tokenshuffle_core.checkpoints import BUNDLED
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data.emoji.build import read_manifest
from tokenshuffle_core.data.emoji.folder import Descriptions
from tokenshuffle_core.data.emoji.plan import plan
from tokenshuffle_core.data.emoji.vocabulary import vocabulary_of
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.reading import Reader, Reading
from tokenshuffle_core.text_tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def normalise():
    return TextTokenizer.train(["a cat"], 400, 8).normalise


@pytest.fixture(scope="module")
def reader(data, normalise) -> Reader:
    return Reader(vocabulary_of(read_manifest(data)), normalise)


def test_all_that_a_data_set_says_is_known(data, reader):
    """Every caption of every kind in every language: its subjects are found, and no word is new."""
    records, size = read_manifest(data), [(32, 32)]
    describe = Descriptions.of(records, size, white_repeats=1, seed=0)
    for i, planned in enumerate(plan(records, 300, size)):
        for caption in describe(i, *planned)["captions"]:
            if re.search("(둘|셋|넷|다섯) 개", caption):
                continue  # "five of them" as well as "five dogs"
            found = reader.read(caption)
            assert set(found.subjects) >= set(planned[0].subjects), caption
            assert found.unknown == (), caption


@pytest.mark.parametrize(
    ("prompt", "subjects", "others", "unknown"),
    [
        ("A Red  Apple, 3D style!", ["red apple"], ["3d style"], []),
        ("stars", ["star"], [], []),
        ("three apples", ["red apple"], [], []),
        ("a star, a star and an apple", ["star", "red apple"], [], []),
        ("a star over Paris, oil painting", ["star"], [], ["paris", "oil painting"]),
        ("a star. oil, painting", ["star"], [], ["oil", "painting"]),
        ("seven stars", ["star"], [], ["seven"]),
        ("5 stars on a blue background", ["star"], ["on blue background"], []),
        ("starting", [], [], ["starting"]),
        ("star's pyjamas", [], [], ["star's pyjamas"]),
        ("星星和红苹果", ["star", "red apple"], [], []),
        ("별이", ["star"], [], ["이"]),
        ("", [], [], []),
        (" ,;!", [], [], []),
        ("รถ", [], [], ["รถ"]),
    ],
)
def test_what_is_recognised(reader, prompt, subjects, others, unknown):
    found = reader.read(prompt)
    assert list(found.subjects) == subjects
    assert list(found.others) == others
    assert [word for word, _ in found.unknown] == unknown


def test_the_most_similar_name_is_suggested(normalise):
    words = {"en": ("a", "of")}
    reader = Reader(replace(VOCABULARY, words=words), normalise)
    assert reader.read("a kiten of xylophone").unknown == (("kiten", "kitten"), ("xylophone", ""))
    assert reader.read("kittens").unknown == (("kittens", "kitten"),)
    assert reader.read("a kiten asleep").unknown == (("kiten asleep", "kitten"),)


def test_a_name_is_of_the_language_of_the_prompt(normalise):
    subjects = [
        {"names": {"en": ["bear"], "fr": ["ours"]}},
        {"names": {"en": ["watch", "ours"], "fr": ["montre"]}},
    ]
    words = {"en": ["on", "the"], "fr": ["sur"]}
    vocabulary = type(VOCABULARY).from_json(json.dumps({"subjects": subjects, "words": words}))
    reader = Reader(vocabulary, normalise)
    assert reader.read("ours").subjects == ("bear",)  # of the watch it is a lesser name
    assert reader.read("sur ours").subjects == ("bear",)
    assert reader.read("on ours on").subjects == ("watch",)
    assert reader.read("ours sur", "fr").subjects == ("ours",)
    assert reader.read("ours sur", "ja").subjects == ("bear",)


def test_without_words_nothing_is_called_unknown(normalise):
    assert Reader(VOCABULARY, normalise).read("a dog and a kitten") == Reading(("kitten",))


def test_the_bundled_model_says_what_it_does_not_know(tmp_path, capsys):
    path = str(tmp_path / "x.png")
    assert main(["generate", "a fox over Paris, oil painting", "-o", path]) == 0
    message = capsys.readouterr().err
    assert 'note: this model does not know "paris", "oil painting"' in message
    assert main(["generate", "a helicoptr", "-o", path, "--overwrite"]) == 0
    assert '"helicoptr" (near: helicopter)' in capsys.readouterr().err
    assert main(["generate", "two foxes, flat style", "-o", path, "--overwrite"]) == 0
    assert "does not know" not in capsys.readouterr().err


def test_every_subject_of_the_bundled_model_is_found():
    loaded = load(BUNDLED)
    reader = Reader(loaded.vocabulary, loaded.text_tokenizer.normalise)
    for subject in loaded.vocabulary.subjects:
        for language, (name, *_) in subject.names.items():
            read = reader.read(name, language)
            assert read.unknown == ()
            assert len(read.subjects) == 1
