"""The engine beside the plain loop: what makes its steps faster where they run, and no picture
another one."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..transformer import KVCache
from .cpu_transformer import FewRows
from .cuda_graphs import capture
from .quantize import kind_of

if TYPE_CHECKING:
    from ..model import TokenShuffleModel

Sample = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (states, noise, scale) -> codes
Step = Callable[[Tensor], Tensor]  # codes -> states


def windows_ahead(model: "TokenShuffleModel", device: torch.device, batch: int) -> int:
    """How many windows a step should sample (see `sampler.decode`).

    Where reading the weights takes all the time, more rows cost next to nothing: on a GPU, and on a
    CPU with a model so small that its operations take longer than their memory. A batch goes on
    with the fewest right guesses of its pictures, so it gains little. Where activations are rounded
    to a byte, the last bits of floats, which depend on how many rows there are, change pictures.
    """
    if batch > 1 or kind_of(model):
        return 1
    if device.type == "cuda":
        return 8
    small = sum(tensor.nbytes for tensor in model.state_dict().values()) < 2**26
    return 12 if device.type == "cpu" and small else 1


def accelerated(
    model: "TokenShuffleModel",
    cache: KVCache,
    window: int,
    ahead: int,
    sample: Sample,
    transformer: FewRows | None,
) -> tuple[Sample, Step, KVCache]:
    """The two halves of a step of `sampler.decode`, `sample` and `model.step`, and the cache that
    they share: as CUDA graphs, or as they are with this transformer.
    """
    if captured := capture(model, cache, window, ahead, sample):
        return captured
    return sample, partial(model.step, cache, window=window, transformer=transformer), cache
