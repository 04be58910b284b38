"""The HTTP routes for the page."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aiohttp import web
from server import PromptServer

from .. import description
from .durations import durations
from .paths import checkpoint_path, written


@PromptServer.instance.routes.get("/tokenshuffle/model")
async def describe_model(request: web.Request) -> web.Response:
    """The card, sizes, settings, names and durations of ?checkpoint=NAME&language=en."""
    name, language = request.query.get("checkpoint"), request.query.get("language", "en")

    def describe(path: Path, modified: float) -> dict:
        return description.describe(path, modified, language) | durations(name)

    return await _answer(name, describe)


@PromptServer.instance.routes.post("/tokenshuffle/prompt")
async def read_prompt(request: web.Request) -> web.Response:
    """{"checkpoint": NAME, "text": PROMPT, "language": "en"} -> what the model reads of it."""
    body = await request.json()
    text, language = str(body.get("text")), str(body.get("language", "en"))
    read = partial(description.read_prompt, text=text, language=language)
    return await _answer(body.get("checkpoint"), read)


async def _answer(name: str | None, describe: Callable[[Path, float], dict]) -> web.Response:
    """The result of `describe` for a checkpoint, or {"error": a sentence} for the page to show."""
    try:
        path = checkpoint_path(str(name))
        answer = await asyncio.to_thread(describe, path, written(path))
    except (ValueError, OSError) as error:
        answer = {"error": str(error)}
    return web.json_response(answer)
