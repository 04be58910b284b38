"""ComfyUI-TokenShuffle: what ComfyUI imports."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # Imported here and not above: pytest imports this file too, where there is no ComfyUI.
    from .nodes import TokenShuffleExtension

    return TokenShuffleExtension()
