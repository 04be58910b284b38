"""The emoji data set, and pictures composed from it."""

from . import build, captions, compose, folder

__all__ = ["build", "captions", "compose", "folder"]
