"""Samples inside ComfyUI's memory management, on the CPU and then as if a card had little memory;
prints JSON, last of all the dtype that the model gets with each of ComfyUI's options, and those of
the image tokenizer's weights and decoding.

    python small_card.py CLONE PACK CHECKPOINT FREE_BYTES...

Runs in a host's own Python. The device is the CPU, and the host is told that it is a card with
FREE_BYTES of free memory, one size after the other; all else is the host's own bookkeeping.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

clone, pack, checkpoint, *sizes = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, clone)

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")  # as main.py does, before another "utils" is found
import comfy.model_management as management  # noqa: E402
import folder_paths  # noqa: E402
from server import PromptServer  # noqa: E402

PromptServer(asyncio.new_event_loop())
folder_paths.add_model_folder_path("tokenshuffle", str(Path(checkpoint).parent))
spec = importlib.util.spec_from_file_location(
    "pack", Path(pack) / "__init__.py", submodule_search_locations=[pack]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
import pack.nodes.host as host  # noqa: E402
from pack.tokenshuffle_core.checkpoints import BUNDLED  # noqa: E402
from pack.tokenshuffle_core.config import GenerationConfig  # noqa: E402
from pack.tokenshuffle_core.engine import packed_nbytes  # noqa: E402
from pack.tokenshuffle_core.pipeline import load  # noqa: E402

settings = GenerationConfig(32, 48, cfg=2.0, any_size=True)
plain = load(checkpoint)
prompt = plain.encode_prompt("a red apple")
*_, expected = plain.sample([prompt], [], settings, [3], engine=False)


def on_the_cpu() -> dict:
    """What the host believes of a model that the engine has packed, and after unloading it."""
    loaded = host.load_checkpoint(BUNDLED.name)  # 16-bit weights, which the engine packs
    settings, prompt = loaded.pipeline.config.generation, loaded.pipeline.encode_prompt("a cat")
    before, model = loaded.model.model_size(), loaded.pipeline.model
    kept = {name: p.data_ptr() for name, p in model.named_parameters()}
    *_, step = loaded.with_model(settings, 1).sample([prompt], [], settings, [3])
    fast = model.transformer
    loaded.with_model(settings, 1)  # for the next picture
    kept_fast = model.transformer is fast
    *_, plain = load().sample([prompt], [], settings, [3], engine=False)
    packed = packed_nbytes(model)
    size, loaded_size = loaded.model.model_size(), loaded.model.loaded_size()
    management.unload_all_models()
    return {
        "same_codes": bool((step.codes == plain.codes).all()),
        "kept": kept_fast,
        "packed": packed,
        "more": size - before,
        "all_loaded": size == loaded_size,
        "after": packed_nbytes(model),
        "same_weights": kept == {name: p.data_ptr() for name, p in model.named_parameters()},
    }


print(json.dumps({"cpu": on_the_cpu()}))
management.is_device_cpu = lambda device: False
management.minimum_inference_memory = lambda: 0
management.extra_reserved_memory = lambda: 0


def codes_of(loaded: host.Loaded) -> torch.Tensor:
    steps = loaded.pipeline.sample([prompt], [], settings, [3], device=loaded.model.load_device)
    *_, step = steps
    return step.codes


def owners(loaded: host.Loaded) -> str:
    """Who has made the model's layers: "host", or "engine" of torch's own."""
    modules = {type(module).__module__ for module in loaded.pipeline.model.modules()}
    hosted = "comfy.ops" in modules
    return "host" * hosted + "engine" * any(".engine.cpu_" in name for name in modules)


def seam() -> dict:
    """Pictures before and after ComfyUI moves or patches weights that the engine has packed."""
    loaded = host.load_checkpoint(Path(checkpoint).name)
    model, patched = loaded.pipeline.model, replace(loaded, model=loaded.model.clone())
    weight = model.head.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    patched.model.add_patches({"head.weight": ("diff", (noise,))})
    owned, same, kept = {"new": owners(loaded)}, {}, {}

    def draw(name: str, loaded: host.Loaded, move: bool = True) -> None:
        if move:
            loaded.with_model(settings, 1)
        before = model.transformer
        same[name] = torch.equal(codes_of(loaded), expected.codes)
        owned[name], kept[name] = owners(loaded), model.transformer is before

    draw("first", loaded)
    draw("second", loaded)
    clone = loaded.model.clone()  # while the engine has packed weights
    draw("patched", patched)
    draw("without the patch", loaded)
    size, need = loaded.model.loaded_size(), packed_nbytes(model) + 1000
    management.free_memory(management.get_free_memory() + need, loaded.model.load_device)
    freed = size - loaded.model.loaded_size()
    fetched = sum(getattr(layer, "comfy_cast_weights", False) for layer in model.modules())
    owned["moved"] = owners(loaded)
    draw("streaming", loaded, move=False)
    draw("loaded again", loaded)
    sizes = {patcher.model_size() for patcher in (loaded.model, clone, patched.model)}
    management.unload_all_models()
    owned["unloaded"] = owners(loaded)
    return {
        "owned": owned,
        "same": same,
        "kept": kept,
        "freed": freed >= need,
        "fetched": fetched,
        "sizes": len(sizes),
    }


def sample() -> dict:
    loaded = host.load_checkpoint(Path(checkpoint).name)
    loaded.with_model(settings, 1)
    drawn = codes_of(loaded)
    packed = packed_nbytes(loaded.pipeline.model)
    model = {
        "loaded": loaded.model.loaded_size() - packed,
        "size": loaded.model.model_size() - packed,
        "owner": owners(loaded),
    }
    pipeline = loaded.with_vq(1, 32 * 48)
    image = pipeline.decode(drawn, device=loaded.vq.load_device)
    vq = {"loaded": loaded.vq.loaded_size(), "size": loaded.vq.model_size()}
    codes = pipeline.encode(image, loaded.vq.load_device)
    known = len(management.loaded_models())
    management.unload_all_models()
    return {
        "model": model,
        "vq": vq,
        "same_codes": bool((drawn == expected.codes).all()),
        "same_image": bool((image == plain.decode(expected.codes)).all()),
        "same_encoding": bool((codes == plain.encode(image)).all()),
        "known": known,
        "floor": "128 * 1024 * 1024" in inspect.getsource(management.load_models_gpu),
        "after": [loaded.model.loaded_size(), loaded.vq.loaded_size()],
    }


for size in map(int, sizes):
    # Without any memory: --novram, because some versions keep at least 128 MiB of a model loaded.
    state = management.VRAMState
    management.vram_state = state.NORMAL_VRAM if size else state.NO_VRAM
    management.get_free_memory = lambda *_, free=float(size), **__: free
    print(json.dumps(sample()))

management.get_free_memory = lambda *_, torch_free_too=False, **__: (
    (2.0**40, 0.0) if torch_free_too else 2.0**40
)
print(json.dumps({"seam": seam()}))
dtypes = {}
for option in ("force_fp16", "fp32_unet", "bf16_unet", "fp16_unet", "fp8_e4m3fn_unet"):
    setattr(management.args, option, True)
    loaded = host.load_checkpoint(Path(checkpoint).name)
    setattr(management.args, option, False)
    dtypes[option] = str(loaded.model.model.head.weight.dtype)
for option in ("fp32_vae", "fp16_vae", "bf16_vae"):
    setattr(management.args, option, True)
    module = host.load_checkpoint(Path(checkpoint).name).pipeline.image_tokenizer
    setattr(management.args, option, False)
    dtypes[option] = f"{module.quantizer.codebook.weight.dtype}, {module.decode_dtype}"
print(json.dumps({"dtypes": dtypes}))
