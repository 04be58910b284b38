"""Text tokenizers of folders without tokenizer.json: the ids of `transformers` and `tiktoken`."""

import base64
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from tests.support.published import ADDED, write_merges, write_ranks
from tokenshuffle_core.checkpoints.source import Source
from tokenshuffle_core.checkpoints.tokenizer_files import BYTES, RANKS, text_tokenizer_of
from tokenshuffle_core.config import PromptConfig
from tokenshuffle_core.known_tokenizers import QWEN
from tokenshuffle_core.text_tokenizer import TextTokenizer, special_tokens

ROOT = Path(__file__).parents[2]
NAMES = "README.md", "README.zh.md", "web/docs/TokenShuffleLoader/ja.md"
CORPUS = [
    line for name in NAMES for line in (ROOT / name).read_text(encoding="utf-8").splitlines(True)
]
TEXTS = [
    *CORPUS, "".join(CORPUS), "", " ", "  a", "a  \n\n b\r\n", "I'm, we'LL, it'S 12345 x86_64",
    "cafe\u0301 A\u030a \u1112\u1161\u11ab", "café Å 한", "🍎👩\u200d👧 é",
    "تفاحة حمراء", "สวัสดี",
    "<|endoftext|><|im_start|>system", "<|t2i|>a<|soi|>", "<|extra_203|> <|image start|>",
    "\u3000全角\u3000１２３", "\xa0\u2028a\u200b", "\t\x7f\x01", "---- ==== ....",
    "\U0010ffff\ufffd",
    *("a" * n for n in range(2, 40)), *("=" * n + " " * n for n in range(2, 40)),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def read(folder: Path) -> TextTokenizer:
    return TextTokenizer.extended(text_tokenizer_of(Source(folder)), special_tokens(1), "it")


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


def test_characters_for_bytes():
    assert set(BYTES.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in ("é 红🍎", "\x00\x7f\xad"):
        seen = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
        assert "".join(BYTES[byte] for byte in text.encode()) == "".join(x for x, _ in seen)


@pytest.mark.parametrize("listed", ["added_tokens.json", "tokenizer_config.json"])
def test_ids_are_those_of_qwen(listed, folder):
    transformers = pytest.importorskip("transformers")
    write_merges(folder, CORPUS, listed)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder, split_special_tokens=True)
    ours = read(folder)
    for text in TEXTS:
        assert ids(ours, text) == theirs.encode(text), text
    for token in ADDED:
        assert ours.tokenizer.token_to_id(token) == theirs.convert_tokens_to_ids(token)
    template = PromptConfig(("<|t2i|>", "a {prompt}", "<|soi|>"), pad=ADDED[0])
    plain = TextTokenizer.from_json(text_tokenizer_of(Source(folder)), template)
    assert len(plain) == len(theirs)
    found = plain.frame(plain.encode("red <|soi|>"), 1, 1)
    theirs = [theirs.encode(text, split_special_tokens=False) for text in ("<|t2i|>", "<|soi|>")]
    assert found[:1] == theirs[0]
    assert found[-1:] == theirs[1]
    assert found.count(found[-1]) == 1
    assert plain.text_of(found[1:-1]) == "a red <|soi|>"


def test_added_tokens_far_above_the_vocabulary_keep_their_ids(folder):
    write_merges(folder, CORPUS)
    added = {"<|a|>": 5000, "<|b|>": 4000}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    template = PromptConfig(("{prompt}", "<|a|>"), pad="<|b|>")
    found = TextTokenizer.from_json(text_tokenizer_of(Source(folder)), template)
    assert found.frame(found.encode("<|b|>"), 1, 1)[-1] == 5000
    assert 4000 not in found.encode("<|b|>")
    assert (found.pad, len(found)) == (4000, 5001)
    assert len(read(folder)) == 5001 + 6  # ours come after theirs


def test_ids_are_those_of_tiktoken(folder):
    tiktoken = pytest.importorskip("tiktoken")
    import unicodedata

    ranks = write_ranks(folder, CORPUS)
    ranks[b"zqxj"] = len(ranks)  # which nothing merges into
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / RANKS).write_text("".join(lines))
    special = {"<|endoftext|>": len(ranks), "<|extra_204|>": len(ranks) + 207}
    theirs = tiktoken.Encoding("emu", pat_str=QWEN, mergeable_ranks=ranks, special_tokens=special)
    ours = read(folder)
    for text in (*TEXTS, "zqxj zqxjs"):
        expected = theirs.encode(unicodedata.normalize("NFC", text), disallowed_special=())
        assert ids(ours, text) == expected, text
        assert ours.tokenizer.decode(expected) == theirs.decode(expected)
    for token, id in (special | {"<|image end|>": len(ranks) + 210}).items():
        assert ours.tokenizer.token_to_id(token) == id


def test_tokenizer_json_comes_first(folder):
    write_merges(folder, CORPUS)
    text = text_tokenizer_of(Source(folder))
    (folder / "tokenizer.json").write_text(text)
    (folder / "vocab.json").write_text("[")
    assert text_tokenizer_of(Source(folder)) == text


