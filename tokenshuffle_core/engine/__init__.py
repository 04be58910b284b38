"""Makes decoding faster on the device it runs on, without changing the pictures.

`prepare` swaps layers of a plain model for faster equivalents, and `release` restores the plain
model. On a CPU the equivalents are in cpu_linear.py and cpu_transformer.py; under CUDA, `capture`
turns the steps of one picture into CUDA graphs (cuda_graphs.py).
"""

from collections.abc import Iterator
from threading import RLock
from typing import TYPE_CHECKING

import torch
from torch import nn

from .cpu_linear import CpuLinear
from .cpu_transformer import CpuTransformer
from .cuda_graphs import capture
from .quantize import QuantizedLinear, kind_of

if TYPE_CHECKING:
    from ..model import TokenShuffleModel

__all__ = ["capture", "packed_nbytes", "prepare", "release", "windows_ahead"]

LOCK = RLock()  # two threads may draw with one model
# Exactly these classes: a subclass may be one that a host or a training has put in.
PLAIN = (nn.Linear, QuantizedLinear)


def prepare(model: "TokenShuffleModel", device: torch.device) -> None:
    """Swap layers of `model` for those that decode fastest on `device`, and pack their weights.

    Parameters and their names stay the same. Does nothing if that is already done and no weight has
    changed since; a change in place under inference mode is not detected: call `release` after it.
    """
    with LOCK:
        swapped = [layer for _, layer in _swapped(model)]
        if swapped and device.type == "cpu" and all(layer.is_current() for layer in swapped):
            return
        release(model)
        if device.type == "cpu":
            _swap(model)


def _swap(model: "TokenShuffleModel") -> None:
    linear = [(name, layer) for name, layer in model.named_modules() if type(layer) in PLAIN]
    blocks = model.transformer.blocks
    inside = [layer for b in blocks for layer in (*b.attention.children(), *b.mlp.children())]
    plain = all(type(layer) in PLAIN for layer in inside)
    if plain and model.transformer.norm.weight.dtype == torch.float32:
        model.transformer = CpuTransformer(model.transformer)
        linear = [(name, layer) for name, layer in linear if not name.startswith("transformer.")]
    for name, layer in linear:
        model.set_submodule(name, CpuLinear(layer))


def release(model: nn.Module) -> None:
    """Restore the plain layers of `model` and free what `prepare` packed."""
    with LOCK:
        for name, layer in list(_swapped(model)):
            model.set_submodule(name, layer.plain[0].train(layer.training))


def packed_nbytes(model: nn.Module) -> int:
    """Bytes that `prepare` holds in addition to the weights."""
    return sum(product.nbytes for _, layer in _swapped(model) for product in layer.products)


def windows_ahead(model: "TokenShuffleModel", device: torch.device, batch: int) -> int:
    """How many windows a step should sample (see `sampler.sample`).

    Where a step's time does not depend on the number of rows, more rows are nearly free: on a GPU,
    whose time goes into reading the weights, and on a CPU with a model so small that overhead
    dominates. A batch advances by the fewest correct guesses of its pictures, so it gains little.
    With activations rounded to 8 bits, the last bits of floats, which vary with the number of rows,
    would change pictures.
    """
    if batch > 1 or kind_of(model):
        return 1
    if device.type == "cuda":
        return 8
    small = sum(tensor.nbytes for tensor in model.state_dict().values()) < 2**26
    return 12 if device.type == "cpu" and small else 1


def _swapped(model: nn.Module) -> Iterator[tuple[str, CpuLinear | CpuTransformer]]:
    for name, layer in model.named_modules():
        if isinstance(layer, (CpuLinear, CpuTransformer)):
            yield name, layer
