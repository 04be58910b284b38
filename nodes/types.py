"""What flows between the nodes. `host.Loaded` is the value of both Model and VQ."""

from dataclasses import dataclass

from comfy_api.latest import io

from . import host

CATEGORY = f"{host.LATENT_CATEGORY}/autoregressive"

Model = io.Custom("TOKENSHUFFLE_MODEL")
VQ = io.Vae  # ComfyUI's own nodes can use it as well
Prompt = io.Custom("TOKENSHUFFLE_PROMPT")  # PromptText
Codes = io.Latent  # see `latents`
Options = io.Custom("TOKENSHUFFLE_OPTIONS")  # dict: fields of GenerationConfig


@dataclass(frozen=True)
class PromptText:
    """A prompt, which the model that draws it reads: token ids mean something else to another."""

    text: str
    kind: str  # what the model reads that it was made with: "text" or "classes"
    model: str  # the name of that model
