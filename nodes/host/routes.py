"""The HTTP routes for the page."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ...tokenshuffle_core.checks import check_text
from .. import description
from .durations import durations
from .paths import checkpoint_path, version

MAX_BODY = 2**17  # bytes


@PromptServer.instance.routes.get("/tokenshuffle/model")
async def describe_model(request: web.Request) -> web.Response:
    """The card, sizes, settings, names and durations of ?checkpoint=NAME&language=en."""
    name, language = request.query.get("checkpoint"), request.query.get("language", "en")
    if not name:
        return _refused("say which model: ?checkpoint=NAME")

    def describe(path: Path, version: str) -> dict:
        return description.describe(path, version, language) | durations(name)

    return await _answer(name, describe)


@PromptServer.instance.routes.post("/tokenshuffle/prompt")
async def read_prompt(request: web.Request) -> web.Response:
    """{"checkpoint": NAME, "text": PROMPT, "language": "en"} -> what the model reads of it."""
    sent = bytearray()
    async for part in request.content.iter_any():
        sent += part
        if len(sent) > MAX_BODY:
            return _refused(f"the request has more than {MAX_BODY} bytes: shorten the prompt", 413)
    try:
        body = json.loads(sent)
    except (ValueError, RecursionError) as error:
        return _refused(f"the request is not JSON: {error}")
    fields = {"language": "en"} | body if isinstance(body, dict) else {}
    for name in ("checkpoint", "text", "language"):
        if name not in fields:
            return _refused(f'the request must be a JSON object with "{name}"')
        try:
            check_text(f'"{name}"', fields[name])
        except ValueError as error:
            return _refused(str(error))
    read = partial(description.read_prompt, text=fields["text"], language=fields["language"])
    return await _answer(fields["checkpoint"], read)


def _refused(why: str, status: int = 400) -> web.Response:
    return web.json_response({"error": why}, status=status)


async def _answer(name: str, describe: Callable[[Path, str], dict]) -> web.Response:
    """The result of `describe` for a checkpoint, or {"error": a sentence} for the page to show."""

    def answer() -> dict:
        path = checkpoint_path(name)
        return describe(path, version(path))

    try:
        return web.json_response(await asyncio.to_thread(answer))
    except (ValueError, OSError) as error:
        return web.json_response({"error": str(error)})
