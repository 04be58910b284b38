"""Prompt -> token ids: byte-level BPE through the `tokenizers` library, and the special tokens.

Every byte is a token, so any language works and nothing is unknown. Our models read a prompt as

    <|begin|> text ... <|rows:R|> <|columns:C|> <|image_start|>

where R and C are the picture's size in windows, so that one model supports many sizes; published
models have their own templates (PromptConfig).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .config import PromptConfig

BEGIN, IMAGE_START, IMAGE_END, PAD = "<|begin|>", "<|image_start|>", "<|image_end|>", "<|pad|>"


def special_tokens(max_grid: int) -> list[str]:
    """The special tokens of a model whose pictures have at most `max_grid` windows a side."""
    sides = [f"<|{side}:{n}|>" for side in ("rows", "columns") for n in range(1, max_grid + 1)]
    return [PAD, BEGIN, IMAGE_START, IMAGE_END, *sides]


ARTICLES = (
    "a|an|the|der|die|das|den|dem|des|ein|eine|einen|einem|einer|eines|le|la|les|un|une|el|los|las|"
    "lo|una|unos|unas|il|i|gli|uno|o|um|uma|uns|umas"
)
# Measure words of Chinese, Japanese and Korean.
MEASURES = "个個只隻颗顆朵辆輛棵头頭匹条條架艘把块塊杯碗本台座枚张張根支片位顶頂"
COUNTERS = "つ匹個台本枚頭羽輪粒軒機隻杯冊足着"
UNITS = "(?:마리|개|대|송이|채|자루|그루|장|잔|권|척|켤레|벌|명)(?:의)?"
NUMBERS = (("두|2", "둘"), ("세|3", "셋"), ("네|4", "넷"), ("다섯|5", "다섯"))
ENDS = r"\A[\s.,:!?¡¿。·']+|[\s.,:!?。·']+\z", ""
START, END = r"(?<![\w'-])", r"(?![\w'-])"
# What does not change the meaning of a prompt, as (pattern, replacement) on lowercase NFKC text.
# The engine is Oniguruma, in which ^ and $ match at every line.
RULES = (
    ("[\u200b-\u200f\u2060\ufeff\u00ad\ufe0e\ufe0f]", ""),  # invisible
    (" \u0301", "'"),  # NFKC's form of an acute accent alone
    ("ё", "е"),
    ("[’‘ʼ`]", "'"),
    ("[‐‑–—]", "-"),
    (r"\s+-+\s+", ", "),
    ("×", "x"),
    ('["“”„«»「」『』]', " "),
    (r"\b3-d\b", "3d"),
    (r"(?<=3d|flat|modern|noto)-(?=style\b)", " "),
    (r"\bgray\b", "grey"),
    ENDS,
    (r"\s*[,;、]\s*", ", "),
    (r"\s*:\s*", ": "),
    # Articles; Portuguese "os" and "as" only before a plural, because a French "os" is a bone.
    (rf"{START}d'une?(?=\s)", "de"),
    (rf"{START}(?:{ARTICLES}){END}|{START}(?:l|un)'(?=\w)|{START}(?:os|as)(?=\s+\w+s\b)", " "),
    (rf"(?:(?<![\d十])[一1][{COUNTERS}]|ひとつ)の|(?<![十第唯统統])一[{MEASURES}]", " "),
    (rf"(?<!\w)(?:하나의|(?:한 |1 ?){UNITS})(?!\w)", " "),
    # A number with the measure word of any noun.
    (rf"(?<=[两二三四五2-5])[{MEASURES}](?=[\u4e00-\u9fff])", "个"),
    *((rf"(?<!\w)(?:{number}) ?{UNITS}(?!\w)", word) for number, word in NUMBERS),
    (r"\s+", " "),
    # "On a blue background" in other words.
    (r" (?:sur|sobre|con|com|em|num|su) (?=(?:fond|fondo|fundo|sfondo)\b)", ", "),
    (r"(?<=\w)e[mn] hintergrund\b", "er hintergrund"),
    (r" (?:auf|vor|mit) (?=\w+ hintergrund\b)", ", "),
    (r" (?:with|against) (?=\w+ background\b)", ", "),
    ENDS,
)


def normalizer() -> normalizers.Normalizer:
    """Lowercase NFKC without what does not change the meaning: extra white space, quotation marks,
    the punctuation at the end, and the articles of ten languages.

    It is stored with the vocabulary, so a checkpoint keeps the one that it was trained with.
    """
    replaced = [normalizers.Replace(Regex(pattern), content) for pattern, content in RULES]
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *replaced])


class PromptEncoder(Protocol):
    """Turns a prompt into ids: a `TextTokenizer`, or `ClassNames`."""

    kind: ClassVar[str]  # "text" or "classes", stored in a checkpoint
    pad: int  # the id that pads shorter prompts on the left

    def encode(self, text: str) -> list[int]: ...
    def encode_all(self, texts: list[str]) -> list[list[int]]: ...
    def frame(self, ids: list[int], rows: int, columns: int, length: int = 0) -> list[int]: ...
    def to_json(self) -> str: ...
    def __len__(self) -> int: ...


class TextTokenizer:
    """Raises ValueError if the tokenizer lacks a token that the prompt's template needs."""

    kind = "text"

    def __init__(self, tokenizer: Tokenizer, prompt: PromptConfig | None = None):
        # A prompt that spells out a special token gets its characters, not the token.
        tokenizer.encode_special_tokens = True
        # The file may ask for padding or truncation.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.prompt = tokenizer, prompt or PromptConfig()
        self.pad = self._token(self.prompt.pad)
        (place,) = (i for i, piece in enumerate(self.prompt.template) if "{prompt}" in piece)
        self.begins, self.ends = self.prompt.template[:place], self.prompt.template[place + 1 :]
        # Special tokens split text: whatever is between them and the prompt is encoded with it.
        special = [re.escape(t.content) for t in tokenizer.get_added_tokens_decoder().values()]
        special = re.compile("|".join(sorted(special, key=len, reverse=True)) or "(?!)")
        before, after = self.prompt.template[place].split("{prompt}")
        split = max((match.end() for match in special.finditer(before)), default=0)
        self.lead, self.glued_before = self._mixed(before[:split], special), before[split:]
        split = min((match.start() for match in special.finditer(after)), default=len(after))
        self.glued_after, self.trail = after[:split], self._mixed(after[split:], special)
        self.frame([], 1, 1)

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
        """Any Hugging Face `tokenizer.json`; special tokens that it lacks are appended.

        Raises FileNotFoundError, or ValueError if the file is not a tokenizer.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist or is not a file")
        tokenizer = _parse(Path(path).read_text(encoding="utf-8"), str(path))
        tokenizer.add_special_tokens(special_tokens(max_grid))
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str, prompt: PromptConfig | None = None) -> "TextTokenizer":
        """The inverse of `to_json`. Raises ValueError for text that is not a tokenizer."""
        return cls(_parse(text, "the stored text tokenizer"), prompt)

    def to_json(self) -> str:
        return self.tokenizer.to_str()

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of the text and of the template's text next to it. Surrounding white space is
        ignored; empty text has no ids."""
        text = text.strip()
        return self._plain(self.glued_before + text + self.glued_after) if text else []

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = [text.strip() for text in texts]
        whole = [self.glued_before + text + self.glued_after for text in texts]
        encoded = self.tokenizer.encode_batch(whole, add_special_tokens=False)
        return [found.ids if text else [] for found, text in zip(encoded, texts, strict=True)]

    def normalise(self, text: str) -> str:
        """The text as the file's normalizer leaves it, from which the ids are made."""
        rules = self.tokenizer.normalizer
        return rules.normalize_str(text) if rules else text

    def text_of(self, ids: list[int]) -> str:
        """The inverse of `encode`, up to normalisation."""
        return self.tokenizer.decode(ids).strip()

    def frame(self, ids: list[int], rows: int, columns: int, length: int = 0) -> list[int]:
        """Ids from `encode` put into the template, for a picture of rows x columns windows.

        Without ids it is the unconditional prompt; with `padded_negative` that is padded to
        `length`, the length of the conditional one. Raises ValueError if the vocabulary has no
        token for this size.
        """
        begins = [self._token(name) for name in self.begins]
        ends = [self._token(name, rows=rows, columns=columns) for name in self.ends]
        if ids or not self.prompt.padded_negative:
            return [*begins, *self.lead, *ids, *self.trail, *ends]
        return [*begins[:1], *[self.pad] * (length - 2), *ends[-1:]]

    def _mixed(self, text: str, special: re.Pattern) -> list[int]:
        """The ids of special tokens and of text between them."""
        ids, end = [], 0
        for match in special.finditer(text):
            ids += [*self._plain(text[end : match.start()]), self._token(match.group())]
            end = match.end()
        return ids + self._plain(text[end:])

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def _token(self, name: str, rows: int = 0, columns: int = 0) -> int:
        sized = name.replace("{rows}", str(rows)).replace("{columns}", str(columns))
        token = self.tokenizer.token_to_id(sized)
        if token is not None:
            return token
        if sized != name:
            raise ValueError(f"this model has no size tokens for {columns}x{rows} windows")
        raise ValueError(f"the text tokenizer has no token {name}")


def _parse(text: str, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{name} is not a tokenizer.json: {error}") from None
