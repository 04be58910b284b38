"""Prompt -> token ids: byte-level BPE through the `tokenizers` library, and the special tokens.

Every byte is a token, so any language works and nothing is unknown. A prompt reaches the model as

    <|begin|> text ... <|rows:R|> <|columns:C|> <|image_start|>

where R and C count the picture's windows, so that one model serves many sizes.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BEGIN, IMAGE_START, IMAGE_END, PAD = "<|begin|>", "<|image_start|>", "<|image_end|>", "<|pad|>"


def special_tokens(max_grid: int) -> list[str]:
    """The special tokens of a model whose pictures have at most `max_grid` windows a side."""
    sides = [f"<|{side}:{n}|>" for side in ("rows", "columns") for n in range(1, max_grid + 1)]
    return [PAD, BEGIN, IMAGE_START, IMAGE_END, *sides]


class TextTokenizer:
    def __init__(self, tokenizer: Tokenizer):
        # A prompt that spells a special token means these characters, not the token.
        tokenizer.encode_special_tokens = True
        # Whoever made the file may have padded or cut to a length of their own.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        names = (PAD, BEGIN, IMAGE_START, IMAGE_END)
        ids = [tokenizer.token_to_id(name) for name in names]
        if None in ids:
            raise ValueError(f"the text tokenizer has no token {names[ids.index(None)]}")
        self.pad, self.begin, self.image_start, self.image_end = ids

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int, max_grid: int) -> "TextTokenizer":
        """Byte-level BPE with at most `vocabulary` tokens in all; case is folded."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
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
        """Any Hugging Face `tokenizer.json`; the special tokens it lacks are added at its end.

        Raises FileNotFoundError, or ValueError where the file is no tokenizer.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist or is not a file")
        tokenizer = _parse(Path(path).read_text(encoding="utf-8"), str(path))
        tokenizer.add_special_tokens(special_tokens(max_grid))
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """The inverse of `to_json`. Raises ValueError for text that is no tokenizer."""
        return cls(_parse(text, "the stored text tokenizer"))

    def to_json(self) -> str:
        return self.tokenizer.to_str()

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The text alone, without special tokens. Surrounding white space is ignored."""
        text = text.strip()
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).strip()

    def frame(self, text_ids: list[int], rows: int, columns: int) -> list[int]:
        """Text ids between the special tokens, for a picture of rows x columns windows.

        Raises ValueError where the vocabulary has no token for such a size.
        """
        size = [
            self.tokenizer.token_to_id(f"<|rows:{rows}|>"),
            self.tokenizer.token_to_id(f"<|columns:{columns}|>"),
        ]
        if None in size:
            raise ValueError(
                f"a picture of {columns}x{rows} windows is larger than this model has size "
                "tokens for"
            )
        return [self.begin, *text_ids, *size, self.image_start]


def _parse(text: str, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{name} is no tokenizer.json: {error}") from None