def encoded(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(x).decode()} {i}\n" for i, x in enumerate(tokens))


SINGLE = [bytes([i]) for i in range(256)]
DECODER = {"9999": {"content": "<|a|>"}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": None}, "has no text tokenizer: tokenizer.json, vocab.json with merges"),
        ({"merges.txt": None}, r"merges\.txt does not exist"),
        ({"vocab.json": "[" * 9}, r"vocab\.json is not JSON"),
        ({"vocab.json": "[]"}, r"vocab\.json is not a JSON object"),
        *(
            ({"vocab.json": json.dumps(vocabulary)}, r"ids of its tokens are not 0 to \d+, each")
            for vocabulary in (
                {"a": 0, "b": 0},
                {"a": 0, "b": 2},
                {"a": -1, "b": 0},
                {"a": 0.0},
                {"a": True},
                {"a": "0"},
                {"a": 10**30},
                {"a": None},
            )
        ),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "lacks tokens of one byte"),
        *(
            ({"merges.txt": f"#version: 0.2\na b{line}"}, "line 2: .* does not merge two tokens")
            for line in ("", " c", "  ", "\t", "☃ a", "x" * 10**6)
        ),
        ({"merges.txt": b"\xff\xfe"}, "is not text in UTF-8"),
        ({"merges.txt": bytes(2**26 + 1)}, "has more than 67108864 bytes"),
        ({"added_tokens.json": '{"<|a|>": 0}'}, "or its id 0 is used twice"),
        ({"added_tokens.json": '{"a": 9999}'}, "'a' or its id 9999 is used twice"),
        ({"added_tokens.json": '{"<|a|>": 9999, "<|b|>": 9999}'}, "<|b|>.* 9999 is used twice"),
        ({"added_tokens.json": '{"<|a|>": "1"}'}, "token '<|a|>' has the id '1'"),
        ({"added_tokens.json": '{"": 9999}'}, "token '' has the id 9999"),
        ({"added_tokens.json": '{"<|a|>": 1099511627776}'}, "id 1099511627776 of .* is too large"),
        ({"added_tokens.json": '{"<|a|>": -1}'}, "the id -1 of"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": [1]}'}, "is not a list of ids"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"9999": 1}}'}, "token None has"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"x": {}}}'}, "has the id 'x'"),
        (
            {
                "tokenizer_config.json": json.dumps({"added_tokens_decoder": DECODER}),
                "added_tokens.json": '{"<|a|>": 9998}',
            },
            "the token '<|a|>' or its id 9999 is used twice",
        ),
        ({"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}, "'GPT2Tokenizer'"),
        *(
            ({"vocab.json": None, RANKS: text}, message)
            for text, message in (
                ("", "lacks tokens of one byte"),
                ("IQ== 0\nI 1", "line 2: 'I 1' is not a token in base64 and its rank"),
                ("IQ== 0\nI=== 1", "line 2: .* is not a token in base64"),
                ("IQ==", "line 1: 'IQ==' is not a token"),
                ("IQ== 0 0", "line 1: 'IQ== 0 0' is not a token"),
                ("IQ== x", "line 1: 'IQ== x' is not a token"),
                ("IQ== " + "1" * 10**4, "line 1: .* is not a token"),
                ("IQ== 0\nIQ== 1", "line 2: the token b'!' is there already"),
                ("IQ== -1", "are not 0 to 0, each once"),
                ("IQ== 0\nIg== 0", "are not 0 to 1, each once"),
                ("IQ== 0\nIg== 2", "are not 0 to 1, each once"),
                ("IQ== 1099511627776", "are not 0 to 0, each once"),
                (encoded([b"x" * 257]), "has 257 bytes instead of 1 to 256"),
                (encoded([*SINGLE[1:], b"ab"]), "lacks tokens of one byte"),
                (encoded([*SINGLE, b"<|im_start|>"]), "has the special token <|im_start|>"),
            )
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(files, message, folder):
    write_merges(folder, CORPUS[:10], "added_tokens.json")
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            content = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("|", r"\|")) as error:
        text_tokenizer_of(Source(folder))
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_a_link_to_a_vocabulary_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_merges(folder, CORPUS[:10])
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(elsewhere / f"other-{name}")
        (folder / name).symlink_to(elsewhere / f"other-{name}")
        with pytest.raises(ValueError, match=f"{name} is a link to another folder and name"):
            text_tokenizer_of(Source(folder))
        (folder / name).unlink()
        (elsewhere / f"other-{name}").rename(folder / name)


def test_ranks_that_merge_in_too_many_ways(folder, monkeypatch):
    monkeypatch.setattr("tokenshuffle_core.checkpoints.tokenizer_files.MAX_MERGES", 50)
    (folder / RANKS).write_text(encoded([*SINGLE, *(b"a" * n for n in range(2, 40))]))
    with pytest.raises(ValueError, match="merge in more than 50 ways"):
        text_tokenizer_of(Source(folder))
