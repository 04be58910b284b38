"""A tiny checkpoint with random weights, and a tiny data set made from hand-written sources."""

import os
from dataclasses import replace
from pathlib import Path

# One thread for each worker of pytest-xdist, and for what it starts: more wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from tests.support.emoji_sources import SUBJECTS, write_sources
from tests.support.models import LOOP, TINY, random_checkpoint
from tokenshuffle_core import checkpoints
from tokenshuffle_core.data.emoji import build as emoji
from tokenshuffle_core.data.emoji import folder
from tokenshuffle_core.data.extraction import extract
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.training.tokenizer import train_tokenizer


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    random_checkpoint().save(path)
    return path


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    parts = vars(random_checkpoint())
    parts["model"].eval()
    return Pipeline(**parts)


@pytest.fixture(scope="session")
def elastic(pipeline) -> Pipeline:
    """Windows 1, 2 and 4, the codes of each one after another."""
    config = replace(
        pipeline.config, model=replace(pipeline.config.model, windows=(2, 1, 4), window_head=16)
    )
    torch.manual_seed(1)
    model = TokenShuffleModel(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return Pipeline(**{**vars(pipeline), "config": config, "model": model.eval()})


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A built data set of nine 32 px pictures, one of them held out."""
    directory = tmp_path_factory.mktemp("data")
    write_sources(directory)
    subjects = directory / "subjects.txt"
    subjects.write_text("".join(f"{code} {names[0]}\n" for code, names in SUBJECTS.items()))
    emoji.build(directory, size=32, subjects=str(subjects), held_out=0.1)
    return directory


@pytest.fixture(scope="session")
def composed(data) -> Path:
    return folder.build(data, 24).parent


@pytest.fixture(scope="session")
def image_tokenizer(composed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "run"
    return train_tokenizer(composed, directory, TINY.image_tokenizer, LOOP, crop=16, side=32)


@pytest.fixture(scope="session")
def codes(composed, image_tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("codes")
    extract(composed, directory, checkpoints.load_image_tokenizer(image_tokenizer), [(32, 32)])
    return directory
