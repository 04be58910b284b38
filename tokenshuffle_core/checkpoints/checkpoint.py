"""A checkpoint of any family, and how its weights become modules."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import Config, ImageTokenizerConfig, ModelConfig
from ..engine.quantize import quantize, quantized_names
from ..image_tokenizer import ImageTokenizer
from ..model import TokenShuffleModel
from ..text_tokenizer import PromptEncoder
from ..vocabulary import Vocabulary

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
        """Raises ValueError if the text tokenizer has more tokens than the model."""
        tokens, rows = len(self.text_tokenizer), self.config.model.text_vocabulary
        if tokens > rows:
            raise ValueError(
                f"{self.path}: the text tokenizer has {tokens} tokens, text_vocabulary is {rows}"
            )

    def load_model(self, device: str | torch.device, dtype: torch.dtype) -> TokenShuffleModel:
        """Raises ValueError if the weights do not match the configuration."""
        model = skeleton(self.config.model)
        if self.kind:
            quantize(model, self.kind)
        return fill(model, self.model_weights, f"{self.path}: model.", device, dtype)

    def load_image_tokenizer(self, device: str | torch.device) -> ImageTokenizer:
        """In float32, since it is small. Raises as `load_model`."""
        where = f"{self.path}: image_tokenizer."
        module = skeleton(self.config.image_tokenizer)
        return fill(module, self.image_tokenizer_weights, where, device, torch.float32)


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
    module: nn.Module, weights: Weights, where: str, device: str | torch.device, dtype: torch.dtype
) -> nn.Module:
    """Load weights into a skeleton for inference, on `device` and in `dtype` (except quantised
    ones). None is a view of its file, which may be replaced then.

    Raises ValueError, starting with `where`, for names or shapes that differ and for values that
    are not finite.
    """
    kept = quantized_names(module)
    state_dict = {}
    for name, shape in named_shapes(module, weights, where).items():
        # The check of all values is faster on a GPU.
        weight = checked(lambda name=name: weights[name]().to(device), f"{where}{name}", shape)
        if weight.dtype != kept.get(name, weight.dtype):
            raise ValueError(f"{where}{name} is {weight.dtype}, not {kept[name]}")
        # A view of the file would change with it, and end the process where that is cut.
        copy = weight.device.type == "cpu"
        state_dict[name] = weight.to(kept.get(name, dtype), copy=copy)
    module.load_state_dict(state_dict, assign=True)
    return module.eval()


def named_shapes(module: nn.Module, weights: Weights, where: str) -> dict[str, torch.Size]:
    """Name -> shape of what a skeleton needs. Raises ValueError, starting with `where`, if the
    names of the weights are not the same."""
    expected = {name: empty.shape for name, empty in module.state_dict().items()}
    for name in sorted(expected.keys() ^ weights.keys()):
        state = "is missing" if name in expected else "has no place in the configuration"
        raise ValueError(f"{where}{name} {state}")
    return expected


def checked(read: Callable[[], Tensor], where: str, shape: torch.Size) -> Tensor:
    """The tensor, if it has the shape that its configuration asks for and finite weights; otherwise
    raises ValueError."""
    x = read()
    if x.shape != shape:
        raise ValueError(
            f"{where} has shape {tuple(x.shape)}, the configuration asks for {tuple(shape)}"
        )
    if not x.is_floating_point() and x.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"{where} holds {x.dtype}, not weights")
    # The minimum or maximum of values that are not all finite is not finite either.
    if not torch.stack((x.float() if x.itemsize == 1 else x).aminmax()).isfinite().all():
        raise ValueError(f"{where} holds numbers that are not finite")
    return x
