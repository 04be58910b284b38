import base64
import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from tokenshuffle_core import known_tokenizers
from tokenshuffle_core.normalizer import FORMER_RULES, RULES
from tokenshuffle_core.text_tokenizer import MAX_TEXT, TextTokenizer, special_tokens


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
    for text in ("{}", "[]", "", "\0", '{"model": {"type": "BPE"}}', "[" * 200_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
            TextTokenizer.from_file(path, 4)
    path.write_bytes(b"\xff\xfe")
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


def regex(kind: str, pattern: str, **more) -> dict:
    behaviour = {"behavior": "Isolated", "invert": False} if kind == "Split" else {}
    return {"type": kind, "pattern": {"Regex": pattern}, **behaviour, **more}


def table(index: bytes, texts: bytes) -> dict:
    """A normalizer of SentencePiece."""
    charsmap = base64.b64encode(len(index).to_bytes(4, "little") + index + texts)
    return {"type": "Precompiled", "precompiled_charsmap": charsmap.decode()}


def sequence(place: str, pieces: list[dict]) -> dict:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
    return {"type": "Sequence", inner.get(place, "decoders"): pieces}


def nested(depth: int) -> dict:
    piece = {"type": "NFC"}
    for _ in range(depth):
        piece = sequence("normalizer", [piece])
    return piece


DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TRIPLED = {"type": "Replace", "pattern": {"String": "▁"}, "content": "   "}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("place", "piece", "message"),
    [
        ("pre_tokenizer", regex("Split", "(x+x+)+y"), "Split with the pattern '"),
        ("pre_tokenizer", regex("Split", r"(\s\s*)*[a]+"), "Split with the pattern"),
        ("pre_tokenizer", regex("Split", "[a[b]&&[c]]+"), "Split with the pattern"),
        ("pre_tokenizer", regex("Split", ""), "Split with the pattern"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "FixedLength"),
        ("pre_tokenizer", {"type": "Split", "pattern": 3}, "Split with the pattern"),
        ("pre_tokenizer", sequence("pre_tokenizer", [BYTES] * 20), "ByteLevel twice"),
        ("pre_tokenizer", {"pretokenizers": []}, "has None"),
        ("normalizer", regex("Replace", "", content="ab"), "Replace with the pattern"),
        ("normalizer", regex("Replace", "(a|a)*b", content=""), "Replace with the pattern"),
        ("normalizer", regex("Replace", r"\s+", content="▁" * 999), "Replace with the pattern"),
        ("normalizer", sequence("normalizer", [DOUBLED] * 60), "Replace with the pattern"),
        ("normalizer", {"type": "ByteLevel"}, "its normalizer has ByteLevel"),
        ("normalizer", TRIPLED, "Replace with the pattern '▁'"),
        ("normalizer", table(bytes(64), b"  \0"), "a table of its own"),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 10**6}, "Prepend"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}, "a table of its own"),
        ("normalizer", table(bytes(64), b"x" * 10**6 + b"\0"), "a table of its own"),
        ("normalizer", table(bytes(64), b""), "a table of its own"),
        ("normalizer", sequence("normalizer", [table(bytes(64), b"a\0")] * 2), "Precompiled twice"),
        ("normalizer", sequence("normalizer", [{"type": "Lowercase"}, None]), "of that length"),
        ("normalizer", nested(100), "a Sequence of that length"),
        ("decoder", sequence("decoder", [DOUBLED] * 60), "Replace with the pattern"),
        ("decoder", {"type": "CTC"}, "its decoder has CTC"),
        ("post_processor", {"type": ["x"]}, "its post_processor has"),
        ("model", {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.5}, "dropout"),
        (
            "model",
            {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 10**9},
            "words of",
        ),
        ("model", {"type": "Other"}, "its model has Other"),
    ],
)
def test_pieces_that_no_known_family_uses_are_refused(place, piece, message):
    parts = json.loads(TextTokenizer.train(["a"], 300, 4).to_json()) | {place: piece}
    with pytest.raises(ValueError, match=f"is not a tokenizer.json: .*{message}") as error:
        TextTokenizer.from_json(json.dumps(parts))
    assert len(str(error.value)) < 500


def test_the_pieces_of_known_families_are_accepted():
    """Of every text tokenizer that the `transformers` library builds, and those that Llama 3,
    Janus and DeepSeek publish."""
    transformers = pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    accepted = set()
    for name in dir(transformers):
        if name.endswith("Tokenizer") and not name.startswith("Esm"):
            try:
                backend = getattr(transformers, name)().backend_tokenizer
            except Exception:  # needs files, or another package
                continue
            Tokenizer.from_str(known_tokenizers.checked(backend.to_str()))
            accepted.add(name)
    assert {"LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "T5Tokenizer"} < accepted
    splits = [
        TikTokenConverter().pattern, "[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+", r"\s?[!-/:-~！-／：-～]+",
        r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}{1,3}", r"\s?\p{L}+",
    ]  # fmt: skip
    plain = json.loads(TextTokenizer.train(["a"], 300, 4).to_json())
    pieces = [*(regex("Split", split) for split in splits), BYTES]
    text = json.dumps(plain | {"pre_tokenizer": sequence("pre_tokenizer", pieces)})
    assert json.loads(TextTokenizer.from_json(text).to_json())["pre_tokenizer"]["pretokenizers"]
    for rules in (RULES, FORMER_RULES):
        replaced = [regex("Replace", pattern, content=content) for pattern, content in rules]
        text = json.dumps(plain | {"normalizer": sequence("normalizer", replaced)})
        assert TextTokenizer.from_json(text).encode("x")


def test_a_key_twice_is_read_as_it_was_checked():
    text = TextTokenizer.train(["a"], 300, 4).to_json()
    assert text.count('"pre_tokenizer":') == 1
    hostile = json.dumps(regex("Split", "(x+x+)+y"))
    twice = text.replace('"pre_tokenizer":', f'"pre_tokenizer":{hostile},"pre_tokenizer":')
    assert TextTokenizer.from_json(twice).to_json() == text


def test_a_panic_is_a_value_error():
    """Which the library raises as a BaseException, from which no server recovers."""
    tokenizer = Tokenizer.from_str(TextTokenizer.train(["a"], 300, 4).to_json())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    found = TextTokenizer(tokenizer)
    for call in (found.encode, lambda text: found.encode_all([text] * 2)):
        with pytest.raises(ValueError, match="the text tokenizer: "):
            call("x" * 40)
    assert found.encode("y")


def test_text_is_bounded(tokenizer):
    longest = "apple " * (MAX_TEXT // 6)
    assert tokenizer.encode(longest)
    for call in (tokenizer.encode, tokenizer.normalise):
        with pytest.raises(ValueError, match=f"has {2 * MAX_TEXT} characters, at most {MAX_TEXT}"):
            call("x" * 2 * MAX_TEXT)
    assert tokenizer.encode_all(["x" * 2 * MAX_TEXT]) == [tokenizer.encode("x" * MAX_TEXT)]


def test_the_length_is_that_of_a_table_of_all_ids(tmp_path):
    """Not the number of tokens, which may have gaps between their ids."""
    gaps = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 700}, unk_token="[UNK]"))
    for token in special_tokens(4):
        gaps.add_special_tokens([token])
    gaps.save(str(tmp_path / "tokenizer.json"))
    found = TextTokenizer.from_json((tmp_path / "tokenizer.json").read_text())
    assert len(found) == 701
    gaps = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 3}, unk_token="[UNK]"))
    gaps.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="its ids have gaps"):
        TextTokenizer.from_file(tmp_path / "tokenizer.json", 4)
