"""What the page asks of the server."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aiohttp import web
from server import PromptServer

from .. import description
from .paths import checkpoint_path, written
from .progress import SPEEDS


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
