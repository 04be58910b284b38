"""Models in ComfyUI's memory management: loading, moving, LoRA patches, working memory."""

from dataclasses import dataclass, replace
from functools import cached_property

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher

from ...tokenshuffle_core import engine
from ...tokenshuffle_core.adapt.lora import read_lora
from ...tokenshuffle_core.config import GenerationConfig
from ...tokenshuffle_core.engine.quantize import CastLinear
from ...tokenshuffle_core.pipeline import Pipeline, load
from ...tokenshuffle_core.transformer import KVCache
from .. import preview
from ..latents import Codebook
from .durations import decoding
from .paths import checkpoint_path, lora_path
from .progress import previews_wanted, say
from .vae import VAE

# ComfyUI's class for each of torch's layers, and the reverse.
HOSTED = {
    getattr(torch.nn, name): hosted
    for name, hosted in vars(comfy.ops.disable_weight_init).items()
    if isinstance(hosted, type) and issubclass(hosted, getattr(torch.nn, name, ()))
}
PLAIN = {hosted: plain for plain, hosted in HOSTED.items()}


class EnginePatcher(ModelPatcher):
    """A model that the engine may pack, and whose layers are the host's only while weights move.

    Includes the engine's packed weights in the model's size. Before ComfyUI moves or patches any
    weight, they are freed, and the layers are ComfyUI's, which can fetch weights from main memory.
    Loading a model again that is loaded already moves nothing, so that they stay.
    """

    def model_size(self):
        return super().model_size() + engine.packed_nbytes(self.model)

    def loaded_size(self):
        return super().loaded_size() + engine.packed_nbytes(self.model)

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.size = self.size  # some versions pass on what the engine has packed until now
        return clone

    def load(self, *args, **kwargs):
        self.give_back()
        return super().load(*args, **kwargs)

    def partially_unload(self, device_to, memory_to_free=0, *args, **kwargs):
        packed = engine.packed_nbytes(self.model)
        self.give_back()
        left = memory_to_free - packed
        return packed + (
            super().partially_unload(device_to, left, *args, **kwargs) if left > 0 else 0
        )

    def patch_weight_to_device(self, key, *args, **kwargs):
        layer = self.model.get_submodule(key.rpartition(".")[0])
        # In 16 bits, a patch would be rounded.
        if isinstance(layer, CastLinear) and key in self.patches:
            layer.weight = torch.nn.Parameter(layer.weight.float(), False)
        return super().patch_weight_to_device(key, *args, **kwargs)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.give_back()
        return super().unpatch_model(device_to, unpatch_weights)

    def give_back(self) -> None:
        """Free what the engine has made of the model, whose layers become ComfyUI's."""
        engine.release(self.model)
        _stream(self.model, self.load_device)

    def take(self) -> None:
        """Make the layers torch's own, which the engine knows, if no weight is left in main memory
        or patched in every step."""
        layers = [layer for layer in self.model.modules() if type(layer) in PLAIN]
        if not any(
            layer.comfy_cast_weights or layer.weight_function or layer.bias_function
            for layer in layers
        ):
            for layer in layers:
                layer.__class__ = PLAIN[type(layer)]


