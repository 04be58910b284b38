"""What makes decoding faster where it runs, without changing the pictures.

`prepare` exchanges layers of a plain model for faster forms of the same layers, and `release` gives
the plain model back. On a CPU these forms are in cpu_linear.py and cpu_transformer.py; under CUDA,
`accelerated` turns the steps of one picture into CUDA graphs (cuda_graphs.py).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cpu_linear import CpuLinear
from .cpu_transformer import CpuTransformer
from .cuda_graphs import capture
from .quantize import QuantizedLinear, kind_of

if TYPE_CHECKING:
    from ..model import TokenShuffleModel
    from ..transformer import KVCache

__all__ = ["accelerated", "packed_nbytes", "prepare", "release", "windows_ahead"]

# And no subclass of these, which a host or a training may have put there.
PLAIN = (nn.Linear, QuantizedLinear)

Sample = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (states, noise, scale) -> codes
Step = Callable[[Tensor], Tensor]  # codes -> states


def prepare(model: "TokenShuffleModel", device: torch.device) -> None:
    """Exchange layers of `model` for those that decode fastest on `device`, and pack their weights.

    The parameters and their names stay. Does nothing where that is done and no weight has changed
    since; one that was changed in place under inference mode is not noticed: call `release`.
    """
    exchanged = [layer for _, layer in _exchanged(model)]
    current = all(product.is_current() for layer in exchanged for product in layer.products)
    if exchanged and device.type == "cpu" and current:
        return
    release(model)
    if device.type != "cpu":
        return
    linear = [(name, layer) for name, layer in model.named_modules() if type(layer) in PLAIN]
    blocks = [layer for block in model.transformer.blocks for layer in _linear_layers(block)]
    if model.transformer.norm.weight.dtype == torch.float32 and all(
        type(layer) in PLAIN for layer in blocks
    ):
        model.transformer = CpuTransformer(model.transformer)
        linear = [(name, layer) for name, layer in linear if not name.startswith("transformer.")]
    for name, layer in linear:
        model.set_submodule(name, CpuLinear(layer))


def release(model: nn.Module) -> None:
    """Give `model` its plain layers back and free what `prepare` packed."""
    for name, layer in list(_exchanged(model)):
        model.set_submodule(name, layer.plain[0])


def packed_nbytes(model: nn.Module) -> int:
    """Bytes of what `prepare` holds beside the weights."""
    return sum(product.nbytes for _, layer in _exchanged(model) for product in layer.products)


def windows_ahead(model: "TokenShuffleModel", device: torch.device, batch: int) -> int:
    """How many windows a step should sample (see `sampler.sample`).

    Where reading the weights takes all the time, more rows cost next to nothing: on a GPU, and on a
    CPU with a model so small that its operations take longer than their memory. A batch goes on
    with the fewest right guesses of its pictures, so it gains little. Where activations are rounded
    to 8 bits, the last bits of floats, which depend on how many rows there are, change pictures.
    """
    if batch > 1 or kind_of(model):
        return 1
    if device.type == "cuda":
        return 8
    small = sum(tensor.nbytes for tensor in model.state_dict().values()) < 2**26
    return 12 if device.type == "cpu" and small else 1


def accelerated(
    model: "TokenShuffleModel", cache: "KVCache", window: int, ahead: int, sample: Sample
) -> tuple[Sample, Step, "KVCache"]:
    """The two halves of a step of `sampler.sample`, `sample` and `model.step`, and the cache that
    they share: as CUDA graphs where there is CUDA, else as they are."""
    if captured := capture(model, cache, window, ahead, sample):
        return captured
    return sample, partial(model.step, cache, window=window), cache


def _exchanged(model: nn.Module) -> Iterator[tuple[str, CpuLinear | CpuTransformer]]:
    for name, layer in model.named_modules():
        if isinstance(layer, (CpuLinear, CpuTransformer)):
            yield name, layer


def _linear_layers(block: nn.Module) -> list[nn.Module]:
    return [*block.attention.children(), *block.mlp.children()]
