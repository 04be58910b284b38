"""The core of ComfyUI-TokenShuffle: the method, its training and its command line."""

__version__ = "0.2.0"
