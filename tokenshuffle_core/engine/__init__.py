"""Makes decoding faster on the device it runs on, without changing the pictures.

`prepare` swaps layers of a plain model for faster equivalents, and `release` restores the plain
model. On a CPU the equivalents are in cpu_linear.py and cpu_transformer.py. `pace` says how many
windows a step samples (pace.py), and under CUDA, `steps` are CUDA graphs (cuda_graphs.py).
"""

from collections.abc import Iterator
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from . import cuda_graphs
from .cpu_linear import CpuLinear
from .cpu_transformer import CpuTransformer
from .cuda_graphs import steps
from .pace import FINISHED, Pace
from .quantize import QuantizedLinear, kind_of

if TYPE_CHECKING:
    from ..model import TokenShuffleModel
    from ..sampler import Shape

__all__ = ["Pace", "pace", "packed_nbytes", "prepare", "release", "steps"]

LOCK = RLock()  # two threads may draw with one model
ROWS = 64  # the most of a step
PACES: "WeakKeyDictionary[nn.Module, dict[tuple, Pace]]" = WeakKeyDictionary()
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
        PACES.pop(model, None)
        cuda_graphs.drop(model)


def packed_nbytes(model: nn.Module) -> int:
    """Bytes that the engine holds for `model` in addition to the weights."""
    packed = sum(product.nbytes for _, layer in _swapped(model) for product in layer.products)
    return packed + cuda_graphs.kept_nbytes(model)


def pace(model: "TokenShuffleModel", shape: "Shape") -> Pace:
    """How many windows the steps of pictures of this shape should sample; see `sampler.sample`.

    Kept for the next picture, so that times are taken once. A batch advances by the fewest correct
    guesses of its pictures, so it gains little. With activations rounded to 8 bits, the last bits
    of floats, which vary with the number of rows, would change pictures.
    """
    if shape.batch > 1 or kind_of(model):
        return Pace(1)
    if shape.device.type == "cuda":
        return Pace(8)
    with LOCK:
        known = PACES.setdefault(model, {})
        counts = [count for count in FINISHED if count * shape.rows <= ROWS]
        return known.setdefault((shape.device, shape.rows, shape.window), Pace(*counts))


def _swapped(model: nn.Module) -> Iterator[tuple[str, CpuLinear | CpuTransformer]]:
    for name, layer in model.named_modules():
        if isinstance(layer, (CpuLinear, CpuTransformer)):
            yield name, layer
