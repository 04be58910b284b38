"""All that touches ComfyUI's own modules: the nodes know nothing of them but their schemas."""

from dataclasses import fields

from comfy_api.latest import io

from . import routes
from .memory import Loaded, load_checkpoint, with_lora
from .paths import (
    LORAS,
    SAVED_CODES,
    checkpoint_path,
    checkpoints,
    codes_path,
    loras,
    modified,
    output_path,
    saved_codes,
    written,
)
from .progress import follow, previews_wanted, say


def search_aliases(*names: str) -> dict[str, list[str]]:
    """Arguments for io.Schema. ComfyUI 0.3 does not know this field yet."""
    known = any(field.name == "search_aliases" for field in fields(io.Schema))
    return {"search_aliases": list(names)} if known else {}
