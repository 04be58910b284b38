"""Progress, previews and interrupts of a running node."""

import re
import time
from collections.abc import Callable, Iterator

import comfy.model_management
import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from ...tokenshuffle_core.sampler import Progress
from .durations import note_sampled


def previews_wanted() -> bool:
    """The user's preview setting; it may change from one prompt to the next."""
    return args.preview_method != LatentPreviewMethod.NoPreviews


def follow(
    name: str,
    steps: Iterator[Progress],
    picture_of: Callable[[Progress], Image.Image | None] | None,
) -> Progress:
    """Run all `steps` of checkpoint `name` and return the last. Can be interrupted at every step;
    shows progress, speed and any previews from `picture_of` on the node."""
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
    seconds = time.perf_counter() - started
    note_sampled(name, step.window, len(step.windows), step.positions, seconds)
    return step


def say(text: str) -> None:
    """Show a line of text on the running node."""
    # A name in it may be from a stranger's workflow. Some pages take it for HTML, of which the
    # oldest runs all; others show it as it is, escapes too. With an invisible word joiner behind
    # them, < and & are themselves in each.
    shown = re.sub("[<&]", "\\g<0>\u2060", text).encode("utf-8", "replace")
    PromptServer.instance.send_progress_text(shown, get_executing_context().node_id)


def _speed(step: Progress, seconds: float) -> str:
    """Short enough for a node as narrow as a new one. web/texts.js translates it."""
    rate = step.position / seconds
    done = f"{step.position} / {step.positions}"
    if step.position == step.positions:
        return f"{done} positions, {rate:.1f}/s"
    left = round((step.positions - step.position) / rate)
    return f"{done}, {rate:.1f}/s, {left // 60}:{left % 60:02} left"
