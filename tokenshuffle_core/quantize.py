"""Linear layers whose weights take one byte: int8, or float8 as recent GPUs multiply it.

Each row of a weight has a scale of its own, the largest of its magnitudes over the largest number
of the kind, and so has each row that comes in where the kernel wants that in one byte as well. The
kernels are PyTorch's. Where there is none for a device, the weights are expanded on each use, which
saves memory but no time.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import WEIGHT_KINDS

KINDS = dict(zip(WEIGHT_KINDS, (torch.int8, torch.float8_e4m3fn), strict=True))
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class QuantizedLinear(nn.Module):
    """A linear layer without a bias: `weight` (out, in) times `scale` (out, 1) float32."""

    def __init__(self, columns: int, rows: int, dtype: torch.dtype):
        super().__init__()
        self.weight = _fixed(torch.empty(rows, columns, dtype=dtype))
        self.scale = _fixed(torch.empty(rows, 1, dtype=torch.float32))
        self._packed: dict[int, tuple] = {}  # by how many layers: their memory, their kernel's form

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> "QuantizedLinear":
        made = cls(*layer.weight.shape[::-1], dtype)
        weight, scale = quantized(layer.weight.detach().float(), dtype)
        made.weight, made.scale = _fixed(weight), _fixed(scale)
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self._multiplies_fp8(x.device):
            return self._scaled(x)
        return multiply([self], x)

    def packed(self, layers: Sequence["QuantizedLinear"]):
        """The int8 weights of `layers`, of which this is the first, for the CPU's kernel."""
        known = [layer.weight.data_ptr() for layer in layers]
        if self._packed.get(len(layers), ((),))[0] != known:
            weight = torch.cat([layer.weight for layer in layers])
            scale = torch.cat([layer.scale for layer in layers])
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            with warnings.catch_warnings():  # newer PyTorch means to move these kernels elsewhere
                warnings.filterwarnings("ignore", message=".*quantized tensor creation")
                weight = torch._make_per_channel_quantized_tensor(
                    weight, scale.flatten().double(), zeros, 0
                )
            self._packed[len(layers)] = known, torch.ops.quantized.linear_prepack(weight, None)
        return self._packed[len(layers)][1]

    def _scaled(self, x: Tensor) -> Tensor:
        rows, scale = quantized(x.flatten(0, -2).float(), self.weight.dtype)
        y = torch._scaled_mm(rows, self.weight.T, scale, self.scale.T, out_dtype=torch.bfloat16)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _multiplies_fp8(self, device: torch.device) -> bool:
        return (
            self.weight.dtype == torch.float8_e4m3fn
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device) >= (8, 9)
        )


def multiply(layers: Sequence[QuantizedLinear], x: Tensor) -> Tensor:
    """x (..., in) -> what each of these layers makes of it, side by side (..., sum of out)."""
    if x.device.type != "cpu" or layers[0].weight.dtype != torch.int8:
        y = [F.linear(x, layer.weight.to(x.dtype)) * layer.scale.T.to(x.dtype) for layer in layers]
        return torch.cat(y, dim=-1)
    packed = layers[0].packed(layers)
    largest = torch.linalg.vector_norm(x, torch.inf, -1, True).clamp_min_(1e-12).float()
    # The kernel finds one scale for all that comes in: rows of one size make it that of each.
    y = torch.ops.quantized.linear_dynamic(x / largest, packed, not VNNI)
    return (y * largest).to(x.dtype)


def _fixed(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


# Without these instructions sums of products of two whole bytes may overflow.
VNNI = torch.cpu._is_vnni_supported()


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
    dtypes = {module.weight.dtype for module in model.modules() if type(module) is QuantizedLinear}
    return next((kind for kind, dtype in KINDS.items() if dtype in dtypes), None)


def check_whole(model: nn.Module) -> None:
    """Raises ValueError for a quantised model: only whole weights can be changed."""
    if kind := kind_of(model):
        raise ValueError(f"the model's weights are {kind}: only whole ones can be changed")


def quantized_names(model: nn.Module) -> dict[str, torch.dtype]:
    """The names of what must keep its dtype -> that dtype."""
    return {
        f"{name}.{part}": tensor.dtype
        for name, module in model.named_modules()
        if type(module) is QuantizedLinear
        for part, tensor in module.named_parameters()
    }
