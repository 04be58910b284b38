"""Prompt -> token ids: byte-level BPE through the `tokenizers` library, and the special tokens.

Every byte is a token, so any language works and nothing is unknown. Our models read a prompt as

    <|begin|> text ... <|rows:R|> <|columns:C|> <|image_start|>

where R and C are the picture's size in windows, so that one model supports many sizes; published
models have their own templates (PromptConfig).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .checks import MAX_TEXT, check_text
from .config import PromptConfig
from .known_tokenizers import parse, sentences
from .normalizer import normalizer

PIXELS = re.compile(r"\{(height|width)\}")
BEGIN, IMAGE_START, IMAGE_END, PAD = "<|begin|>", "<|image_start|>", "<|image_end|>", "<|pad|>"


def special_tokens(max_grid: int) -> list[str]:
    """The special tokens of a model whose pictures have at most `max_grid` windows a side."""
    sides = [f"<|{side}:{n}|>" for side in ("rows", "columns") for n in range(1, max_grid + 1)]
    return [PAD, BEGIN, IMAGE_START, IMAGE_END, *sides]


class PromptEncoder(Protocol):
    """Turns a prompt into ids: a `TextTokenizer`, or `ClassNames`."""

    kind: ClassVar[str]  # "text" or "classes", stored in a checkpoint
    pad: int  # the id that pads shorter prompts on the left

    def encode(self, text: str, negative: bool = False) -> list[int]: ...
    def encode_all(self, texts: list[str]) -> list[list[int]]: ...
    def cut(self, ids: list[int], longest: int) -> list[int]: ...
    def frame(
        self, ids: list[int], rows: int, columns: int, length: int = 0,
        *, pixels: int = 0, negative: bool = False,
    ) -> list[int]: ...  # fmt: skip
    def to_json(self) -> str: ...
    def __len__(self) -> int: ...


class Template(NamedTuple):
    """A prompt's template, taken apart: pieces before and after that of the prompt; ids of what
    special tokens separate from it there; and text that is encoded with it."""

    begins: tuple[str, ...]
    lead: list[int]
    before: str
    after: str
    trail: list[int]
    ends: tuple[str, ...]


class TextTokenizer:
    """Raises ValueError if the tokenizer lacks a token that the prompt's template needs.

    Here and below, whatever the `tokenizers` library raises is a ValueError, a panic as well.
    """

    kind = "text"

    def __init__(self, tokenizer: Tokenizer, prompt: PromptConfig | None = None):
        # A prompt that spells out a special token gets its characters, not the token.
        tokenizer.encode_special_tokens = True
        # The file may ask for padding or truncation.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.prompt = tokenizer, prompt or PromptConfig()
        self.rows = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.pad = self._token(self.prompt.pad)
        # Special tokens split text: whatever is between them and the prompt is encoded with it.
        special = [re.escape(t.content) for t in tokenizer.get_added_tokens_decoder().values()]
        self.special = re.compile("|".join(sorted(special, key=len, reverse=True)) or "(?!)")
        self.template = self._parsed(self.prompt.template)
        self.negative = self._parsed(self.prompt.negative) if self.prompt.negative else None
        for template in filter(None, (self.template, self.negative)):
            # Of sizes in pixels, not every one has tokens.
            pieces = [x for x in (*template.begins, *template.ends) if not PIXELS.search(x)]
            tokens = [token for piece in pieces for token in self._piece(piece, 1, 1, 0)]
            if not (tokens or template.lead or template.trail):  # nothing to predict a picture from
                raise ValueError("the prompt's template needs a special token beside the prompt")

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int, max_grid: int) -> "TextTokenizer":
        """Byte-level BPE with at most `vocabulary` tokens in total, on text that `normalizer`
        changes."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special_tokens(max_grid),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: str | Path, max_grid: int) -> "TextTokenizer":
        """`extended` with any Hugging Face `tokenizer.json`. Raises FileNotFoundError as well."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist or is not a file")
        return cls.extended(Path(path).read_bytes(), special_tokens(max_grid), str(path))

    @classmethod
    def extended(
        cls, text: str | bytes, special: list[str], name: str, prompt: PromptConfig | None = None
    ) -> "TextTokenizer":
        """The text of a tokenizer.json, to which the special tokens that it lacks are appended.

        Raises ValueError, beginning with `name`, if it is not a tokenizer.
        """
        tokenizer = parse(text, name)
        with sentences(name):
            before = set(tokenizer.get_vocab().values())
            added = set(special) - tokenizer.get_vocab().keys()
            tokenizer.add_special_tokens(special)
            if before & {tokenizer.token_to_id(name) for name in added}:
                raise ValueError("its ids have gaps, where special tokens would be added")
        return cls(tokenizer, prompt)

    @classmethod
    def from_json(cls, text: str | bytes, prompt: PromptConfig | None = None) -> "TextTokenizer":
        """The inverse of `to_json`. Raises ValueError for text that is not a tokenizer, or one with
        parts that no known family of models uses."""
        return cls(parse(text, "the text tokenizer"), prompt)

    def to_json(self) -> str:
        return self.tokenizer.to_str()

    def __len__(self) -> int:
        """The rows that a table of all ids has: the largest id and one."""
        return self.rows

    def encode(self, text: str, negative: bool = False) -> list[int]:
        """Ids of the text and of the template's text next to it. Surrounding white space is
        ignored; empty text has no ids, unless it is `negative` and has a template of its own.
        Raises ValueError as `check_text`."""
        text = text.strip()
        check_text("the text", text)
        if negative and self.negative:
            text = text or self.prompt.negative_text
            return self._plain(self.negative.before + text + self.negative.after)
        return self._plain(self.template.before + text + self.template.after) if text else []

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores; what is longer than MAX_TEXT is cut off."""
        texts = [text.strip()[:MAX_TEXT] for text in texts]
        whole = [self.template.before + text + self.template.after for text in texts]
        with sentences("the text tokenizer"):
            encoded = self.tokenizer.encode_batch(whole, add_special_tokens=False)
        return [found.ids if text else [] for found, text in zip(encoded, texts, strict=True)]

    def cut(self, ids: list[int], longest: int) -> list[int]:
        """Ids from `encode` without the end of the prompt, at most `longest`; the template's text
        after it stays."""
        if len(ids) <= longest:
            return ids
        after = self._plain(self.template.after)[:longest]
        return [*ids[: longest - len(after)], *after]

    def normalise(self, text: str) -> str:
        """The text as the file's normalizer leaves it, from which the ids are made. Raises as
        `encode`."""
        check_text("the text", text)
        rules = self.tokenizer.normalizer
        with sentences("the text tokenizer"):
            return rules.normalize_str(text) if rules else text

    def text_of(self, ids: list[int]) -> str:
        """The inverse of `encode`, up to normalisation."""
        with sentences("the text tokenizer"):
            return self.tokenizer.decode(ids).strip()

    def frame(
        self,
        ids: list[int],
        rows: int,
        columns: int,
        length: int = 0,
        *,
        pixels: int = 0,
        negative: bool = False,
    ) -> list[int]:
        """Ids from `encode` put into the template, for a picture of rows x columns windows of
        `pixels` x `pixels` each.

        Without ids it is the unconditional prompt; with `padded_negative` that is padded to
        `length`, the length of the conditional one. Raises ValueError if the vocabulary has no
        token for this size.
        """
        template = (negative and self.negative) or self.template
        begins, ends = (
            [token for piece in pieces for token in self._piece(piece, rows, columns, pixels)]
            for pieces in (template.begins, template.ends)
        )
        if ids or not self.prompt.padded_negative:
            return [*begins, *template.lead, *ids, *template.trail, *ends]
        return [*begins[:1], *[self.pad] * (length - 2), *ends[-1:]]

    def _parsed(self, pieces: tuple[str, ...]) -> Template:
        (place,) = (i for i, piece in enumerate(pieces) if "{prompt}" in piece)
        before, after = pieces[place].split("{prompt}")
        split = max((match.end() for match in self.special.finditer(before)), default=0)
        lead, before = self._mixed(before[:split]), before[split:]
        split = min((match.start() for match in self.special.finditer(after)), default=len(after))
        after, trail = after[:split], self._mixed(after[split:])
        return Template(pieces[:place], lead, before, after, trail, pieces[place + 1 :])

    def _piece(self, piece: str, rows: int, columns: int, pixels: int) -> list[int]:
        """The ids of a piece other than that of the prompt."""
        sizes = {"rows": rows, "columns": columns}
        sizes |= {"height": rows * pixels, "width": columns * pixels}
        sized = re.sub(r"\{(rows|columns|height|width)\}", lambda m: str(sizes[m[1]]), piece)
        if not (piece.startswith("<") and piece.endswith(">")):
            return self._mixed(sized)
        if sized != piece and self.tokenizer.token_to_id(sized) is None:
            raise ValueError(f"this model has no size tokens for {columns}x{rows} windows")
        return [self._token(sized)]

    def _mixed(self, text: str) -> list[int]:
        """The ids of special tokens and of text between them."""
        ids, end = [], 0
        for match in self.special.finditer(text):
            ids += [*self._plain(text[end : match.start()]), self._token(match.group())]
            end = match.end()
        return ids + self._plain(text[end:])

    def _plain(self, text: str) -> list[int]:
        with sentences("the text tokenizer"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def _token(self, name: str) -> int:
        token = self.tokenizer.token_to_id(name)
        if token is None:
            raise ValueError(f"the text tokenizer has no token {name}")
        return token
