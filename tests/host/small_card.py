"""Samples inside ComfyUI's memory management, on the CPU and then as if a card had little memory;
prints JSON, last of all the dtype that the model gets with each of ComfyUI's options.

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
from pathlib import Path

clone, pack, checkpoint, *sizes = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, clone)

import comfy.options  # noqa: E402

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

settings = GenerationConfig(32, 48, cfg=2.0)
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
    *_, plain = load().sample([prompt], [], settings, [3], engine=False)
    packed = packed_nbytes(model)
    size, loaded_size = loaded.model.model_size(), loaded.model.loaded_size()
    management.unload_all_models()
    return {
        "same_codes": bool((step.codes == plain.codes).all()),
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


def sample() -> dict:
    loaded = host.load_checkpoint(Path(checkpoint).name)
    pipeline = loaded.with_model(settings, 1)
    *_, step = pipeline.sample([prompt], [], settings, [3], device=loaded.model.load_device)
    model = {"loaded": loaded.model.loaded_size(), "size": loaded.model.model_size()}
    pipeline = loaded.with_vq(1, 32 * 48)
    image = pipeline.decode(step.codes, device=loaded.vq.load_device)
    vq = {"loaded": loaded.vq.loaded_size(), "size": loaded.vq.model_size()}
    codes = pipeline.encode(image, loaded.vq.load_device)
    known = len(management.loaded_models())
    management.unload_all_models()
    return {
        "model": model,
        "vq": vq,
        "same_codes": bool((step.codes == expected.codes).all()),
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

management.get_free_memory = lambda *_, **__: float(2**40)
dtypes = {}
for option in ("force_fp16", "fp32_unet", "bf16_unet", "fp16_unet", "fp8_e4m3fn_unet"):
    setattr(management.args, option, True)
    loaded = host.load_checkpoint(Path(checkpoint).name)
    setattr(management.args, option, False)
    dtypes[option] = str(loaded.model.model.head.weight.dtype)
print(json.dumps({"dtypes": dtypes}))
