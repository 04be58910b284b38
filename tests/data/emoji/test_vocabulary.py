from tokenshuffle_core.data.emoji import captions
from tokenshuffle_core.data.emoji.build import LANGUAGES, read_manifest
from tokenshuffle_core.data.emoji.phrases import PHRASES
from tokenshuffle_core.data.emoji.vocabulary import vocabulary_of


def test_it_is_what_the_manifest_and_the_captions_say(data):
    records = read_manifest(data)
    colours = {"blue": {"en": "blue"}}
    found = vocabulary_of(
        records, PHRASES, recoloured={"star"}, colours=colours, counts=(2,), kinds=("count",)
    )
    assert set(found.languages) == set(LANGUAGES)
    assert (found.colours, found.counts, found.kinds) == (colours, (2,), ("count",))
    assert found.names(recoloured=True) == ["star"]
    assert len(found.subjects) == len({record["subject"] for record in records})
    for record in records:
        (subject,) = (s for s in found.subjects if record["subject"] in s.names["en"])
        assert (record["style"] in subject.styles) == (record["split"] == "train")
        for language, names in record["names"].items():
            assert list(subject.names[language]) == names
            assert found.find(names[0], language) is subject
            for background, phrases in found.backgrounds.items():
                caption = captions.prompt(names[0], record["style"], background, language)
                assert found.styles[record["style"]][language] in caption
                assert background == "white" or phrases[language] in caption
