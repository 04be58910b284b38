"""The only file that touches ComfyUI's own modules: paths, memory, progress and interrupt."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import numpy as np
import torch
from aiohttp import web
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from ..tokenshuffle_core.checkpoint import BUNDLED
from ..tokenshuffle_core.config import GenerationConfig
from ..tokenshuffle_core.convert.families import load
from ..tokenshuffle_core.convert.source import PICKLES
from ..tokenshuffle_core.image_tokenizer import LARGE, SMALL
from ..tokenshuffle_core.lora import read_lora
from ..tokenshuffle_core.pipeline import Pipeline
from ..tokenshuffle_core.quantize import quantize
from ..tokenshuffle_core.sampler import Progress
from ..tokenshuffle_core.strips import strip_of
from . import description, preview

FOLDER, OTHERS, LORAS = "tokenshuffle", "checkpoints", "loras"
SAVED_CODES = "codes"  # in the output folder
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
# After the user's own folders, whose files of the same name win.
folder_paths.add_model_folder_path(FOLDER, str(BUNDLED.parent))


def checkpoints() -> list[str]:
    """Checkpoints of our own, and published models as they came: LlamaGen's files and folders with
    a config.json. Among ComfyUI's other checkpoints only what is known by its name."""
    ours = _models(FOLDER)
    return ours + [name for name in _models(OTHERS) if name not in ours and _known(name)]


def _models(folder: str) -> list[str]:
    names = folder_paths.get_filename_list(folder)
    inside = {os.path.dirname(name) for name in names} - {""}
    folders = {name for name in inside if _folder(folder, name)}
    files = [
        name
        for name in names
        if name.endswith((".safetensors", *PICKLES))
        and os.path.dirname(name) not in folders
        and not os.path.basename(name).startswith("vq_")  # LlamaGen's image tokenizers
    ]
    return sorted([*files, *folders])


def _folder(folder: str, name: str) -> Path | None:
    """A published model's folder, which has a config.json."""
    path = name and folder_paths.get_full_path(folder, os.path.join(name, "config.json"))
    return Path(path).parent if path else None


def _known(name: str) -> bool:
    name = os.path.basename(name).lower()
    return name.startswith("c2i_") or "janus" in name or "tokenshuffle" in name


def checkpoint_path(name: str) -> Path:
    """The file or the folder behind one of `checkpoints`. Raises FileNotFoundError."""
    for folder in (FOLDER, OTHERS) if _known(name) else (FOLDER,):
        path = folder_paths.get_full_path(folder, name) or _folder(folder, name)
        if path:
            return Path(path)
    raise FileNotFoundError(
        f"{name} is neither in models/{FOLDER} nor, under a name that is known, in models/{OTHERS}"
    )


def written(path: Path) -> float:
    """When the newest of a checkpoint's files was written."""
    files = path.iterdir() if path.is_dir() else [path, *path.parent.glob("vq_*")]
    return max(file.stat().st_mtime for file in files)


def loras() -> list[str]:
    names = folder_paths.get_filename_list(LORAS)
    return [name for name in names if name.endswith(".safetensors")]


def saved_codes() -> list[str]:
    """Files that the user put into the input folder, and those that Save Codes wrote."""
    given = Path(folder_paths.get_input_directory()).glob("*.npy")
    saved = (Path(folder_paths.get_output_directory()) / SAVED_CODES).glob("*.npy")
    return sorted(path.name for path in given) + sorted(
        f"{SAVED_CODES}/{path.name} [output]" for path in saved
    )


def codes_path(name: str) -> Path:
    """The file behind one of `saved_codes`. ComfyUI 0.3 does not check a node's lists itself."""
    if name not in saved_codes():
        raise ValueError(f"file {name!r} is neither in the input folder nor among the saved codes")
    return Path(folder_paths.get_annotated_filepath(name))


