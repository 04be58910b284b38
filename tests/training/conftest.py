"""The tiny data set composed, an image tokenizer trained on it, and its codes."""

from pathlib import Path

import pytest
import torch

from tokenshuffle_core import checkpoint
from tokenshuffle_core.config import PRESETS
from tokenshuffle_core.training import compose
from tokenshuffle_core.training.loop import LoopConfig
from tokenshuffle_core.training.shards import extract
from tokenshuffle_core.training.train_tokenizer import train_tokenizer

TINY = PRESETS["tiny"]
LOOP = LoopConfig(
    steps=100, batch=4, learning_rate=5e-3, warmup=5, validate_every=100, save_minutes=1e9
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The modules are so small that threads would wait for one another, most of all on busy cores;
    and a killed process and this one compute the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def composed(data) -> Path:
    return compose.build(data, 24).parent


@pytest.fixture(scope="session")
def image_tokenizer(composed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "run"
    return train_tokenizer(composed, directory, TINY.image_tokenizer, LOOP, crop=16, side=32)


@pytest.fixture(scope="session")
def codes(composed, image_tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("codes")
    extract(composed, directory, checkpoint.load_image_tokenizer(image_tokenizer), [(32, 32)])
    return directory
