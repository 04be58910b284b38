"""Linear layers whose weights take one byte: int8, or float8 as recent GPUs multiply it.

Each row of a weight has a scale of its own, the largest of its magnitudes over the largest number
of the kind, and so has each row that comes in where the kernel wants that in one byte as well. The
kernels are PyTorch's. Where there is none for a device, the weights are expanded on each use, which
saves memory but no time.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WEIGHT_KINDS

KINDS = dict(zip(WEIGHT_KINDS, (torch.int8, torch.float8_e4m3fn), strict=True))
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class QuantizedLinear(nn.Module):
    """A linear layer: `weight` (out, in) times `scale` (out, 1) float32, and a whole bias."""

    def __init__(self, columns: int, rows: int, dtype: torch.dtype, bias: bool = False):
        super().__init__()
        self.weight = _fixed(torch.empty(rows, columns, dtype=dtype))
        self.scale = _fixed(torch.empty(rows, 1, dtype=torch.float32))
        self.register_parameter("bias", _fixed(torch.empty(rows)) if bias else None)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> "QuantizedLinear":
        made = cls(*layer.weight.shape[::-1], dtype, layer.bias is not None)
        weight, scale = quantized(layer.weight.detach().float(), dtype)
        made.weight, made.scale = _fixed(weight), _fixed(scale)
        if layer.bias is not None:
            made.bias = _fixed(layer.bias.detach())
        return made

    def forward(self, x: Tensor) -> Tensor:
        fp8 = self._multiplies_fp8(x.device)
        y = self._scaled(x) if fp8 else multiply([self], x)
        return y if self.bias is None else y + self.bias

    def _scaled(self, x: Tensor) -> Tensor:
        rows, scale = quantized(x.flatten(0, -2).float(), self.weight.dtype)
        y = torch._scaled_mm(rows, self.weight.T, scale, self.scale.T, out_dtype=torch.bfloat16)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _multiplies_fp8(self, device: torch.device) -> bool:
        fits = self.weight.dtype == torch.float8_e4m3fn and not any(
            side % 16 for side in self.weight.shape
        )
        return fits and device.type == "cuda" and _device_multiplies_fp8(device)


@cache
def _device_multiplies_fp8(device: torch.device) -> bool:
    """Asked by doing it: which cards can depends on PyTorch's version and on the system."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    layer = QuantizedLinear.of(nn.Linear(32, 32, False, device), torch.float8_e4m3fn)
    try:
        layer._scaled(torch.ones(2, 32, device=device, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


def multiply(layers: Sequence[QuantizedLinear], x: Tensor, packed=None) -> Tensor:
    """x (..., in) -> what each of these layers makes of it, side by side (..., sum of out).

    `packed` is what `pack` returned for the layers; without it they are packed for this one use.
    """
    if x.device.type != "cpu" or layers[0].weight.dtype != torch.int8:
        # Scaled before the multiplication: without, float16 would overflow.
        y = [F.linear(x, layer.weight.to(x.dtype) * layer.scale.to(x.dtype)) for layer in layers]
        return y[0] if len(y) == 1 else torch.cat(y, dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    largest = torch.linalg.vector_norm(rows, torch.inf, -1, True).clamp_min_(1e-12).float()
    # The kernel finds one scale for all rows, from the least and the greatest number: with those
    # two in a row behind them, it is that of each row whatever the others are.
    rows = torch.cat([rows / largest, _ends(rows.shape[1])])
    packed = pack(layers) if packed is None else packed
    y = torch.ops.quantized.linear_dynamic(rows, packed, not VNNI)[:-1]
    return (y * largest).to(x.dtype).view(*x.shape[:-1], -1)


def pack(layers: Sequence[QuantizedLinear]):
    """The int8 weights of the layers in the form that the CPU's kernel reads; None for others."""
    if layers[0].weight.dtype != torch.int8:
        return None
    weight = torch.cat([layer.weight for layer in layers])
    scale = torch.cat([layer.scale for layer in layers]).flatten().double()
    with warnings.catch_warnings():  # newer PyTorch means to move these kernels elsewhere
        warnings.filterwarnings("ignore", message=".*quantized tensor creation")
        weight = torch._make_per_channel_quantized_tensor(
            weight, scale, torch.zeros(len(scale), dtype=torch.int64), 0
        )
    return torch.ops.quantized.linear_prepack(weight, None)


@cache
def _ends(columns: int) -> Tensor:
    """(1, columns) float32 with -1 and 1."""
    with torch.inference_mode(False):
        ends = torch.zeros(1, columns)
    ends[0, 0], ends[0, -1] = -1, 1
    return ends


def _fixed(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


# Without these instructions sums of products of two whole bytes may overflow.
VNNI = getattr(torch.cpu, "_is_vnni_supported", bool)()


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float32 (rows, columns) -> the nearest numbers of `dtype`, and their scales (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST[dtype]
    x = x / scale
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Replace all linear layers of `model` by those with one byte a weight, in place; `kind` is one
    of KINDS. Raises ValueError for another, and where they are of another kind already."""
    if kind not in KINDS:
        raise ValueError(f"weights must be one of {', '.join(KINDS)}, not {kind!r}")
    if (found := kind_of(model)) not in (None, kind):
        raise ValueError(f"the model's weights are {found} already, not to be made {kind}")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in layers:
        model.set_submodule(name, QuantizedLinear.of(model.get_submodule(name), KINDS[kind]))
    return model


def kind_of(model: nn.Module) -> str | None:
    """The kind that `quantize` has made of the model, None where it has not."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return next((kind for kind, dtype in KINDS.items() if dtype in dtypes), None)


def check_whole(model: nn.Module) -> None:
    """Raises ValueError for a quantised model: only whole weights can be changed."""
    if kind := kind_of(model):
        raise ValueError(f"the model's weights are {kind}: only whole ones can be changed")


def quantized_names(model: nn.Module) -> dict[str, torch.dtype]:
    """The names of what must keep its dtype -> that dtype."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return {
        name: dtypes[name]
        for weight, dtype in dtypes.items()
        if dtype in KINDS.values()
        for name in (weight, f"{weight.removesuffix('weight')}scale")
    }
