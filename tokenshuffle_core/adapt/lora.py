"""LoRA (arXiv 2106.09685): low-rank changes to linear layers, stored in their own file.

For each changed layer the file has `LAYER.lora_down.weight` (rank, in), `LAYER.lora_up.weight`
(out, rank) and `LAYER.alpha` (scalar), the names that ComfyUI and most trainers use:
W' = W + strength * alpha / rank * up @ down.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_number
from ..engine import release
from ..engine.quantize import CastLinear, check_whole
from ..files import open_safetensors, write_safetensors

METADATA = "tokenshuffle.lora"
MAX_STRENGTH = 100.0  # of either sign
MAX_CHANGE = 2.0**15  # of one weight: half of what 16 bits hold


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank change, which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        weight = base.weight
        self.down = nn.Parameter(weight.new_empty(rank, base.in_features, dtype=torch.float32))
        self.up = nn.Parameter(weight.new_zeros(base.out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.scale


def add_lora(model: nn.Module, rank: int, alpha: float | None = None) -> nn.Module:
    """Freeze `model` and add a LoRA to each of its linear layers, in place; `alpha` defaults to the
    rank. Raises ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1, not {rank}")
    release(model)
    model.requires_grad_(False)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in layers:
        base = model.get_submodule(name)
        model.set_submodule(name, LoraLinear(base, rank, alpha or float(rank)))
    return model


def save_lora(path: str | Path, model: nn.Module, card: dict[str, str] | None = None) -> None:
    """Write the LoRA of a model prepared by `add_lora`."""
    tensors, ranks = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            rank = len(module.down)
            ranks.add(rank)
            tensors[f"{name}.lora_down.weight"] = module.down
            tensors[f"{name}.lora_up.weight"] = module.up
            tensors[f"{name}.alpha"] = torch.tensor(module.scale * rank)
    metadata = {METADATA: json.dumps({"ranks": sorted(ranks)}), **(card or {})}
    write_safetensors(path, tensors, metadata)


def read_lora(
    path: str | Path, model: nn.Module, strength: float = 1.0
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The changes in a file: layer of `model` -> up (out, rank), down (rank, in), and the scale of
    their product, strength * alpha / rank.

    Raises FileNotFoundError, or ValueError if the file is not a LoRA for a Token-Shuffle model, if
    that model had another shape, if `model` is quantised, or if a change is not finite or too large
    for 16 bits.
    """
    check_number(f"{path}: the strength of a LoRA", strength, -MAX_STRENGTH, MAX_STRENGTH)
    check_whole(model)
    release(model)  # the layers are looked up by their class
    with open_safetensors(path) as file:
        if METADATA not in (file.metadata() or {}):
            raise ValueError(f"{path} is not a LoRA of a Token-Shuffle model")
        names = set(file.keys())
        layers = {name.removesuffix(".lora_up.weight") for name in names if ".lora_up." in name}
        parts = ("lora_up.weight", "lora_down.weight", "alpha")
        expected = {f"{layer}.{part}" for layer in layers for part in parts}
        if names != expected:
            name = min(names ^ expected)
            state = "is missing" if name in expected else "does not belong in a LoRA"
            raise ValueError(f"{path}: {name} {state}")
        changes = {}
        for layer in sorted(layers):
            up, down, alpha = (file.get_tensor(f"{layer}.{part}") for part in parts)
            fit = up.ndim == down.ndim == 2 and up.shape[1] == len(down) and not alpha.ndim
            if not (fit and up.numel() and down.numel()):
                raise ValueError(f"{path}: the shapes of {layer} do not match")
            rank = len(down)
            scale = strength * float(alpha) / rank
            largest = [float(part.float().abs().max()) for part in (up, down)]
            if not all(map(math.isfinite, (*largest, scale))):
                raise ValueError(f"{path}: {layer} holds numbers that are not finite")
            if abs(scale) * rank * math.prod(largest) > MAX_CHANGE:
                raise ValueError(
                    f"{path}: {layer} holds numbers that are too large at the strength {strength:g}"
                )
            changes[layer] = up, down, scale
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for layer, (up, down, _) in changes.items():
        shape = tuple(linear[layer].weight.shape) if layer in linear else None
        if shape != (len(up), down.shape[1]):
            raise ValueError(
                f"{path} changes {layer} of shape {(len(up), down.shape[1])}, which in this model "
                f"{f'has {shape}' if shape else 'does not exist'}: it was trained on another model"
            )
    return changes


@torch.no_grad()
def merge_lora(model: nn.Module, path: str | Path, strength: float = 1.0) -> None:
    """Add the LoRA in `path` to the model's weights, in place. Raises as `read_lora`, with the
    model unchanged."""
    for layer, (up, down, scale) in read_lora(path, model, strength).items():
        linear = model.get_submodule(layer)
        weight = linear.weight
        merged = weight.float() + (scale * (up.float() @ down.float())).to(weight.device)
        if isinstance(linear, CastLinear):  # which would lose by it what 32 bits can tell apart
            linear.weight = nn.Parameter(merged, weight.requires_grad)
        else:
            weight.copy_(merged)
