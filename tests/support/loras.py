"""LoRA files to test with."""

from pathlib import Path

import torch

from tokenshuffle_core.adapt.lora import add_lora, save_lora
from tokenshuffle_core.pipeline import load


def write_random_lora(path: Path, of: Path) -> None:
    """A LoRA of rank 2 with random weights for the checkpoint `of`; it changes a lot."""
    torch.manual_seed(1)
    model = add_lora(load(of).model, rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(path, model)
