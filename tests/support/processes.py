"""Trains a tiny model on random codes, in this process or in those that torchrun starts:

    torchrun --nproc-per-node 2 -m tests.support.processes RUNS.json

RUNS.json is a list of the arguments of `train`.
"""

import csv
import json
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.shuffle import shuffle
from tokenshuffle_core.training import schedule
from tokenshuffle_core.training.distributed import process_group, rank, world_size
from tokenshuffle_core.training.loop import Task, fit, generator
from tokenshuffle_core.training.settings import LoopConfig

WINDOWS = (2, 1)
TINY = replace(PRESETS["tiny"].model, windows=WINDOWS)
SPEEDS = ("samples_per_second", "codes_per_second", "mfu")


class CodesTask(Task):
    """Repeats four batches, with each window in every other step, so that its parameters are idle
    in between. In step `stop_at` only the last process gets Ctrl-C."""

    idle_parameters = True

    def __init__(self, batch: int, stop_at: int | None = None):
        super().__init__()
        self.batch = batch
        self.stop_at = stop_at

    def loss(self, module, step, piece, pieces):
        if step == self.stop_at and rank() == world_size() - 1:
            signal.raise_signal(signal.SIGINT)
        random = generator(1, step % 4)
        whole = (
            torch.randint(0, TINY.text_vocabulary, (self.batch, 5), generator=random),
            torch.randint(0, 4, (self.batch,), generator=random),
            torch.randint(0, TINY.codebook_size, (self.batch, 8, 8), generator=random),
        )
        text, padding, codes = (tensor[piece::pieces] for tensor in whole)
        window = WINDOWS[step % 2]
        logits = module(text, padding, codes, window).codes
        targets = shuffle(codes[..., None], window)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        return loss, {"bits": loss.detach() / math.log(2)}

    def codes_per_sample(self):
        return 64

    def validate(self, module):
        return {"validation_loss": self.loss(module, 1, 0, 1)[0].item()}

    def sheet(self, module):
        return Image.new("RGB", (2, 2))

    def save(self, module, path):
        save_file(module.state_dict(), path)


def model() -> TokenShuffleModel:
    torch.manual_seed(0)
    module = TokenShuffleModel(TINY)
    module.initialise()
    return module


def train(
    directory, resume=False, stop_at=None, freeze=False, fast_clock=False, **config
) -> TokenShuffleModel:
    """Returns the module after the last step; `freeze` freezes its first half. A `fast_clock` runs
    ten times as fast in all processes but the first."""
    config = LoopConfig(**CONFIG | config)
    module = model()
    if fast_clock and rank():
        schedule.time = SimpleNamespace(monotonic=lambda: 10 * time.monotonic())
    if freeze:
        for part in (module.code_embedding, module.shuffle, module.transformer.blocks[0]):
            part.requires_grad_(False)
    try:
        fit(module, CodesTask(config.batch, stop_at), config, Path(directory), resume)
    except KeyboardInterrupt:
        assert stop_at is not None
    return module


CONFIG = {
    "steps": 12, "batch": 8, "learning_rate": 3e-3, "warmup": 3, "clip": 0.5, "ema": 0.8,
    "validate_every": 4, "save_minutes": 1e9,
}  # fmt: skip


def log_of(directory) -> list[tuple[int, str, float]]:
    """The rows of log.csv without the speeds, which differ each time."""
    with open(Path(directory) / "log.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(step), name, float(value)) for step, name, value in rows if name not in SPEEDS]


def weights_of(directory) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "final.safetensors")


if __name__ == "__main__":
    with process_group(torch.device("cpu")):
        for run in json.loads(Path(sys.argv[1]).read_text()):
            train(**run)
