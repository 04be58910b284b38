"""The picture so far, for the user to watch."""

import time

import numpy as np
import torch
from PIL import Image

from ..tokenshuffle_core.pipeline import Pipeline
from ..tokenshuffle_core.sampler import Progress

INTERVAL = 0.4  # seconds between two previews: ComfyUI needs about 10 ms to send one
SHARE = 0.02  # of the sampling time that decoding for previews may take
LAST_SHARE = 0.25  # with the last one, which is what stays on the node
NEUTRAL = 128  # grey level of the rows that are not sampled yet


class Preview:
    """The first picture of the batch: as many of the finished rows decoded as is affordable, those
    below in `colours` (of every code), the rest neutral."""

    def __init__(self, pipeline: Pipeline, colours: np.ndarray, device: torch.device):
        self.pipeline = pipeline
        self.colours = colours
        self.device = device
        self.canvas = None  # uint8 (H, W, 3)
        self.painted = self.decoded = 0  # rows of codes
        self.started = self.shown = time.perf_counter()
        self.spent = self.per_row = 0.0  # seconds of decoding, and for a row of codes

    def __call__(self, step: Progress) -> Image.Image | None:
        """The picture after a finished row of windows, None where there is nothing new to show. The
        last one stays on the node, so it is shown however soon it comes."""
        finished, rest = divmod(step.position, step.columns)
        now = time.perf_counter()
        last = step.position == step.positions and self.canvas is not None
        if not last and (rest or now - self.shown < INTERVAL):
            return None
        self.shown = now
        codes, rows = step.codes[:1], finished * step.window
        stride = self.pipeline.config.image_tokenizer.stride
        if self.canvas is None:
            shape = (codes.shape[1] * stride, codes.shape[2] * stride, 3)
            self.canvas = np.full(shape, NEUTRAL, dtype=np.uint8)
        fresh = self.colours[codes[0, self.painted : rows].cpu().numpy()]
        self.canvas[self.painted * stride : rows * stride] = fresh.repeat(stride, 0).repeat(
            stride, 1
        )
        self.painted = rows
        first = max(0, self.decoded - step.window)  # a row above, because neighbours blend
        affordable = (LAST_SHARE if last else SHARE) * (now - self.started) - self.spent
        # The first decoding finds out what a row costs.
        count = int(affordable / self.per_row) if self.per_row else step.window
        end = min(rows, first + count)
        if end > self.decoded:
            image = self.pipeline.decode(codes[:, first:end], True, self.device)[0]
            self.canvas[first * stride : end * stride] = (image * 255).byte().numpy()
            self.decoded = end
            cost = time.perf_counter() - now
            self.spent += cost
            self.per_row = cost / (end - first)
        return Image.fromarray(self.canvas.copy())


@torch.inference_mode()
def rough_colours(pipeline: Pipeline, device: torch.device) -> np.ndarray:
    """The colour of every code, uint8 (codebook_size, 3), as far as it is a linear function of
    the code's vector: fitted to a small picture with areas of one code each."""
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
    return ((affine @ fit).clamp(0, 1) * 255).byte().numpy()
