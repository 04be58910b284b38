from tokenshuffle_core.data.emoji import captions
from tokenshuffle_core.data.emoji.build import LANGUAGES, read_manifest
from tokenshuffle_core.data.emoji.plan import plan
from tokenshuffle_core.data.emoji.vocabulary import vocabulary_of


def test_it_is_what_the_manifest_and_the_captions_say(data):
    records = read_manifest(data)
    found = vocabulary_of(records)
    assert set(found.languages) == set(LANGUAGES)
    assert len(found.subjects) == len({record["subject"] for record in records})
    shown = [composition for composition, *_ in plan(records, 400, [(32, 32)])]
    assert {each.kind for each in shown} == set(found.kinds)
    assert {len(each.subjects) for each in shown if each.kind == "count"} == set(found.counts)
    coloured = {each.subjects[0] for each in shown if each.kind == "coloured"}
    assert set(found.names(recoloured=True)) == coloured
    for record in records:
        (subject,) = (s for s in found.subjects if record["subject"] in s.names["en"])
        assert (record["style"] in subject.styles) == (record["split"] == "train")
        for language, names in record["names"].items():
            assert list(subject.names[language]) == names
            assert found.find(names[0], language) is subject
            for colour, phrases in found.backgrounds.items():
                caption = captions.prompt(names[0], record["style"], colour, language)
                assert found.styles[record["style"]][language] in caption
                assert colour == "white" or phrases[language] in caption
                caption = captions.prompt(names[0], None, "white", language, colour=colour)
                assert found.colours[colour][language] in caption
