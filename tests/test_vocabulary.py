import json
import random
from dataclasses import replace

import pytest
from safetensors import safe_open

from tests.support.loras import write_random_lora
from tokenshuffle_core import checkpoints
from tokenshuffle_core.adapt.vocabulary import change_text_tokenizer
from tokenshuffle_core.checkpoints import native
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data.shards import CodeShards
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training.start import Changes, trained_pipeline
from tokenshuffle_core.vocabulary import MAX_BYTES, Subject, Vocabulary

VOCABULARY = Vocabulary(
    (
        Subject({"en": ("red apple", "apple"), "zh": ("红苹果",)}, ("3d", "flat"), True),
        Subject({"en": ("kitten", "cat"), "zh": ("小猫", "猫")}, ("3d",)),
        Subject({"en": ("Cat",), "ja": ("猫",)}),
    ),
    styles={"3d": {"en": "3d style", "zh": "3D风格"}, "flat": {"en": "flat style"}},
    backgrounds={"blue": {"en": "on a blue background"}},
    colours={"blue": {"en": "blue", "zh": "蓝色的"}},
    counts=(2, 3),
    kinds=("single", "count"),
)


@pytest.fixture
def saved(pipeline, tmp_path):
    path = tmp_path / "with.safetensors"
    replace(pipeline, vocabulary=VOCABULARY).save(path)
    return path


def test_names_lead_back_to_their_subjects():
    apple, kitten, cat = VOCABULARY.subjects
    assert VOCABULARY.languages == ("en", "zh", "ja")
    for subject in VOCABULARY.subjects:
        for language, (best, *_) in subject.names.items():
            assert VOCABULARY.find(best, language) is subject
    assert VOCABULARY.find("  RED   Apple") is VOCABULARY.find("apple") is apple
    assert VOCABULARY.find("cat") is cat  # of the kitten it is a lesser name
    assert VOCABULARY.find("猫") is cat
    assert VOCABULARY.find("猫", "zh") is kitten
    assert VOCABULARY.find("red apple", "zh") is VOCABULARY.find("pear") is None


def test_names_are_sorted_in_one_language():
    assert VOCABULARY.names() == ["Cat", "kitten", "red apple"]
    assert VOCABULARY.names("zh") == sorted(["红苹果", "小猫"])
    assert VOCABULARY.names(recoloured=True) == ["red apple"]
    assert VOCABULARY.names("ja", recoloured=True) == []
    with pytest.raises(ValueError, match="names in en, zh, ja, not fr"):
        VOCABULARY.names("fr")


def test_a_file_keeps_it_out_of_the_card(saved, tiny):
    assert load(saved).vocabulary == checkpoints.read(saved).vocabulary == VOCABULARY
    assert native.VOCABULARY not in load(saved).card
    assert load(tiny).vocabulary is None
    with safe_open(tiny, "pt") as file:
        assert native.VOCABULARY not in file.metadata()


def test_every_way_to_another_file_keeps_it(saved, tmp_path):
    lora, other = tmp_path / "lora.safetensors", tmp_path / "other.safetensors"
    write_random_lora(lora, saved)
    model = ["--model", str(saved)]
    for command in (
        ["quantize", "--weights", "int8", *model],
        ["merge", "--lora", str(lora), *model],
        ["grow", "--windows", "4,2", *model],
        ["convert", str(saved)],
    ):
        assert main([*command, "-o", str(other)]) == 0
        assert load(other).vocabulary == VOCABULARY, command
    loaded = load(saved)
    changed = change_text_tokenizer(loaded, loaded.text_tokenizer)
    changed.save(other)
    assert load(other).vocabulary == VOCABULARY


def test_a_training_on_other_pictures_does_not_keep_it(saved, pipeline, codes):
    started = trained_pipeline(saved, CodeShards(codes), Changes())
    assert started.vocabulary is None
    assert started.text_tokenizer.to_json() == pipeline.text_tokenizer.to_json()


