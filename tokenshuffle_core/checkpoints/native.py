"""One safetensors file: model, image tokenizer, text tokenizer, configuration and model card.

Weights carry the prefix `model.` or `image_tokenizer.`; everything else is JSON or text in the
file's metadata. The card uses the keys of the ModelSpec standard (`modelspec.title`, ...). An
image tokenizer can also stand alone in a file of its own.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..class_names import ClassNames
from ..config import Config, ImageTokenizerConfig
from ..engine.quantize import kind_of, quantize, quantized_names
from ..files import write_safetensors
from ..image_tokenizer import ImageTokenizer
from ..model import TokenShuffleModel
from ..text_tokenizer import TextTokenizer

BUNDLED = Path(__file__).parent.parent / "weights" / "emoji.safetensors"
CONFIG = "tokenshuffle.config"
IMAGE_TOKENIZER = "tokenshuffle.image_tokenizer"
TEXT_TOKENIZER = "tokenshuffle.text_tokenizer"
WEIGHTS = "tokenshuffle.weights"  # their kind, where `quantize` has made them smaller
SIZES = "tokenshuffle.sizes"  # in the card: the sizes that the model was trained at
ARCHITECTURE = "token-shuffle"


@dataclass
class Checkpoint:
    config: Config
    model: TokenShuffleModel
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer | ClassNames
    card: dict[str, str]


def save(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Write `checkpoint` to one file; `dtype` converts the weights on the way."""
    metadata = metadata_of(checkpoint.config, checkpoint.text_tokenizer, checkpoint.card)
    if kind := kind_of(checkpoint.model):
        metadata[WEIGHTS] = kind
    modules = {"model": checkpoint.model, "image_tokenizer": checkpoint.image_tokenizer}
    _write(path, modules, metadata, dtype)


def metadata_of(
    config: Config, text_tokenizer: TextTokenizer | ClassNames, card: dict[str, str]
) -> dict[str, str]:
    """What a file holds beside its weights."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        **card,
        CONFIG: config.to_json(),
        IMAGE_TOKENIZER: _to_json(config.image_tokenizer),
        TEXT_TOKENIZER: text_tokenizer.to_json(),
    }


def save_image_tokenizer(path: str | Path, module: ImageTokenizer) -> None:
    """Write an image tokenizer alone."""
    _write(path, {"image_tokenizer": module}, {IMAGE_TOKENIZER: _to_json(module.config)}, None)


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Checkpoint:
    """Read a checkpoint; the weights are memory-mapped and go straight to `device`.

    `dtype` is the model's; without one it is `default_dtype(device)`. The image tokenizer is
    small and stays float32. Raises FileNotFoundError, or ValueError with one sentence that names
    the file where it is no Token-Shuffle checkpoint.
    """
    dtype = dtype or default_dtype(device)
    with open_safetensors(path, device) as file:
        metadata = file.metadata() or {}
        config = _config(metadata, path)
        try:
            text_tokenizer = read_text_tokenizer(metadata, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if len(text_tokenizer) > config.model.text_vocabulary:
            raise ValueError(
                f"{path}: the text tokenizer has {len(text_tokenizer)} tokens, text_vocabulary "
                f"is {config.model.text_vocabulary}"
            )
        with torch.device("meta"):
            model = TokenShuffleModel(config.model)
            image_tokenizer = ImageTokenizer(config.image_tokenizer)
        if WEIGHTS in metadata:
            try:
                quantize(model, metadata[WEIGHTS])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        _fill(model, "model", file, path, dtype)
        _fill(image_tokenizer, "image_tokenizer", file, path, torch.float32)
    return Checkpoint(config, model.eval(), image_tokenizer.eval(), text_tokenizer, card(metadata))


def load_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """Read only the image tokenizer of a checkpoint, or one that stands alone. Raises as `load`."""
    with open_safetensors(path, device) as file:
        metadata = file.metadata() or {}
        if IMAGE_TOKENIZER not in metadata:
            raise ValueError(f"{path} holds no Token-Shuffle image tokenizer")
        try:
            config = ImageTokenizerConfig(**json.loads(metadata[IMAGE_TOKENIZER]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the image tokenizer's configuration: {error}") from None
        with torch.device("meta"):
            module = ImageTokenizer(config)
        _fill(module, "image_tokenizer", file, path, torch.float32)
    return module.eval()


def read_metadata(path: str | Path) -> dict[str, str]:
    """All of the file's metadata, without reading a weight. Raises as `load`."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_config(path: str | Path) -> Config:
    """The configuration alone. Raises as `load`."""
    return _config(read_metadata(path), path)


