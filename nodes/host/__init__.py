"""All code that imports ComfyUI's internal modules; the nodes themselves only use comfy_api."""

from dataclasses import fields

from comfy_api.latest import io

import nodes

from . import routes
from .memory import Loaded, check_ours, load_checkpoint, with_lora
from .paths import (
    SAVED_CODES,
    checkpoint_path,
    checkpoints,
    codes_path,
    lora_path,
    loras,
    output_path,
    saved_codes,
    version,
)
from .progress import follow, previews_wanted, say

LATENT_CATEGORY = nodes.VAEDecode.CATEGORY  # of ComfyUI's own, which has renamed it


def search_aliases(*languages: str) -> dict[str, list[str]]:
    """Arguments for io.Schema, which lacks this field in ComfyUI 0.3: what people type, one string
    a language, separated by commas."""
    exists = any(field.name == "search_aliases" for field in fields(io.Schema))
    return {"search_aliases": ", ".join(languages).split(", ")} if exists else {}