def test_a_key_of_a_later_version_does_not_matter():
    parts = json.loads(VOCABULARY.to_json()) | {"verbs": ["runs"]}
    parts["subjects"][0]["verbs"] = ["grows"]
    assert Vocabulary.from_json(json.dumps(parts)) == VOCABULARY


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subjects": []}, "there must be subjects"),
        ({"subjects": {"en": "cat"}}, "there must be an object, not 'en'"),
        ({"subjects": 3}, "not iterable"),
        ({"subjects": [{}]}, "names"),
        ({"subjects": [{"names": {}}]}, "names by language"),
        ({"subjects": [{"names": {"en": "cat"}}]}, "names must be a list"),
        ({"subjects": [{"names": {"en": []}}]}, "a name in each"),
        ({"subjects": [{"names": {"en": [7]}}]}, "7 is not a line of 1 to 200 characters"),
        ({"subjects": [{"names": {"en": [""]}}]}, "is not a line"),
        ({"subjects": [{"names": {"en": ["a\nb"]}}]}, "is not a line"),
        ({"subjects": [{"names": {"en": ["a\u2028b"]}}]}, "is not a line"),
        ({"subjects": [{"names": {"en": ["\ud800"]}}]}, "is not a line"),
        ({"subjects": [{"names": {"en": ["a"]}, "recoloured": 1}]}, "recoloured must be true"),
        ({"subjects": [{"names": {"en": ["a" * 201]}}]}, "is not a line"),
        ({"styles": {}}, "the style '3d' of a subject has no phrases"),
        ({"styles": []}, "styles must be an object"),
        ({"colours": {"blue": "blue"}}, "colours: blue must have phrases by language"),
        ({"backgrounds": {"blue": {"en": 1}}}, "1 is not a line"),
        ({"counts": [2, True]}, "counts must be whole numbers from 1 to 100"),
        ({"counts": [10**9]}, "counts must be whole numbers"),
        ({"kinds": "single"}, "kinds must be a list"),
    ],
)
def test_what_is_no_vocabulary_is_one_sentence(change, words):
    text = json.dumps(json.loads(VOCABULARY.to_json()) | change)
    with pytest.raises(ValueError, match=words) as error:
        Vocabulary.from_json(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("null", "there must be an object"),
        ("{}", "subjects"),
        ("[" * 200_000, "recursion"),
        (" " * (MAX_BYTES + 1), f"more than {MAX_BYTES} bytes"),
        ('"' + "猫" * (MAX_BYTES // 3 + 1), f"more than {MAX_BYTES} bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_text(text, words):
    with pytest.raises(ValueError, match=words):
        Vocabulary.from_json(text)


def test_mutated_json_is_read_or_refused():
    """Values of every type in every place, and characters changed anywhere."""
    chance, text = random.Random(0), VOCABULARY.to_json()
    values = [None, True, -1, 1e9, "", "x", [], ["x"], {}, {"x": "y"}, "\u202e", "\x1b[2J"]
    refused = []
    for _ in range(3000):
        parts = json.loads(text)
        where = parts
        while chance.random() < 0.8:
            place = chance.choice(list(where) if isinstance(where, dict) else range(len(where)))
            if not isinstance(where[place], dict | list) or not where[place]:
                break
            where = where[place]
        place = chance.choice(list(where) if isinstance(where, dict) else range(len(where)))
        where[place] = chance.choice(values)
        mutated = json.dumps(parts)
        for _ in range(chance.choice((0, 0, 1, 4))):
            at = chance.randrange(len(mutated))
            mutated = mutated[:at] + chance.choice('{}[]",:0\\é') + mutated[at + 1 :]
        try:
            found = Vocabulary.from_json(mutated)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert Vocabulary.from_json(found.to_json()) == found
            assert all(name.isprintable() or "\u202e" in name for name in found.names())
    assert 1000 < len(refused) < 3000
    assert all(each.startswith("the vocabulary cannot be read: ") for each in refused)
    assert not any("\n" in each for each in refused)


def test_a_file_with_a_bad_one_is_named(pipeline, tmp_path):
    class Bad:
        def to_json(self) -> str:
            return '{"subjects": 3}'

    path = tmp_path / "bad.safetensors"
    replace(pipeline, vocabulary=Bad()).save(path)
    with pytest.raises(ValueError, match=r"bad\.safetensors: the vocabulary cannot be read"):
        load(path)
    replace(pipeline, card={checkpoints.SIZES: "large"}).save(path)
    with pytest.raises(ValueError, match=r"bad\.safetensors: sizes must be like 128x128"):
        load(path)
