"""Tables of vectors."""

from torch import nn


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws no numbers on the meta device, where there is nothing to hold them
    and drawing imports PyTorch's compiler, which takes seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