@dataclass(frozen=True)
class Loaded(VAE):
    """A pipeline, and the patchers through which ComfyUI moves its two modules between devices.
    ComfyUI's nodes may take its image tokenizer for a VAE.

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
        positions = shape.max_prompt + shape.positions(rows, columns)
        memory = KVCache.nbytes(shape, 2 * count, positions, dtype)
        patchers = [self.model]
        if previews_wanted():
            patchers.append(self.vq)
            memory += self._working(1, settings.width * settings.height, True)
        comfy.model_management.load_models_gpu(patchers, memory_required=memory)
        self.model.take()
        return self.pipeline

    def with_vq(
        self, pictures: int, pixels: int, save_memory: bool = False, encode: bool = False
    ) -> Pipeline:
        """The pipeline, with its image tokenizer on the device and room to decode or `encode`
        `pictures` pictures with `pixels` pixels each."""
        memory = self._working(pictures, pixels, save_memory, encode)
        comfy.model_management.load_models_gpu([self.vq], memory_required=memory)
        return self.pipeline

    def decode_codes(self, codes: torch.Tensor, save_memory: bool = False) -> torch.Tensor:
        """Codes int64 (B, h, w) -> images float32 (B, H, W, 3) in 0..1. Raises ValueError."""
        pictures, rows, columns = codes.shape
        pixels = rows * columns * self.stride**2
        pipeline = self.with_vq(pictures, pixels, save_memory)
        with decoding(self.name, pictures * pixels):
            return pipeline.decode(codes, save_memory, self.vq.load_device)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images float (B, H, W, 3) in 0..1 -> codes int64 (B, h, w). What is more than a multiple
        of the stride is cut off on both sides alike, as by ComfyUI's VAE. Raises ValueError."""
        height, width = images.shape[1:3]
        rows, columns = (side - side % self.stride for side in (height, width))
        if not (rows and columns):
            raise ValueError(
                f"a picture of {width}x{height} is smaller than one code of {self.name}, which "
                f"stands for {self.stride}x{self.stride} pixels"
            )
        if (rows, columns) != (height, width):
            top, left = (height - rows) // 2, (width - columns) // 2
            images = images[:, top : top + rows, left : left + columns]
            say(f"cropped from {width}x{height} to {columns}x{rows}")
        pipeline = self.with_vq(len(images), rows * columns, encode=True)
        return pipeline.encode(images, self.vq.load_device)

    @property
    def stride(self) -> int:
        return self.pipeline.config.image_tokenizer.stride

    @cached_property
    @torch.inference_mode()
    def codebook(self) -> Codebook:
        quantizer = self.pipeline.image_tokenizer.quantizer
        weight = quantizer.codebook.weight
        vectors = quantizer.vectors(torch.arange(len(weight), device=weight.device)[None, None])
        return Codebook(self.name, vectors[0, :, 0].T.float().cpu().contiguous(), self.stride)

    @cached_property
    def colours(self) -> preview.Colours:
        """Those of the checkpoint's codes, which its pictures go on to correct."""
        return preview.Colours(self.pipeline, self.vq.load_device)

    def _working(self, pictures: int, pixels: int, save_memory: bool, encode: bool = False) -> int:
        return self.pipeline.image_tokenizer.working_nbytes(
            pictures, pixels, self.vq.load_device, save_memory, encode
        )


def check_ours(vq: object) -> None:
    """Raises ValueError for a VAE of another kind, which the sockets cannot tell from ours."""
    if not isinstance(vq, Loaded):
        raise ValueError(
            "this VAE is not the image tokenizer of a Token-Shuffle model: connect the vq of the "
            "node that loads the model"
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
    dtype = model_dtype(device)
    if management.is_device_cpu(device) and dtype == torch.float32:
        dtype = None  # which keeps 16-bit weights as they are
    pipeline = load(path, offload, dtype, weights=weights)
    vae_device = management.vae_device()
    pipeline.image_tokenizer.to(management.vae_dtype(vae_device))
    pipeline.image_tokenizer.decode_dtype = management.vae_dtype(vae_device, [torch.float16])
    _stream(pipeline.model, device)
    _stream(pipeline.image_tokenizer, vae_device)
    return Loaded(
        name,
        pipeline,
        EnginePatcher(pipeline.model, device, offload),
        ModelPatcher(pipeline.image_tokenizer, vae_device, management.vae_offload_device()),
    )


def _stream(module: torch.nn.Module, device: torch.device) -> None:
    """Let weights of `module` stay in main memory if they do not fit on the device.

    ComfyUI's layers compute the same as torch's, and fetch such weights. On a CPU there is nothing
    to fetch, and their overhead would be some 6 % of a step.
    """
    if comfy.model_management.is_device_cpu(device):
        return
    for layer in module.modules():
        if type(layer) in HOSTED:
            layer.__class__ = HOSTED[type(layer)]
            layer.bias = getattr(layer, "bias", None)  # the host looks for it in every layer


def with_lora(loaded: Loaded, name: str, strength: float) -> Loaded:
    """The same weights with a LoRA as a patch, which ComfyUI applies while this one is in use."""
    path = lora_path(name)
    changes = read_lora(path, loaded.pipeline.model, strength)
    keys = {layer: f"{layer}.weight" for layer in changes}
    stored = comfy.utils.load_torch_file(str(path), safe_load=True)
    # Not views of the file, which may be replaced: the patches are applied again and again.
    patches = comfy.lora.load_lora({key: tensor.clone() for key, tensor in stored.items()}, keys)
    patcher = loaded.model.clone()
    patcher.add_patches(patches, strength)
    return replace(loaded, model=patcher)
