"""Noise for sampling with the Gumbel-max trick."""

import torch
from torch import Tensor

# Numbers of noise that are drawn at once: on a CPU they fit its cache. On a GPU the same seed draws
# other numbers when it draws another number of them.
AT_ONCE = {"cuda": 2**22, "cpu": 2**18}


class GumbelNoise:
    """Noise of the Gumbel-max trick for the windows of a batch of pictures, (B, n, s * s, V)
    float32; row i comes from generators[i] alone. Windows are drawn in order, many at a time, over
    those that are no longer needed: there is room for `room` windows from any one on.

    -log(-log1p(-u)) of a uniform u in float64 matches `exponential_` on some CPUs, but is identical
    on all of them, and faster.
    """

    def __init__(self, batch: int, shape: tuple[int, int], room: int, device: torch.device):
        self.chunk = max(1, AT_ONCE.get(device.type, AT_ONCE["cpu"]) // (shape[0] * shape[1]))
        chunks = -(-(room + self.chunk) // self.chunk)
        self.memory = torch.empty(batch, chunks * self.chunk, *shape, device=device)

    def start(self, generators: list[torch.Generator]) -> None:
        self.generators, self.drawn = generators, 0

    def draw(self, windows: int) -> None:
        """Draw until there is noise for so many windows from the first one on."""
        while self.drawn < windows:
            first = self.drawn % self.memory.shape[1]
            for row, generator in zip(self.memory, self.generators, strict=True):
                part = row[first : first + self.chunk]  # one picture at a time saves memory
                part.copy_(draw_gumbel(tuple(part.shape), [generator])[0])
            self.drawn += self.chunk

    def at(self, index: Tensor) -> Tensor:
        """The noise of the windows `index` (n,)."""
        return self.memory.index_select(1, index % self.memory.shape[1])


def draw_gumbel(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Gumbel noise (len(generators), *shape) float32; row i draws from generators[i] alone."""
    exact = generators[0].device.type in ("cpu", "cuda")
    dtype = torch.float64 if exact else torch.float32
    uniform = [
        torch.empty(shape, dtype=dtype, device=generator.device).uniform_(generator=generator)
        for generator in generators
    ]
    exponential = torch.stack(uniform).neg_().log1p_().neg_().float()
    # An infinite value would be nan for a code that is filtered out.
    return exponential.clamp_min_(2**-25).log_().neg_()
