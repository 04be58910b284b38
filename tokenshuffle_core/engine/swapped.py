"""What the engine's layers have in common."""

import torch
from torch import nn


class Swapped(nn.Module):
    """Takes the place of the layer `plain`, with its parameters and submodules, and computes the
    same faster where it can. The rest goes to `plain`."""

    products = ()  # packed weights; see `cpu_linear.Product`

    def __init__(self, plain: nn.Module):
        super().__init__()
        # The same dicts, so that both always agree.
        self._parameters, self._modules = plain._parameters, plain._modules
        self.plain = (plain,)  # in a tuple, so that it does not become a submodule

    @classmethod
    def takes(cls, plain: nn.Module, device: torch.device) -> bool:
        """Whether it can take the place of a layer that will run on `device`."""
        return True

    def stops_at_length(self, tokens: int) -> bool:
        """Whether a transformer, with so many tokens in all rows of a step, reads no more of a
        `StaticCache` than is filled."""
        return False

    def is_current(self) -> bool:
        """Whether it still computes the same as `plain`, whose weights may have changed."""
        return True
