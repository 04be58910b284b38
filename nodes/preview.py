"""The picture so far, for the user to watch."""

import time

import numpy as np
import torch
from PIL import Image

from ..tokenshuffle_core.pipeline import Pipeline
from ..tokenshuffle_core.sampler import Progress

INTERVAL = 0.4  # seconds between two previews: ComfyUI needs about 10 ms to send one
SHARE = 0.02  # of the sampling time that decoding for previews may take, without the last one
NEUTRAL = 128  # grey level of the rows that are not sampled yet


class Colours:
    """The mean colour of each code's square of pixels, as far as pictures have shown it. At first
    it is a guess, a linear function of the code's vector."""

    def __init__(self, pipeline: Pipeline, device: torch.device):
        self.mean = _guess(pipeline, device)  # float64 (codebook_size, 3) in 0..1
        self.seen = np.zeros(len(self.mean), np.int64)  # squares, of each code

    def learn(self, codes: np.ndarray, image: np.ndarray) -> None:
        """From codes (h, w) and their picture (H, W, 3) in 0..1."""
        (rows, columns), (height, width, _) = codes.shape, image.shape
        squares = image.reshape(rows, height // rows, columns, width // columns, 3).mean((1, 3))
        found = np.bincount(codes.ravel(), minlength=len(self.seen))
        total = np.zeros_like(self.mean)
        np.add.at(total, codes.ravel(), squares.reshape(-1, 3))
        known, self.seen = self.seen, self.seen + found
        new = found > 0
        self.mean[new] = ((self.mean * known[:, None] + total)[new]) / self.seen[new, None]

    def of(self, codes: np.ndarray, side: int) -> np.ndarray:
        """Codes (h, w) -> squares of `side` pixels, uint8 (h * side, w * side, 3)."""
        return _pixels(self.mean[codes]).repeat(side, 0).repeat(side, 1)


class Preview:
    """The first picture of the batch. While it is sampled, as many of the finished rows decoded as
    is affordable, those below in `colours`, the rest neutral; at the end, the finished picture."""

    def __init__(self, pipeline: Pipeline, colours: Colours, device: torch.device):
        self.pipeline = pipeline
        self.colours = colours
        self.device = device
        self.stride = pipeline.config.image_tokenizer.stride
        self.canvas = None  # uint8 (H, W, 3)
        self.painted = self.decoded = 0  # rows of codes
        self.started = self.shown = time.perf_counter()
        self.spent = self.per_row = 0.0  # seconds of decoding, and for a row of codes

    def __call__(self, step: Progress) -> Image.Image | None:
        """The picture after a finished row of windows, None where there is nothing new to show. The
        first one takes the place of an earlier picture's on the node, the last one stays there, so
        both are shown however soon they come."""
        finished, rest = divmod(step.position, step.columns)
        now = time.perf_counter()
        first, last = self.canvas is None, step.position == step.positions
        if not (first or last or (not rest and now - self.shown >= INTERVAL)):
            return None
        self.shown = now
        codes = step.codes[:1]
        if first:
            shape = (codes.shape[1] * self.stride, codes.shape[2] * self.stride, 3)
            self.canvas = np.full(shape, NEUTRAL, dtype=np.uint8)
        if last:
            self._decode(codes, 0, codes.shape[1])
        else:
            self._paint(codes, finished * step.window)
            self._decode_affordable(codes, step.window, now)
        return Image.fromarray(self.canvas.copy())

    def _paint(self, codes: torch.Tensor, rows: int) -> None:
        fresh = codes[0, self.painted : rows].cpu().numpy()
        part = slice(self.painted * self.stride, rows * self.stride)
        self.canvas[part] = self.colours.of(fresh, self.stride)
        self.painted = rows

    def _decode_affordable(self, codes: torch.Tensor, window: int, now: float) -> None:
        first = max(0, self.decoded - window)  # a row above, because neighbours blend
        affordable = SHARE * (now - self.started) - self.spent
        # The first decoding finds out what a row costs.
        count = int(affordable / self.per_row) if self.per_row else window
        end = min(self.painted, first + count)
        if end > self.decoded:
            self._decode(codes, first, end)
            self.decoded = end
            cost = time.perf_counter() - now
            self.spent += cost
            self.per_row = cost / (end - first)

    def _decode(self, codes: torch.Tensor, first: int, end: int) -> None:
        part = codes[:, first:end]
        image = self.pipeline.decode(part, True, self.device)[0].numpy()
        self.colours.learn(part[0].cpu().numpy(), image)
        self.canvas[first * self.stride : end * self.stride] = _pixels(image)


def _pixels(image: np.ndarray) -> np.ndarray:
    return (image * 255).round().astype(np.uint8)


@torch.inference_mode()
def _guess(pipeline: Pipeline, device: torch.device) -> np.ndarray:
    """The colour of every code (codebook_size, 3), as far as it is a linear function of the code's
    vector: fitted to a small picture with areas of one code each."""
    area, side = 4, 4  # codes along the side of an area, areas along the side of the picture
    quantizer = pipeline.image_tokenizer.quantizer
    every = torch.arange(pipeline.config.model.codebook_size, device=device)
    vectors = quantizer.vectors(every[None, None])[0, :, 0].T.float().cpu()
    affine = torch.cat([vectors, torch.ones(len(vectors), 1)], 1)
    chosen = torch.linspace(0, len(every) - 1, side**2).long()
    codes = chosen.view(1, side, side).repeat_interleave(area, 1).repeat_interleave(area, 2)
    image = pipeline.decode(codes, device=device)
    pixels = area * pipeline.config.image_tokenizer.stride
    seen = image[0].unflatten(0, (side, pixels)).unflatten(2, (side, pixels)).mean((1, 3))
    fit = torch.linalg.lstsq(affine[chosen], seen.flatten(0, 1), driver="gelsd").solution
    return (affine @ fit).clamp(0, 1).double().numpy()
