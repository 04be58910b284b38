"""The text tokenizer of a published folder, as the text of a tokenizer.json.

Where that file is missing, it is made from `vocab.json` and `merges.txt` (Qwen2, Qwen2.5, Qwen3) or
from the byte pairs of `tiktoken` (Emu3, Emu3.5), as `transformers` converts them. Both cut text by
Qwen's regular expression and compose characters (NFC) before.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..known_tokenizers import QWEN
from .source import Source

RANKS = "emu3.tiktoken"
QWENS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
MAX_BYTES = 2**26  # of a file; the largest tokenizer.json are half of that
MAX_TOKENS = 2**20  # and ids; models have up to 283,000
MAX_TOKEN, MAX_MERGES = 256, 2**21  # bytes of a token, and merges from ranks; Emu's: 128, 294,166
# Emu3's, after its ranks. Those that stand for image codes come next, and are not text.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
    "<|image token|>", "<|image start|>", "<|image end|>",
)  # fmt: skip
# Byte -> the character that stands for it, itself if it can be seen, as in GPT-2.
SEEN = {*range(ord("!"), 0x7F), *range(0xA1, 0x100)} - {0xAD}
BYTES = {byte: chr(byte) for byte in SEEN} | {
    byte: chr(0x100 + i) for i, byte in enumerate(sorted({*range(0x100)} - SEEN))
}


def text_tokenizer_of(source: Source) -> str:
    """The text of its tokenizer.json, or of one made from other files; it is not checked as
    `known_tokenizers` does. Raises FileNotFoundError, or ValueError with one sentence."""
    if _has(source, "tokenizer.json"):
        return _text(source.file("tokenizer.json"))
    if _has(source, "vocab.json"):
        return _from_merges(source)
    if _has(source, RANKS):
        return _from_ranks(source.file(RANKS))
    raise FileNotFoundError(
        f"{source.path} has no text tokenizer: tokenizer.json, vocab.json with merges.txt, or "
        f"{RANKS} is missing"
    )


def names_token(source: Source, token: str) -> bool:
    """Whether a file of the text tokenizer names this token, which takes no parsing. Raises as
    `text_tokenizer_of`."""
    names = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")
    files = [source.file(name) for name in names if _has(source, name)]
    return any(json.dumps(token) in _text(file) for file in files)


def _from_merges(source: Source) -> str:
    config = source.json("tokenizer_config.json") if _has(source, "tokenizer_config.json") else {}
    kind = config.get("tokenizer_class", QWENS[0])
    if kind not in QWENS:
        raise ValueError(
            f"{source.path}: without tokenizer.json, vocab.json is read as a {QWENS[0]}'s, not "
            f"that of {kind!r:.100}"
        )
    vocabulary = source.json("vocab.json")
    file = source.file("vocab.json")
    _check_ids(file, vocabulary.values())
    merges, name = [], source.file("merges.txt")
    for place, line in _lines(name):
        if place == 1 and line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocabulary.keys():
            raise ValueError(
                f"{name}, line {place}: {line!r:.100} does not merge two tokens of vocab.json "
                "into a third"
            )
        merges.append(line)
    tokens = {id: token for token, id in vocabulary.items()}
    added: dict[str, int] = {}
    for token, id in _added(source, config):
        if vocabulary.setdefault(token, id) != id or tokens.setdefault(id, token) != token:
            raise ValueError(
                f"{source.path}: the token {token!r:.100} or its id {id} is used twice"
            )
        added[token] = id
    return _written(file, vocabulary, merges, added)


def _added(source: Source, config: dict) -> Iterator[tuple[str, int]]:
    """Tokens beside those of vocab.json, and their ids, which two files list. A special token to
    which no file gives an id is none."""
    listed = source.json("added_tokens.json") if _has(source, "added_tokens.json") else {}
    found = list(listed.items())
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ValueError(f"{source.path}: added_tokens_decoder is not a list of ids and tokens")
    for id, token in listed.items():
        content = token.get("content") if isinstance(token, dict) else None
        found.append((content, int(id) if re.fullmatch("[0-9]{1,9}", id) else id))
    for token, id in found:
        if not isinstance(token, str) or not token or type(id) is not int:
            raise ValueError(f"{source.path}: the added token {token!r:.100} has the id {id!r:.40}")
        if not 0 <= id < MAX_TOKENS:
            raise ValueError(f"{source.path}: the id {id!r:.40} of {token!r:.100} is too large")
        yield token, id


def _from_ranks(file: Path) -> str:
    """Any two neighbours whose bytes together are a token can merge into it, the lowest rank
    first; what is a token already is not taken apart."""
    ranks: dict[bytes, int] = {}
    for place, line in _lines(file):
        try:
            text, rank = line.split()
            token, rank = base64.b64decode(text, validate=True), int(rank)
        except ValueError:
            raise ValueError(
                f"{file}, line {place}: {line!r:.100} is not a token in base64 and its rank"
            ) from None
        if not 0 < len(token) <= MAX_TOKEN or token in ranks:
            raise ValueError(
                f"{file}, line {place}: the token {token!r:.100} is there already, or has "
                f"{len(token)} bytes instead of 1 to {MAX_TOKEN}"
            )
        ranks[token] = rank
    _check_ids(file, ranks.values())
    merges: list[str] = []
    names = {token: token.decode("latin-1").translate(BYTES) for token in ranks}
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{names[first]} {names[second]}" for first, second in pairs]
        if len(merges) > MAX_MERGES:
            raise ValueError(f"{file} has tokens that merge in more than {MAX_MERGES} ways")
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    added = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    if taken := added.keys() & vocabulary.keys():
        raise ValueError(f"{file} has the special token {min(taken)}")
    return _written(file, vocabulary | added, merges, added, ignore_merges=True)


def _written(
    file: Path, vocabulary: dict[str, int], merges: list[str], added: dict[str, int], **options
) -> str:
    """`vocabulary` has the added tokens as well: the library numbers others without a gap. All are
    special, so that no prompt can spell one."""
    if not set(BYTES.values()) <= vocabulary.keys():
        raise ValueError(f"{file} lacks tokens of one byte, without which some text has no ids")
    cut = {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    parts = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": token, **flags, "special": True}
            for token, id in sorted(added.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [cut, spelled | {"use_regex": False}],
        },
        "decoder": spelled,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, **options},
    }
    return json.dumps(parts)


def _check_ids(file: Path, ids: Iterable[object]) -> None:
    ids = list(ids)
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"{file} has {len(ids)} tokens, at most {MAX_TOKENS} are read")
    if not all(type(id) is int for id in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{file}: the ids of its tokens are not 0 to {len(ids) - 1}, each once")


def _has(source: Source, name: str) -> bool:
    return (source.folder / name).is_file()


def _text(file: Path) -> str:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has more than {MAX_BYTES} bytes")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, counted from 1."""
    for place, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield place, line.rstrip("\r")