def read_text_tokenizer(metadata: dict[str, str], config: Config) -> TextTokenizer | ClassNames:
    """What reads prompts. Raises ValueError."""
    text = metadata[TEXT_TOKENIZER]
    if text.startswith('{"classes"'):
        return ClassNames.from_json(text)
    return TextTokenizer.from_json(text, config.prompt)


def card(metadata: dict[str, str]) -> dict[str, str]:
    """The part of the metadata that is written for people."""
    for_machines = (CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZER, WEIGHTS)
    return {key: value for key, value in metadata.items() if key not in for_machines}


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, float16 on older CUDA cards, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.float32


def _config(metadata: dict[str, str], path: str | Path) -> Config:
    if CONFIG not in metadata or TEXT_TOKENIZER not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a Token-Shuffle checkpoint")
    try:
        return Config.from_json(metadata[CONFIG])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _to_json(config: ImageTokenizerConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def _write(path, modules: dict[str, nn.Module], metadata: dict[str, str], dtype) -> None:
    tensors = {}
    for prefix, module in modules.items():
        kept = quantized_names(module)
        for name, tensor in module.state_dict().items():
            to = tensor.dtype if name in kept else dtype or tensor.dtype
            tensors[f"{prefix}.{name}"] = tensor.detach().to("cpu", to).contiguous()
    write_safetensors(path, tensors, metadata)


def open_safetensors(path: str | Path, device: str | torch.device = "cpu"):
    """`safe_open` whose errors are one sentence: FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it may be damaged, cut short "
            "in a download, or of another kind"
        ) from None


def _fill(module: nn.Module, prefix: str, file, path: str | Path, dtype: torch.dtype) -> None:
    """Give a module on the meta device its weights, after checking every name and shape."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    stored = {k.removeprefix(f"{prefix}.") for k in file.keys() if k.startswith(f"{prefix}.")}  # noqa: SIM118
    for name in sorted(expected.keys() ^ stored):
        state = "is missing" if name in expected else "has no place in the configuration"
        raise ValueError(f"{path}: {prefix}.{name} {state}")
    for name, shape in expected.items():
        found = tuple(file.get_slice(f"{prefix}.{name}").get_shape())
        if found != tuple(shape):
            raise ValueError(
                f"{path}: {prefix}.{name} has shape {found}, the configuration asks for "
                f"{tuple(shape)}"
            )
    kept = quantized_names(module)
    weights = {}
    for name in expected:
        weight = file.get_tensor(f"{prefix}.{name}")
        if not is_finite(weight):
            raise ValueError(f"{path}: {prefix}.{name} holds numbers that are not finite")
        if name in kept and weight.dtype != kept[name]:
            raise ValueError(f"{path}: {prefix}.{name} is {weight.dtype}, not {kept[name]}")
        weights[name] = weight if name in kept else weight.to(dtype)
    module.load_state_dict(weights, assign=True)


def is_finite(x: Tensor) -> bool:
    """Whether no number is infinite or nan: the least or the greatest one would be so as well."""
    ends = torch.stack((x.float() if x.itemsize == 1 else x).aminmax())
    return bool(ends.isfinite().all())
