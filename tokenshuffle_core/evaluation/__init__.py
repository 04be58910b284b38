"""Scores of a model, each with its interval."""

from . import compositional, loss, prompts, reconstruction, retrieval, understanding

__all__ = ["compositional", "loss", "prompts", "reconstruction", "retrieval", "understanding"]
