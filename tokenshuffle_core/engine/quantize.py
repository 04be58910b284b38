"""Linear layers with small weights: 16-bit ones in a model that computes in 32 bits, and quantised
ones, which are int8, float8 (e4m3), which recent GPUs multiply natively, or int4 (int4.py).

Each row of an 8-bit weight has its own scale: its largest magnitude over the largest number of the
type. The same holds for each input row where a kernel takes 8-bit input as well. The kernels are
PyTorch's. On a device without one, the weights are expanded on each use, which saves memory but not
time.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WEIGHT_KINDS
from . import int4
from .swapped import Swapped

# Kind -> the type of the weights' tensors, which no other tensor of a model has.
KINDS = dict(zip(WEIGHT_KINDS, (torch.int8, torch.float8_e4m3fn, torch.uint8), strict=True))
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
AT_ONCE = 2**20  # weights that are quantised together: 4 MB in float32


class CastLinear(nn.Linear):
    """A linear layer whose weight may have a smaller float type than its input, to which each use
    casts it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class QuantizedLinear(nn.Module):
    """A linear layer with `weight` (out, in) in 8 bits times `scale` (out, 1) float32; for int4,
    with a packed `weight` (out, in / 2) uint8 and `scale` (out, in / 128) bfloat16. Its bias is not
    quantised."""

    def __init__(self, columns: int, rows: int, dtype: torch.dtype, bias: bool = False):
        super().__init__()
        self.columns = columns
        is_int4 = dtype == torch.uint8
        weight, scale = int4.shapes(rows, columns) if is_int4 else ((rows, columns), (rows, 1))
        self.weight = _fixed(torch.empty(weight, dtype=dtype))
        self.scale = _fixed(torch.empty(scale, dtype=torch.bfloat16 if is_int4 else torch.float32))
        self.register_parameter("bias", _fixed(torch.empty(rows)) if bias else None)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> "QuantizedLinear":
        with layer.weight.device:
            new = cls(*layer.weight.shape[::-1], dtype, layer.bias is not None)
        if not layer.weight.is_meta:
            weight, scale = quantized_weight(layer.weight.detach(), dtype)
            new.weight, new.scale = _fixed(weight), _fixed(scale)
        if layer.bias is not None:
            new.bias = _fixed(layer.bias.detach())
        return new

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The whole weight (out, in)."""
        if self.weight.dtype == torch.uint8:
            return int4.dequantized(self.weight, self.scale, self.columns, dtype)
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self._scaled(x) if self.rounds_fp8(x.device) else multiply([self], x)
        return y if self.bias is None else y + self.bias

    def rounds_fp8(self, device: torch.device) -> bool:
        """Whether the layer's product on this device rounds its input to float8 as well."""
        is_fp8 = self.weight.dtype == torch.float8_e4m3fn
        fits = is_fp8 and device.type == "cuda" and not any(n % 16 for n in self.weight.shape)
        return fits and _multiplies_fp8(device)

    def _scaled(self, x: Tensor) -> Tensor:
        rows, scale = quantized(x.flatten(0, -2).float(), self.weight.dtype)
        y = torch._scaled_mm(rows, self.weight.T, scale, self.scale.T, out_dtype=torch.bfloat16)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


