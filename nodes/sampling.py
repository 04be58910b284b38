"""From a prompt to image tokens."""

from comfy_api.latest import io

from ..tokenshuffle_core.config import SCHEDULES, GenerationConfig
from . import host
from .types import CATEGORY, Codes, Model, Prompt


class TokenShufflePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShufflePrompt",
            display_name="Token-Shuffle Prompt",
            category=CATEGORY,
            description=(
                "Turns text into the model's tokens, as a positive or a negative prompt. A model "
                "knows only what it was trained on: its model card lists the subjects."
            ),
            inputs=[
                Model.Input("model", tooltip="The model whose text tokenizer reads the prompt."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip=(
                        "What the picture shows, in the style of the captions that the model was "
                        "trained on. The model card lists the subjects it knows."
                    ),
                ),
            ],
            outputs=[
                Prompt.Output(display_name="prompt", tooltip="Connect to positive or negative.")
            ],
            **host.search_aliases("text encode", "token shuffle", "positive", "negative"),
        )

    @classmethod
    def execute(cls, model: host.Loaded, text: str) -> io.NodeOutput:
        return io.NodeOutput(model.pipeline.encode_prompt(text))


class TokenShuffleSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleSampler",
            display_name="Token-Shuffle Sampler",
            category=CATEGORY,
            description=(
                "Writes a picture as image tokens, one window of tokens per step, row by row. "
                "Decode them with Token-Shuffle VQ Decode."
            ),
            inputs=[
                Model.Input("model", tooltip="The model that writes the tokens."),
                Prompt.Input("positive", tooltip="What the picture should show."),
                Prompt.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "What the picture should not show. Not connected, guidance points away "
                        "from a picture without any prompt."
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=128,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="In pixels. Models draw best at the sizes they were trained on.",
                ),
                io.Int.Input(
                    "height",
                    default=128,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="In pixels. Models draw best at the sizes they were trained on.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many pictures to draw at once.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed and settings give the same picture.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely to follow the prompt. 1 turns guidance off.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="half-linear",
                    tooltip=(
                        "How guidance grows from the first token to the last. half-linear, the "
                        "paper's choice: over the first half of the picture, then it stays."
                    ),
                ),
                io.Float.Input(
                    "temperature",
                    default=0.3,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    round=0.01,
                    tooltip="Lower is smoother and safer, higher more varied. 0 always takes the "
                    "likeliest token.",
                ),
                io.Int.Input(
                    "top_k",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Choose among this many likeliest tokens only. 0 is off.",
                ),
                io.Float.Input(
                    "top_p",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Choose among the likeliest tokens that together have this "
                    "probability. 1 is off.",
                ),
            ],
            outputs=[
                Codes.Output(display_name="codes", tooltip="Image tokens, for the VQ decoder.")
            ],
            **host.search_aliases("ksampler", "token shuffle", "autoregressive", "text to image"),
        )

    @classmethod
    def execute(
        cls,
        model: host.Loaded,
        positive: list[int],
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        cfg: float,
        schedule: str,
        temperature: float,
        top_k: int,
        top_p: float,
        negative: list[int] | None = None,
    ) -> io.NodeOutput:
        settings = GenerationConfig(width, height, cfg, schedule, temperature, top_k, top_p)
        pipeline = model.with_model(settings, batch_size)
        steps = pipeline.sample(positive, negative or [], settings, seed=seed, count=batch_size)
        return io.NodeOutput(host.follow(steps).codes.cpu())
