"""What a tokenizer.json from a stranger may hold: the pieces that known families of models use.

The `tokenizers` library runs whatever such a file asks for, and among that are regular expressions
that backtrack for ever, replacements that multiply text, and pieces that end it in a panic. What is
accepted here takes at worst a time quadratic in the length of the text.
"""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer

from .normalizer import FORMER_RULES, RULES

MAX_PIECES = 64  # of one kind, such as normalizers; ours are 33
MAX_WORD = 200  # characters of a word that WordPiece looks at
MAX_MAPPED = 40  # bytes that a normalizer's table has for a character; NFKC's longest are 33

# Where tokenizer.json lists each kind of piece, and which ones the families use.
NORMALIZERS = (
    "Sequence", "Replace", "Prepend", "Precompiled", "Strip", "StripAccents", "Lowercase", "NFC",
    "NFD", "NFKC", "NFKD", "Nmt", "BertNormalizer",
)  # fmt: skip
PRE_TOKENIZERS = (
    "Sequence", "Split", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Digits",
    "Punctuation", "BertPreTokenizer",
)  # fmt: skip
POST_PROCESSORS = (
    "Sequence", "ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing",
)  # fmt: skip
DECODERS = (
    "Sequence", "Replace", "ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece",
    "BPEDecoder",
)  # fmt: skip
KINDS = {
    "normalizer": ("normalizers", NORMALIZERS),
    "pre_tokenizer": ("pretokenizers", PRE_TOKENIZERS),
    "post_processor": ("processors", POST_PROCESSORS),
    "decoder": ("decoders", DECODERS),
}
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
# Another one of the same kind would multiply text, or do nothing.
REPEATED = ("Sequence", "Split", "Replace")

# How text is split before byte pairs are merged, in the syntax of Oniguruma.
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
NUMBERS = (r"\p{N}{1,3}", r"\p{N}", r"\p{N}+")
WORD = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LIKE_QWEN = [  # Llama 3, Qwen 2 and MiniCPM
    rf"(?i:{ENDINGS})|{WORD}\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
    for numbers in NUMBERS
]
QWEN = LIKE_QWEN[1]
SPLITS = {
    ENDINGS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    *(
        start + ENDINGS + r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        for start in ("", r"<\|startoftext\|>|<\|endoftext\|>|")  # CLIP
    ),
    *LIKE_QWEN,
    rf"(?i:{ENDINGS})|{WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    rf"|{SPACES}",  # Qwen 3.5
    *(  # GPT-4o and Llama 4; Mistral's Tekken
        rf"{WORD}{UPPER}*{LOWER}+{ending}|{WORD}{UPPER}+{LOWER}*{ending}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
        for ending in (f"(?i:{ENDINGS})?", "")
        for numbers in NUMBERS
    ),
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",  # DeepSeek V3
    r"\s+$",  # DeepSeek LLM, and with it Janus
    "[0-9][0-9][0-9]",  # Falcon
    r"[\r\n]",
}
# One set of characters, as in all other splits of DeepSeek: nothing in it can backtrack.
ONE_SET = re.compile(r"(\\s\?)?(\[[^\\\[\]&]+\]|\\p\{\w+\})(\+|\{1,3\})?")
# Replacements (pattern, content). None of them puts into a text what another one makes longer, so
# that many in a row do not multiply it.
REPLACED = {
    *RULES, *FORMER_RULES,
    (" {2,}", "▁"), (" {2,}", " "), (r"\A +| +\z", ""), (r"\A▁", "▁▁"), (r"\s+", " "), (r"\n", " "),
    (r"\s{2,}|[\n\r\t]", " "), (r"[\n\r\t]", " "), (r" +▁", "▁"), (r"^▁+$", ""),
}  # fmt: skip
REPLACED_TEXT = {(" ", "▁"), ("▁", " "), ("``", '"'), ("''", '"'), ("\n", " ")}


def parse(text: str | bytes, name: str) -> Tokenizer:
    """Raises ValueError with one sentence, which starts with `name`, for text that is no
    tokenizer.json and as `checked`."""
    with sentences(f"{name} is not a tokenizer.json"):
        return Tokenizer.from_str(checked(text))


@contextmanager
def sentences(name: str) -> Iterator[None]:
    """The library raises plain Exception, and its panics are not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())[:300]}") from None


def checked(text: str | bytes) -> str:
    """The same tokenizer.json, written so that no two readers can differ about it.

    Raises ValueError with one sentence for text that is none, or with a piece that no known family
    uses.
    """
    try:
        parts = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    if not isinstance(parts, dict) or not isinstance(parts.get("model"), dict):
        raise ValueError("there is no model in it")
    for place, (inner, known) in KINDS.items():
        seen: list[str] = []
        _check(parts.get(place), place, inner, known, seen)
        if len(seen) > MAX_PIECES:
            raise ValueError(f"its {place} has more than {MAX_PIECES} pieces")
    model = parts["model"]
    # Older files do not say the kind.
    _require(model.get("type", "BPE") in MODELS, "model", model.get("type"))
    _require(not model.get("dropout"), "model", "BPE with dropout")
    word = model.get("max_input_chars_per_word") or 0
    _require(type(word) is int and word <= MAX_WORD, "model", f"words of {word!r:.20} characters")
    return json.dumps(parts)


def _check(piece: object, place: str, inner: str, known: tuple[str, ...], seen: list[str]) -> None:
    if piece is None:
        return
    kind = piece.get("type") if isinstance(piece, dict) else piece
    _require(kind in known, place, kind)
    _require(kind in REPEATED or kind not in seen, place, f"{kind} twice")
    seen.append(kind)
    pieces = piece.get(inner) if kind == "Sequence" else []
    _require(isinstance(pieces, list), place, "a Sequence of nothing")
    for each in pieces:
        _require(each is not None and len(seen) <= MAX_PIECES, place, "a Sequence of that length")
        _check(each, place, inner, known, seen)
    if kind in ("Split", "Replace"):
        pattern = piece.get("pattern")
        regex, plain = (
            pattern.get(name) if isinstance(pattern, dict) and len(pattern) == 1 else None
            for name in ("Regex", "String")
        )
        if kind == "Split":
            fits = _text(plain) or (_text(regex) and _splits(regex))
        else:
            content = piece.get("content")
            fits = isinstance(content, str) and (
                (regex, content) in REPLACED or (plain, content) in REPLACED_TEXT
            )
        _require(fits, place, f"{kind} with the pattern {regex or plain or pattern!r:.100}")
    elif kind == "Prepend":
        _require(piece.get("prepend") in ("▁", " "), place, f"Prepend {piece.get('prepend')!r:.20}")
    elif kind == "Precompiled":
        _require(_is_table(piece.get("precompiled_charsmap")), place, "a table of its own")


def _splits(regex: str) -> bool:
    plain = regex.replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters
    return plain in SPLITS or bool(ONE_SET.fullmatch(regex))


def _is_table(text: object) -> bool:
    """Whether it is a table of SentencePiece: the size of an index, the index, and the texts that
    characters become, each with a zero after it."""
    try:
        table = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return False
    size = int.from_bytes(table[:4], "little")
    texts = table[4 + size :].split(b"\0")
    fits = size > 0 and size % 4 == 0 and len(texts) > 1 and max(map(len, texts)) <= MAX_MAPPED
    return fits and b"  " not in table[4 + size :]  # in runs of spaces, splits look again and again


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _require(condition: object, place: str, what: object) -> None:
    if not condition:
        raise ValueError(f"its {place} has {what!s:.150}, which no known family of models uses")
