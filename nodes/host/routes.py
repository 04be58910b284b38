"""The HTTP routes for the page."""

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
    """The card, sizes, settings and speed of ?checkpoint=NAME."""
    name = request.query.get("checkpoint")

    def describe(path: Path, modified: float) -> dict:
        return description.describe(path, modified) | {"speed": SPEEDS.get(name)}

    return await _answer(name, describe)


@PromptServer.instance.routes.post("/tokenshuffle/tokens")
async def count_tokens(request: web.Request) -> web.Response:
    """{"checkpoint": NAME, "text": PROMPT} -> {"tokens": its length, "limit": the most allowed}."""
    body = await request.json()
    count = partial(description.count_tokens, text=str(body.get("text")))
    return await _answer(body.get("checkpoint"), count)


async def _answer(name: str | None, describe: Callable[[Path, float], dict]) -> web.Response:
    """The result of `describe` for a checkpoint, or {"error": a sentence} for the page to show."""
    try:
        path = checkpoint_path(str(name))
        answer = await asyncio.to_thread(describe, path, written(path))
    except (ValueError, OSError) as error:
        answer = {"error": str(error)}
    return web.json_response(answer)
