"""Makes decoding faster on the device it runs on, without changing the pictures.

`prepare` swaps layers of a plain model for faster equivalents, and `release` restores the plain
model. On a CPU the equivalents are in cpu_linear.py and cpu_transformer.py, on a GPU in
gpu_layers.py. `pace` says how many windows a step samples (pace.py), and under CUDA, `steps` are
CUDA graphs (cuda_graphs.py). On a CPU, `threads` are those that small work runs on (threads.py).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .cpu_linear import CpuLinear
from .cpu_transformer import CpuTransformer
from .cuda_graphs import KEPT, addresses, kept_nbytes, on_current_gpu, steps
from .pace import FINISHED, Pace
from .quantize import CastLinear, QuantizedLinear, rounds_activations
from .swapped import Swapped
from .threads import Threads

if TYPE_CHECKING:
    from ..model import TokenShuffleModel
    from ..sampler import Shape

log = logging.getLogger(__name__)

__all__ = ["Pace", "pace", "packed_nbytes", "prepare", "release", "steps", "threads"]

LAYERS = {"cpu": (CpuLinear, CpuTransformer)}  # for a linear layer and for the transformer
LOCK = RLock()  # two threads may draw with one model
ROWS = 64  # the most of a step
SMALL = 2 * 10**9  # multiplications of work that takes one thread well below a tenth of a second
THREADS = Threads()  # one for all work: how busy the machine is does not depend on it
# What is known of a model until `release`: the device and the addresses of the weights that it is
# prepared for, and how many windows its steps sample.
PREPARED: "WeakKeyDictionary[nn.Module, tuple]" = WeakKeyDictionary()
PACES: "WeakKeyDictionary[nn.Module, dict[tuple, Pace]]" = WeakKeyDictionary()
# Exactly these classes: a subclass may be one that a host or a training has put in.
PLAIN = (nn.Linear, CastLinear, QuantizedLinear)


def prepare(model: "TokenShuffleModel", device: torch.device) -> None:
    """Swap layers of `model` for those that decode fastest on `device`, and pack their weights.

    Parameters and their names stay the same. Does nothing if that is already done and no weight has
    changed since; a change in place under inference mode is not detected: call `release` after it.
    """
    with LOCK:
        state = device, addresses(model)
        if PREPARED.get(model) == state and all(layer.is_current() for _, layer in _swapped(model)):
            return
        release(model)
        # Triton launches on the current device alone.
        kinds = LAYERS.get(device.type) or (on_current_gpu(device) and _gpu_layers(device))
        if kinds:
            _swap(model, device, *kinds)
        PREPARED[model] = state


@cache
def _gpu_layers(device: torch.device) -> tuple[type, type] | None:
    """The layers with Triton's kernels where these work. Determined by trying: it depends on the
    GPU, on the versions of Triton and PyTorch and, where a compiler is needed, on the system."""
    if not find_spec("triton"):
        return None
    try:
        from .gpu_layers import GpuLinear, GpuTransformer, check

        check(device)
    except Exception as error:  # any, since Triton's have no common type: there is another way
        log.warning("continuing without Triton's kernels: %s", str(error).split("\n")[0])
        return None
    log.info("using Triton's kernels, which the first picture of a model compiles")
    return GpuLinear, GpuTransformer


def _swap(
    model: "TokenShuffleModel",
    device: torch.device,
    linear_kind: type[Swapped],
    transformer_kind: type[Swapped],
) -> None:
    linear = [(name, layer) for name, layer in model.named_modules() if type(layer) in PLAIN]
    blocks = model.transformer.blocks
    inside = [layer for b in blocks for layer in (*b.attention.children(), *b.mlp.children())]
    plain = all(type(layer) in (*PLAIN, nn.RMSNorm) for layer in inside)
    if plain and transformer_kind.takes(model.transformer, device):
        model.transformer = transformer_kind(model.transformer)
        linear = [(name, layer) for name, layer in linear if not name.startswith("transformer.")]
    for name, layer in linear:
        if linear_kind.takes(layer, device):
            model.set_submodule(name, linear_kind(layer))


def release(model: nn.Module) -> None:
    """Restore the plain layers of `model` and free what `prepare` packed."""
    with LOCK:
        for name, layer in list(_swapped(model)):
            model.set_submodule(name, layer.plain[0].train(layer.training))
        for kept in (PREPARED, PACES, KEPT):
            kept.pop(model, None)


def packed_nbytes(model: nn.Module) -> int:
    """Bytes that the engine holds for `model` in addition to the weights."""
    packed = sum(product.nbytes for _, layer in _swapped(model) for product in layer.products)
    return packed + kept_nbytes(model)


def pace(model: "TokenShuffleModel", shape: "Shape") -> Pace:
    """How many windows the steps of pictures of this shape should sample; see `sampler.sample`.

    Kept for the next picture, so that times are taken once. A batch advances by the fewest correct
    guesses of its pictures, so it gains little. With activations rounded to 8 bits, the last bits
    of floats, which vary with the number of rows, would change pictures.
    """
    if shape.batch > 1 or rounds_activations(model, shape.device):
        return Pace(1)
    if shape.device.type == "cuda" and not isinstance(model.transformer, Swapped):
        return Pace(8)  # a fixed number, since in 16 bits another one may change pictures
    with LOCK:
        known = PACES.setdefault(model, {})
        counts = [n for n in FINISHED if n == 1 or shape.tokens(n) * shape.rows <= ROWS]
        return known.setdefault((shape.device, shape.rows, shape.window), Pace(*counts))


def threads(module: nn.Module, device: torch.device) -> Callable[[int], AbstractContextManager]:
    """For so many rows of `module`: a context in which torch has the threads that suit them. On a
    CPU, small work runs on one or on all, whichever took less time lately."""
    if device.type != "cpu":
        return nullcontext
    parameters = sum(weight.numel() for weight in module.parameters())

    def threads_for(rows: int) -> AbstractContextManager:
        small = parameters * rows <= SMALL
        return THREADS.chosen((type(module), parameters, rows)) if small else nullcontext()

    return threads_for


def _swapped(model: nn.Module) -> Iterator[tuple[str, Swapped]]:
    for name, layer in model.named_modules():
        if isinstance(layer, Swapped):
            yield name, layer