def output_path(prefix: str, suffix: str) -> Path:
    """A path for a new file in the output folder, numbered as ComfyUI numbers pictures."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def modified(folder: str, name: str) -> float:
    return os.path.getmtime(folder_paths.get_full_path_or_raise(folder, name))


SPEEDS: dict[str, float] = {}  # positions per second of each checkpoint's last picture


@PromptServer.instance.routes.get("/tokenshuffle/model")
async def describe_model(request: web.Request) -> web.Response:
    """What the page shows of ?checkpoint=NAME: its card, sizes, settings and speed."""
    name = request.query.get("checkpoint")

    def describe(path: Path, modified: float) -> dict:
        return description.describe(path, modified) | {"speed": SPEEDS.get(name)}

    return await _answer(name, describe)


@PromptServer.instance.routes.post("/tokenshuffle/tokens")
async def count_tokens(request: web.Request) -> web.Response:
    """{"checkpoint": NAME, "text": PROMPT} -> {"tokens": its length, "limit": what fits}."""
    asked = await request.json()
    count = partial(description.count_tokens, text=str(asked.get("text")))
    return await _answer(asked.get("checkpoint"), count)


async def _answer(name: str | None, about: Callable[[Path, float], dict]) -> web.Response:
    """What `about` says of a checkpoint, or {"error": a sentence} for the page to show."""
    try:
        path = checkpoint_path(str(name))
        answer = await asyncio.to_thread(about, path, written(path))
    except (ValueError, OSError) as error:
        answer = {"error": str(error)}
    return web.json_response(answer)


@dataclass(frozen=True)
class Loaded:
    """A pipeline, and the patchers through which ComfyUI moves its two modules between devices.

    ComfyUI takes a patcher that dies before its module for a memory leak, so they stay together.
    """

    name: str
    pipeline: Pipeline
    model: ModelPatcher
    vq: ModelPatcher

    def with_model(self, settings: GenerationConfig, count: int) -> Pipeline:
        """The pipeline, its model on the device and room beside it for the KV cache.

        A model that is too large for the card stays partly in main memory. With previews on, the
        image tokenizer comes along: it must not push the model out in the middle of a picture.
        """
        shape = self.pipeline.config.model
        rows, columns = self.pipeline.grid(settings)
        positions = 2 * count * (shape.max_prompt + rows * columns)  # with and without the prompt
        values = 2 * shape.layers * shape.kv_heads * shape.head_size * positions
        memory = values * self.pipeline.model.code_embedding.weight.itemsize
        patchers = [self.model]
        if previews_wanted():
            patchers.append(self.vq)
            memory += self._decoding(1, settings.width * settings.height, True)
        comfy.model_management.load_models_gpu(patchers, memory_required=memory)
        return self.pipeline

    def with_vq(self, pictures: int, pixels: int, save_memory: bool = False) -> Pipeline:
        """The pipeline, its image tokenizer on the device and room to work on so many pixels of
        each picture."""
        memory = self._decoding(pictures, pixels, save_memory)
        comfy.model_management.load_models_gpu([self.vq], memory_required=memory)
        return self.pipeline

    @cached_property
    def colours(self) -> np.ndarray:
        """See `rough_colours`; for previews, once for each checkpoint."""
        return preview.rough_colours(self.pipeline, self.vq.load_device)

    def _decoding(self, pictures: int, pixels: int, save_memory: bool) -> int:
        largest = pictures * pixels * self.pipeline.config.image_tokenizer.channels
        room = largest <= (SMALL if save_memory else LARGE)
        whole = min(largest, 2 * strip_of(self.vq.load_device))
        itemsize = self.pipeline.image_tokenizer.quantizer.codebook.weight.itemsize
        # Measured: at most ten feature maps of the base width live at the same time, or strips of
        # them; then also the map that they are of, the next, and one between if there is room.
        return (12 * whole + (3 if room else 2) * (largest > whole) * largest) * itemsize


def model_dtype(device: torch.device) -> torch.dtype:
    """What the model computes in: ComfyUI's choice, by the device and its own options."""
    # In the order of preference, of which --force-fp16 by itself would change nothing.
    supported = [torch.float16] if args.force_fp16 else [torch.bfloat16, torch.float16]
    dtype = comfy.model_management.unet_dtype(device, supported_dtypes=supported)
    return dtype if dtype.itemsize > 1 else torch.bfloat16  # one byte is the loader's option


