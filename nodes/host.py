"""The only file that touches ComfyUI's own modules: paths, memory, progress and interrupt."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..tokenshuffle_core.checkpoint import BUNDLED
from ..tokenshuffle_core.config import GenerationConfig
from ..tokenshuffle_core.pipeline import Pipeline, load
from ..tokenshuffle_core.sampler import Progress

FOLDER = "tokenshuffle"
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
# After the user's own folders, whose files of the same name win.
folder_paths.add_model_folder_path(FOLDER, str(BUNDLED.parent))


def checkpoints() -> list[str]:
    names = folder_paths.get_filename_list(FOLDER)
    return [name for name in names if name.endswith(".safetensors")]


def modified(name: str) -> float:
    return os.path.getmtime(folder_paths.get_full_path_or_raise(FOLDER, name))


@dataclass(frozen=True)
class Loaded:
    """A pipeline, and the patchers through which ComfyUI moves its two modules between devices.

    ComfyUI takes a patcher that dies before its module for a memory leak, so they stay together.
    """

    pipeline: Pipeline
    model: ModelPatcher
    vq: ModelPatcher

    def with_model(self, settings: GenerationConfig, count: int) -> Pipeline:
        """The pipeline, its model on the device and room beside it for the KV cache."""
        shape = self.pipeline.config.model
        rows, columns = self.pipeline.grid(settings.width, settings.height)
        positions = 2 * count * (shape.max_prompt + rows * columns)  # with and without the prompt
        values = 2 * shape.layers * shape.kv_heads * shape.head_size * positions
        _bring(self.model, values * self.pipeline.model.head.weight.itemsize)
        return self.pipeline

    def with_vq(self, pictures: int, pixels: int) -> Pipeline:
        """The pipeline, its image tokenizer on the device and room to work on so many pixels of
        each picture at once."""
        # Measured: at most ten float32 feature maps of the base width live at the same time.
        maps = 12 * self.pipeline.config.image_tokenizer.channels
        _bring(self.vq, pictures * pixels * maps * 4)
        return self.pipeline


def _bring(patcher: ModelPatcher, memory: int) -> None:
    """Moves the module to its device; other models make room for it and `memory` bytes."""
    comfy.model_management.load_models_gpu([patcher], memory_required=memory, force_full_load=True)
    # Under --novram ComfyUI leaves weights in main memory, for modules of its own kind to fetch
    # layer by layer; these need them all.
    patcher.model.to(patcher.load_device)


def load_checkpoint(name: str) -> Loaded:
    """Both modules stay in main memory until a node needs them."""
    management = comfy.model_management
    device = management.get_torch_device()
    dtype = torch.bfloat16 if management.should_use_bf16(device) else torch.float32
    offload = management.unet_offload_device()
    pipeline = load(folder_paths.get_full_path_or_raise(FOLDER, name), offload, dtype)
    vq_devices = management.vae_device(), management.vae_offload_device()
    return Loaded(
        pipeline,
        ModelPatcher(pipeline.model, device, offload),
        ModelPatcher(pipeline.image_tokenizer, *vq_devices),
    )


def follow(steps: Iterator[Progress]) -> Progress:
    """Runs to the last step and returns it: progress bar and interrupt on every one."""
    bar = None
    for step in steps:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(step.positions)
        bar.update_absolute(step.position)
    return step


def search_aliases(*names: str) -> dict[str, list[str]]:
    """Arguments for io.Schema. ComfyUI 0.3 does not know this field yet."""
    known = any(field.name == "search_aliases" for field in fields(io.Schema))
    return {"search_aliases": list(names)} if known else {}
