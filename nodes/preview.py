"""The picture so far, for the user to watch."""

import time

import numpy as np
import torch
from PIL import Image

from ..tokenshuffle_core.pipeline import Pipeline
from ..tokenshuffle_core.sampler import Progress

SHARE = 0.05  # of the sampling time that all previews together may take
NEUTRAL = 128  # grey level of the rows that are not sampled yet


class Preview:
    """Decodes the finished rows of the first picture whenever the time it takes is affordable."""

    def __init__(self, pipeline: Pipeline, device: torch.device):
        self.pipeline = pipeline
        self.device = device
        self.started = time.perf_counter()
        self.spent = 0.0  # seconds on previews
        self.per_row = 0.0  # seconds, as the latest preview took

    def __call__(self, step: Progress) -> Image.Image | None:
        _, height, width = step.codes.shape
        window = self.pipeline.config.model.window
        rows, rest = divmod(step.position, width // window)
        if rest or not rows or step.position == step.positions:
            return None
        now = time.perf_counter()
        sampling = now - self.started - self.spent
        if self.spent + self.per_row * rows > SHARE * sampling:
            return None
        codes = step.codes[:1, : rows * window]
        image = self.pipeline.decode(codes, tiled=True, device=self.device)[0]
        pixels = (image * 255).to(torch.uint8).numpy()
        cost = time.perf_counter() - now
        self.spent += cost
        self.per_row = cost / rows
        missing = (height - rows * window) * self.pipeline.config.image_tokenizer.stride
        return Image.fromarray(
            np.pad(pixels, ((0, missing), (0, 0), (0, 0)), constant_values=NEUTRAL)
        )