@cache
def _multiplies_fp8(device: torch.device) -> bool:
    """Determined by trying: it depends on the GPU, PyTorch's version and the system."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    layer = QuantizedLinear.of(nn.Linear(32, 32, False, device), torch.float8_e4m3fn)
    try:
        layer._scaled(torch.ones(2, 32, device=device, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


def multiply(layers: Sequence[QuantizedLinear], x: Tensor, packed=None) -> Tensor:
    """x (..., in) -> the layers' outputs without biases, concatenated (..., sum of out).

    `packed` is the result of `pack` for the layers; without it they are packed for this call.
    """
    if x.device.type != "cpu" or layers[0].weight.dtype != torch.int8:
        # Scaled before the multiplication, since float16 would overflow otherwise.
        y = [F.linear(x, layer.dequantized(x.dtype)) for layer in layers]
        return y[0] if len(y) == 1 else torch.cat(y, dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    largest = torch.linalg.vector_norm(rows, torch.inf, -1, True).clamp_min_(1e-12).float()
    # The kernel quantises all rows with one scale, from the minimum and maximum of them all. With
    # rows scaled to -1..1 and a last row that has both ends, a row does not depend on the others.
    rows = torch.cat([rows / largest, _ends(rows.shape[1])])
    packed = pack(layers) if packed is None else packed
    y = torch.ops.quantized.linear_dynamic(rows, packed, not VNNI)[:-1]
    return (y * largest).to(x.dtype).view(*x.shape[:-1], -1)


def pack(layers: Sequence[QuantizedLinear]):
    """The layers' int8 weights in the format of the CPU's kernel; None for another type."""
    if layers[0].weight.dtype != torch.int8:
        return None
    weight = torch.cat([layer.weight for layer in layers])
    scale = torch.cat([layer.scale for layer in layers]).flatten().double()
    with warnings.catch_warnings():  # deprecated in newer versions of PyTorch
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


# Without these instructions, sums of 8-bit products may overflow unless 7 bits are used.
VNNI = getattr(torch.cpu, "_is_vnni_supported", bool)()


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float32 (rows, columns) -> the nearest numbers of `dtype`, and their scales (rows, 1); for
    uint8, 4-bit ones as `int4.quantized` packs them."""
    if dtype == torch.uint8:
        return int4.quantized(x)
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST[dtype]
    x = x / scale
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


def quantized_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `quantized`, for a weight (out, in) of any float type, of which only a part is in float32
    at a time."""
    rows = max(1, AT_ONCE // weight.shape[1])
    with weight.device:
        made = QuantizedLinear(*weight.shape[::-1], dtype)
    both = made.weight.data, made.scale.data
    for part, *places in zip(*(x.split(rows) for x in (weight, *both)), strict=True):
        for place, numbers in zip(places, quantized(part.float(), dtype), strict=True):
            place.copy_(numbers)
    return both


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Give all linear layers of `model` small weights, in place; `kind` is one of KINDS. Raises
    ValueError for another, and if the model is already quantised to a different one."""
    if kind not in KINDS:
        raise ValueError(f"weights must be one of {', '.join(KINDS)}, not {kind!r}")
    if (current := kind_of(model)) not in (None, kind):
        raise ValueError(f"the model's weights are already {current}: they cannot become {kind}")
    from . import release  # which needs this module

    release(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in layers:
        model.set_submodule(name, QuantizedLinear.of(model.get_submodule(name), KINDS[kind]))
    return model


def kind_of(model: nn.Module) -> str | None:
    """Which of KINDS the model is quantised to; None if it is not."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return next((kind for kind, dtype in KINDS.items() if dtype in dtypes), None)


def rounds_activations(model: nn.Module, device: torch.device) -> bool:
    """Whether products of `model` on `device` round their input to 8 bits.

    Then the last bits of floats, which vary with the number of rows, may change a picture. True for
    int8 on a CPU and for fp8 on a GPU that multiplies it; int4, what a device expands before
    multiplying, and layers that the engine has swapped on a GPU, are weight-only.
    """
    if device.type == "cpu":
        return kind_of(model) == "int8"
    swapped = (layer for layer in model.modules() if isinstance(layer, Swapped))
    weight_only = {part for layer in swapped for part in layer.modules()}
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return any(layer.rounds_fp8(device) for layer in layers if layer not in weight_only)


def check_whole(model: nn.Module) -> None:
    """Raises ValueError for a quantised model, whose weights cannot be changed."""
    if kind := kind_of(model):
        raise ValueError(f"the model's weights are {kind}: only 16- or 32-bit ones can be changed")


def quantized_names(model: nn.Module) -> dict[str, torch.dtype]:
    """The names of tensors whose dtype must not change -> that dtype."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return {
        name: dtypes[name]
        for weight, dtype in dtypes.items()
        if dtype in KINDS.values()
        for name in (weight, f"{weight.removesuffix('weight')}scale")
    }