def load_checkpoint(name: str, weights: str | None = None) -> Loaded:
    """Both modules stay in main memory until a node needs them; `weights` are made smaller as
    `quantize` says."""
    management = comfy.model_management
    path = checkpoint_path(name)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    pipeline = load(path, offload, model_dtype(device))
    if weights:
        quantize(pipeline.model, weights)
    pipeline.image_tokenizer.to(management.vae_dtype(management.vae_device()))
    _stream(pipeline.model, device)
    _stream(pipeline.image_tokenizer, management.vae_device())
    vq_devices = management.vae_device(), management.vae_offload_device()
    return Loaded(
        name,
        pipeline,
        ModelPatcher(pipeline.model, device, offload),
        ModelPatcher(pipeline.image_tokenizer, *vq_devices),
    )


def _stream(module: torch.nn.Module, device: torch.device) -> None:
    """Let weights of `module` stay where they are if they find no room on the device.

    ComfyUI's layers compute the same as torch's, and fetch such weights. On the CPU there are none,
    and their bookkeeping would cost some 6 % of a step.
    """
    if comfy.model_management.is_device_cpu(device):
        return
    for layer in module.modules():
        bases = (torch.nn.Linear, torch.nn.Embedding)  # those of which we have kinds of our own
        kind = next((base for base in bases if isinstance(layer, base)), type(layer))
        hosted = getattr(comfy.ops.disable_weight_init, kind.__name__, None)
        if hosted and issubclass(hosted, kind):
            layer.__class__ = hosted
            layer.bias = getattr(layer, "bias", None)  # the host looks for it in every layer


def with_lora(loaded: Loaded, name: str, strength: float) -> Loaded:
    """The same weights with a LoRA as a patch, which ComfyUI applies while this one is in use."""
    path = folder_paths.get_full_path_or_raise(LORAS, name)
    keys = {layer: f"{layer}.weight" for layer in read_lora(path, loaded.pipeline.model)}
    patches = comfy.lora.load_lora(comfy.utils.load_torch_file(path, safe_load=True), keys)
    patcher = loaded.model.clone()
    patcher.add_patches(patches, strength)
    return replace(loaded, model=patcher)


def previews_wanted() -> bool:
    """The user's preview setting; it may change from one prompt to the next."""
    return args.preview_method != LatentPreviewMethod.NoPreviews


def follow(
    name: str,
    steps: Iterator[Progress],
    picture_of: Callable[[Progress], Image.Image | None] | None,
) -> Progress:
    """Runs checkpoint `name` to the last step and returns it. Interrupt on every step; progress
    bar, speed and previews, if `picture_of` gives any, on the node."""
    bar = None
    started = shown = time.perf_counter()
    for step in steps:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(step.positions)
        picture = picture_of(step) if picture_of else None
        now = time.perf_counter()
        if picture or now - shown > 0.2 or step.position in (1, step.positions):
            shown = now
            image = picture and ("JPEG", picture, args.preview_size)
            bar.update_absolute(step.position, preview=image)
            say(_speed(step, now - started))
    SPEEDS[name] = step.positions / (time.perf_counter() - started)
    return step


def say(text: str) -> None:
    """Shows a line of text on the node that runs."""
    PromptServer.instance.send_progress_text(text, get_executing_context().node_id)


def _speed(step: Progress, seconds: float) -> str:
    rate = step.position / seconds
    text = f"{step.position} / {step.positions} positions, {rate:.1f}/s"
    if step.position < step.positions:
        left = round((step.positions - step.position) / rate)
        text += f", {left // 60}:{left % 60:02} left"
    return text


def search_aliases(*names: str) -> dict[str, list[str]]:
    """Arguments for io.Schema. ComfyUI 0.3 does not know this field yet."""
    known = any(field.name == "search_aliases" for field in fields(io.Schema))
    return {"search_aliases": list(names)} if known else {}
