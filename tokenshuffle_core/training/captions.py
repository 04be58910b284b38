"""The captions of a data set, tokenised once, and rows of them for a step."""

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from ..text_tokenizer import PromptEncoder
from .distributed import rank

CHUNK = 256  # pictures whose captions are tokenised together; of more, Python keeps sifting lists


class Captions:
    """Every caption of every picture, cut at its end to the `longest` ids that the model reads.

    `first` (pictures + 1,) int64: those of picture i are the captions first[i] to first[i + 1] - 1.
    Raises as `PromptEncoder.encode`.
    """

    def __init__(self, pictures: Iterable[list[str]], tokenizer: PromptEncoder, longest: int):
        self.tokenizer = tokenizer
        counts, lengths, parts = [], [], [np.empty(0, np.int32)]
        noted = rank() > 0
        for chunk in _chunks(pictures):
            texts = [caption for captions in chunk for caption in captions]
            rows = tokenizer.encode_all(texts)
            of_chunk = list(map(len, rows))
            if max(of_chunk, default=0) > longest:
                if not noted:
                    noted = True
                    first = next(i for i, length in enumerate(of_chunk) if length > longest)
                    print(
                        f"note: a caption has {of_chunk[first]} tokens, the model reads {longest}: "
                        f"the ends of such captions are cut off: {texts[first][:60]}...",
                        file=sys.stderr,
                    )
                rows = [tokenizer.cut(ids, longest) for ids in rows]
                of_chunk = list(map(len, rows))
            counts += map(len, chunk)
            lengths += of_chunk
            parts.append(np.fromiter(chain.from_iterable(rows), np.int32, sum(of_chunk)))
        self.ids = np.concatenate(parts)
        self.first, self.start = (
            np.cumsum([0, *each], dtype=np.int64) for each in (counts, lengths)
        )
        self._frames: dict[tuple, tuple[list[int], list[int]]] = {}

    def prompt(self, picture: int, grid: tuple[int, int], pixels: int = 0) -> list[int]:
        """The first caption of a picture, framed for `grid` (rows, columns) of windows, each of
        `pixels` x `pixels`."""
        caption = self.first[picture]
        ids = self.ids[self.start[caption] : self.start[caption + 1]].tolist()
        return self.tokenizer.frame(ids, *grid, pixels=pixels)

    def rows(
        self, captions: np.ndarray, grid: tuple[int, int], multiple: int = 1, pixels: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Captions (B,) int64, -1 for none -> framed ids (B, T) int32, padded on the left, and the
        padding tokens of each row (B,) int64.

        T is the length of the longest row, or the next length that is one more than a multiple of
        `multiple`: together with the n - 1 windows that follow, few lengths of sequences.
        """
        frame, key = partial(self.tokenizer.frame, pixels=pixels), (*grid, pixels)
        if key not in self._frames:
            framed = frame([-1], *grid)
            self._frames[key] = framed[: framed.index(-1)], framed[framed.index(-1) + 1 :]
        before, after = self._frames[key]
        start = self.start[captions]
        counts = np.where(captions < 0, 0, self.start[captions + 1] - start)
        empty = counts == 0
        longest = len(frame([], *grid))
        if not empty.all():
            longest = max(longest, len(before) + int(counts.max()) + len(after))
        negative = frame([], *grid, longest)
        width = 1 - (1 - longest) // multiple * multiple
        text = np.full((len(captions), width), self.tokenizer.pad, dtype=np.int32)
        first = width - len(after) - counts  # the column of each caption's first id
        place = np.arange(width) - first[:, None]
        inside = (place >= 0) & (place < counts[:, None])
        text[inside] = self.ids[(start[:, None] + place)[inside]]
        text[:, width - len(after) :] = after
        for column, token in enumerate(before, -len(before)):
            text[np.arange(len(text)), first + column] = token
        text[empty] = [self.tokenizer.pad] * (width - len(negative)) + negative
        padding = np.where(empty, width - len(negative), first - len(before))
        return torch.from_numpy(text), torch.from_numpy(padding)


def _chunks(pictures: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    pictures = iter(pictures)
    while chunk := list(islice(pictures, CHUNK)):
        yield chunk
