"""A checkpoint of any family, and how its weights become modules."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import Config, ImageTokenizerConfig, ModelConfig
from ..engine.cpu_linear import multiplies_float16
from ..engine.quantize import (
    KINDS,
    CastLinear,
    QuantizedLinear,
    quantize,
    quantized_names,
    quantized_weight,
)
from ..image_tokenizer import ImageTokenizer
from ..model import TokenShuffleModel
from ..text_tokenizer import PromptEncoder
from ..vocabulary import Vocabulary

AT_ONCE = 2**18  # numbers that are checked together where that takes a copy
LARGEST = 1e6  # a weight that nothing was trained to, and with which what is computed overflows
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
SIXTEEN_BITS = torch.float16, torch.bfloat16
MAX_SENTENCE = 600  # characters of a sentence about a file
Weights = dict[str, Callable[[], Tensor]]  # our name -> function that reads the tensor


@dataclass
class Checkpoint:
    """A file or a folder whose weights are read on demand.

    `kind` is that of the model's quantised weights, None for whole ones; `vocabulary` is there for
    a model with a closed one.
    """

    path: Path
    config: Config
    text_tokenizer: PromptEncoder
    card: dict[str, str]
    model_weights: Weights
    image_tokenizer_weights: Weights
    kind: str | None = None
    vocabulary: Vocabulary | None = None

    def __post_init__(self):
        """Raises ValueError if the text tokenizer has more tokens than the model, or the model more
        parts than the file."""
        tokens, rows = len(self.text_tokenizer), self.config.model.text_vocabulary
        if tokens > rows:
            raise ValueError(f"the text tokenizer has {tokens} tokens, text_vocabulary is {rows}")
        check_parts(self.config.model, self.model_weights)
        check_parts(self.config.image_tokenizer, self.image_tokenizer_weights)

    def load_model(
        self, device: str | torch.device, dtype: torch.dtype | None = None
    ) -> TokenShuffleModel:
        """`dtype` None stands for `default_dtype(device)`, and on a CPU that multiplies 16-bit
        weights for linear layers in the 16 bits of their file.

        Raises ValueError if the weights do not match the configuration.
        """
        where = f"{self.path}: model."
        in_16_bits = dtype is None and torch.device(device).type == "cpu" and multiplies_float16()
        dtype = dtype or default_dtype(device)
        with named(self.path):
            return fill(self.skeleton(), self.model_weights, where, device, dtype, in_16_bits)

    def skeleton(self) -> TokenShuffleModel:
        """The model without data; see `skeleton`."""
        model = skeleton(self.config.model)
        return quantize(model, self.kind) if self.kind else model

    def quantized(self, kind: str, dtype: torch.dtype | None = None) -> "Checkpoint":
        """The same with small weights, as `quantize` makes them of weights in `dtype`, None for
        that of the file: each when it is read. Raises ValueError as `quantize` and `load_model`."""
        small, weights = quantize(self.skeleton(), kind), dict(self.model_weights)
        if kind == self.kind:
            return self
        where = f"{self.path}: model."
        sizes = named_shapes(self.skeleton(), weights, where)

        @lru_cache(maxsize=1)  # a weight is read right before its scale
        def layer(name: str) -> tuple[Tensor, Tensor]:
            weight = checked(self.model_weights[name], f"{where}{name}", sizes[name])
            return quantized_weight(weight.to(dtype), KINDS[kind])

        for name, module in small.named_modules():
            if isinstance(module, QuantizedLinear):
                whole = f"{name}.weight"
                weights[whole] = lambda whole=whole: layer(whole)[0]
                weights[f"{name}.scale"] = lambda whole=whole: layer(whole)[1]
        return replace(self, model_weights=weights, kind=kind)

    def load_image_tokenizer(self, device: str | torch.device) -> ImageTokenizer:
        """In float32, since it is small. Raises as `load_model`."""
        where = f"{self.path}: image_tokenizer."
        with named(self.path):
            module = skeleton(self.config.image_tokenizer)
            return fill(module, self.image_tokenizer_weights, where, device, torch.float32)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """What a file from a stranger makes its reader raise, as a ValueError with one sentence of a
    length that a person reads, which names the file."""
    try:
        yield
    except (ValueError, RecursionError, OverflowError, SafetensorError) as error:
        text = " ".join(str(error).split())
        text = text if str(path) in text else f"{path}: {text}"
        raise ValueError(
            text if len(text) <= MAX_SENTENCE else f"{text[:MAX_SENTENCE]}..."
        ) from None


def check_parts(shape: ModelConfig | ImageTokenizerConfig, weights: Collection[str]) -> None:
    """Before anything is built: raises ValueError for a shape with more blocks than there are
    tensors, which takes minutes and gigabytes from a file of a few bytes."""
    if shape.blocks > len(weights):
        raise ValueError(
            f"the configuration asks for {shape.blocks} blocks, for which {len(weights)} tensors "
            "are too few"
        )


class _NothingDrawn(TorchFunctionMode):
    """Skips initialisation: on the meta device it does nothing, but would import PyTorch's
    compiler, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def skeleton(shape: ModelConfig | ImageTokenizerConfig) -> TokenShuffleModel | ImageTokenizer:
    """The module of this shape on the meta device: names and shapes without data."""
    make = TokenShuffleModel if isinstance(shape, ModelConfig) else ImageTokenizer
    with torch.device("meta"), _NothingDrawn():
        return make(shape)


