"""Training of the model and of the image tokenizer, in one process or many."""

from importlib import import_module
from typing import TYPE_CHECKING

from .settings import LoopConfig, Recipe, Stage

if TYPE_CHECKING:
    from .model import train_model
    from .stages import train_stages
    from .tokenizer import train_tokenizer

__all__ = ["LoopConfig", "Recipe", "Stage", "train_model", "train_stages", "train_tokenizer"]


def __getattr__(name: str):
    """What trains, imported on first use: `tokenshuffle train --help` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{name.removeprefix('train_')}", __name__), name)
