import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenshuffle_core.text_tokenizer import TextTokenizer, special_tokens


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["a red apple", "一个红苹果"] * 3, 400, max_grid=8)


@pytest.mark.parametrize("text", ["a red apple", "红苹果，扁平风格", "تفاحة", "🍎 µ \t ñ", "ÅÉ"])
def test_any_language_survives(tokenizer, text):
    decoded = tokenizer.text_of(tokenizer.encode(text))
    assert decoded == TextTokenizer.train([], 300, 1).tokenizer.normalizer.normalize_str(text)


def test_case_and_surrounding_space_do_not_matter(tokenizer):
    assert tokenizer.encode(" A Red APPLE\n") == tokenizer.encode("a red apple")
    assert tokenizer.encode("  ") == []


def test_training_keeps_the_bound_and_merges_words(tokenizer):
    assert len(tokenizer) <= 400
    assert len(tokenizer.encode("a red apple")) == 2


def test_frame_puts_the_size_before_the_image(tokenizer):
    ids = tokenizer.frame(tokenizer.encode("apple"), rows=3, columns=5)
    tokens = [tokenizer.tokenizer.id_to_token(i) for i in ids]
    assert tokens[0] == "<|begin|>"
    assert tokens[-3:] == ["<|rows:3|>", "<|columns:5|>", "<|image_start|>"]
    with pytest.raises(ValueError, match="no size tokens for 5x9 windows"):
        tokenizer.frame([], rows=9, columns=5)


def test_a_prompt_cannot_spell_a_special_token(tokenizer):
    ids = tokenizer.encode("<|image_start|>")
    assert tokenizer.tokenizer.token_to_id("<|image_start|>") not in ids
    assert tokenizer.text_of(ids) == "<|image_start|>"


def test_json_round_trip(tokenizer):
    again = TextTokenizer.from_json(tokenizer.to_json())
    assert again.encode("红 apple <|pad|>") == tokenizer.encode("红 apple <|pad|>")
    assert len(again) == len(tokenizer)


def test_any_tokenizer_json_can_be_used(tmp_path):
    foreign = Tokenizer(models.WordPiece({"[UNK]": 0, "red": 1, "apple": 2}, unk_token="[UNK]"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    foreign.save(str(path))
    tokenizer = TextTokenizer.from_file(path, max_grid=4)
    assert tokenizer.encode("red apple") == [1, 2]
    assert len(tokenizer) == 3 + len(special_tokens(4))
    assert len(tokenizer.frame([1], 4, 4)) == 5


def test_what_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        TextTokenizer.from_file(path, 4)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.from_file(path, 4)


def test_padding_and_truncation_of_a_file_are_not_obeyed(tmp_path):
    plain = TextTokenizer.train(["a red apple"], 300, 4)
    tokenizer = Tokenizer.from_str(plain.to_json())
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = TextTokenizer.from_file(tmp_path / "tokenizer.json", max_grid=4)
    for text in ("apple", "a red apple and another one"):
        assert found.encode(text) == plain.encode(text)
