"""Scores of a model, each with its interval."""

from . import compositional, loss, prompts, reconstruction, retrieval

__all__ = ["compositional", "loss", "prompts", "reconstruction", "retrieval"]
