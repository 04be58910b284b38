"""Data sets to train on and to score with: pictures with captions, and their codes."""

from .extraction import extract
from .shards import CodeShards
from .sources import Item, read_items

__all__ = ["CodeShards", "Item", "extract", "read_items"]
