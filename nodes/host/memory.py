"""Models in ComfyUI's memory management: loading, moving, LoRA patches, working memory."""

from dataclasses import dataclass, replace
from functools import cached_property

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher

from ...tokenshuffle_core import engine
from ...tokenshuffle_core.adapt.lora import read_lora
from ...tokenshuffle_core.config import GenerationConfig
from ...tokenshuffle_core.engine.quantize import quantize
from ...tokenshuffle_core.pipeline import Pipeline, load
from ...tokenshuffle_core.transformer import KVCache
from .. import preview
from .paths import LORAS, checkpoint_path
from .progress import previews_wanted


class EnginePatcher(ModelPatcher):
    """Includes the engine's packed weights in the model's size, and frees them on unloading."""

    def model_size(self):
        return super().model_size() + engine.packed_nbytes(self.model)

    def loaded_size(self):
        return super().loaded_size() + engine.packed_nbytes(self.model)

    def detach(self, unpatch_all=True):
        engine.release(self.model)
        return super().detach(unpatch_all)


@dataclass(frozen=True)
class Loaded:
    """A pipeline, and the patchers through which ComfyUI moves its two modules between devices.

    ComfyUI reports a memory leak if a patcher is deleted before its module, so they stay together.
    """

    name: str
    pipeline: Pipeline
    model: EnginePatcher
    vq: ModelPatcher

    def with_model(self, settings: GenerationConfig, count: int) -> Pipeline:
        """The pipeline, with its model on the device and room for the KV cache.

        A model too large for the card stays partly in main memory. With previews on, the image
        tokenizer is loaded too: it must not evict the model in the middle of a picture.
        """
        shape = self.pipeline.config.model
        rows, columns = self.pipeline.grid(settings)
        dtype = self.pipeline.model.code_embedding.weight.dtype
        # Each picture with and without its prompt.
        memory = KVCache.nbytes(shape, 2 * count, shape.max_prompt + rows * columns, dtype)
        patchers = [self.model]
        if previews_wanted():
            patchers.append(self.vq)
            memory += self._decoding(1, settings.width * settings.height, True)
        comfy.model_management.load_models_gpu(patchers, memory_required=memory)
        return self.pipeline

    def with_vq(self, pictures: int, pixels: int, save_memory: bool = False) -> Pipeline:
        """The pipeline, with its image tokenizer on the device and room for `pictures` pictures
        with `pixels` pixels each."""
        memory = self._decoding(pictures, pixels, save_memory)
        comfy.model_management.load_models_gpu([self.vq], memory_required=memory)
        return self.pipeline

    @cached_property
    def colours(self) -> np.ndarray:
        """`preview.rough_colours`, computed once for each checkpoint."""
        return preview.rough_colours(self.pipeline, self.vq.load_device)

    def _decoding(self, pictures: int, pixels: int, save_memory: bool) -> int:
        return self.pipeline.image_tokenizer.working_nbytes(
            pictures, pixels, self.vq.load_device, save_memory
        )


def model_dtype(device: torch.device) -> torch.dtype:
    """The dtype that the model computes in: ComfyUI's choice for the device and its options."""
    # In order of preference, which --force-fp16 alone would not change.
    supported = [torch.float16] if args.force_fp16 else [torch.bfloat16, torch.float16]
    dtype = comfy.model_management.unet_dtype(device, supported_dtypes=supported)
    return dtype if dtype.itemsize > 1 else torch.bfloat16  # 8 bits are an option of the loader


def load_checkpoint(name: str, weights: str | None = None) -> Loaded:
    """A checkpoint with both modules in main memory until a node needs them, quantised to
    `weights` if that is not None."""
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
        EnginePatcher(pipeline.model, device, offload),
        ModelPatcher(pipeline.image_tokenizer, *vq_devices),
    )


def _stream(module: torch.nn.Module, device: torch.device) -> None:
    """Let weights of `module` stay in main memory if they do not fit on the device.

    ComfyUI's layers compute the same as torch's, and fetch such weights. On a CPU there is nothing
    to fetch, and their overhead would be some 6 % of a step.
    """
    if comfy.model_management.is_device_cpu(device):
        return
    for layer in module.modules():
        hosted = getattr(comfy.ops.disable_weight_init, type(layer).__name__, None)
        if hosted and issubclass(hosted, type(layer)):
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
