"""The core of ComfyUI-TokenShuffle, usable without ComfyUI.

from tokenshuffle_core import load

pipeline = load()
images, codes = pipeline.generate("a red apple, 3d style")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints import convert
    from .config import GenerationConfig
    from .pipeline import Pipeline, load

__version__ = "0.2.0"
__all__ = ["GenerationConfig", "Pipeline", "convert", "load"]


def __getattr__(name: str):
    """The names of `__all__`, imported on first use: `tokenshuffle --help` needs no torch."""
    homes = {"GenerationConfig": "config", "convert": "checkpoints"}
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{homes.get(name, 'pipeline')}", __name__), name)