def fill(
    module: nn.Module,
    weights: Weights,
    where: str,
    device: str | torch.device,
    dtype: torch.dtype,
    in_16_bits: bool = False,
) -> nn.Module:
    """Load weights into a skeleton for inference, on `device` and in `dtype` (except quantised
    ones). With `in_16_bits`, linear layers whose weights are stored in 16 bits keep these, and
    compute in the type of their input. None is a view of its file, which may be replaced then.

    Raises ValueError, starting with `where`, for names or shapes that differ and for values that
    are not finite.
    """
    kept = quantized_names(module)
    layers = module.named_modules() if in_16_bits else ()
    linear = {f"{name}.weight": layer for name, layer in layers if type(layer) is nn.Linear}
    state_dict = {}
    for name, shape in named_shapes(module, weights, where).items():
        # The check of all values is faster on a GPU.
        weight = checked(
            lambda name=name: weights[name]().to(device), f"{where}{name}", shape, kept.get(name)
        )
        # A view of the file would change with it, and end the process where that is cut.
        copy = weight.device.type == "cpu"
        if name in linear and weight.dtype in SIXTEEN_BITS:
            linear[name].__class__ = CastLinear
            kept[name] = weight.dtype
        state_dict[name] = weight.to(kept.get(name, dtype), copy=copy)
    module.load_state_dict(state_dict, assign=True)
    return module.eval()


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 on CUDA devices that compute it natively, float16 on others, float32 elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.float32


def named_shapes(module: nn.Module, weights: Weights, where: str) -> dict[str, torch.Size]:
    """Name -> shape of what a skeleton needs. Raises ValueError, starting with `where`, if the
    names of the weights are not the same."""
    expected = {name: empty.shape for name, empty in module.state_dict().items()}
    for name in sorted(expected.keys() ^ weights.keys()):
        state = "is missing" if name in expected else "has no place in the configuration"
        raise ValueError(f"{where}{name:.200} {state}")
    return expected


def checked(
    read: Callable[[], Tensor], where: str, shape: torch.Size, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor, if it has the shape that its configuration asks for, this `dtype`, unless that is
    None, and weights within LARGEST; otherwise raises ValueError."""
    try:
        x = read()
    except SafetensorError as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    if x.shape != shape:
        raise ValueError(
            f"{where} has shape {tuple(x.shape)}, the configuration asks for {tuple(shape)}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"{where} holds {x.dtype}, not weights")
    if x.dtype != (dtype or x.dtype):
        raise ValueError(f"{where} is {x.dtype}, not {dtype}")
    if not x.is_floating_point():
        return x
    # Of 8 bits, torch has no extremes.
    parts = (p.float() for p in x.flatten().split(AT_ONCE)) if x.itemsize == 1 else (x,)
    # The minimum or maximum of values that are not all finite is not finite either.
    extremes = torch.stack([end for part in parts for end in part.aminmax()]).abs()
    if not (extremes <= LARGEST).all():
        what = f"beyond {LARGEST:g}" if extremes.isfinite().all() else "that are not finite"
        raise ValueError(f"{where} holds numbers {what}")
    return x
