"""Inputs that several nodes share.

Those with a widget are optional: what a prompt through the API leaves out is the model's own, as
the page fills them in. All of a node's, since the page puts optional widgets behind the others, and
a saved workflow has the values of widgets in their order.
"""

from comfy_api.latest import io

from ..tokenshuffle_core.config import SCHEDULES
from .types import Prompt


def positive() -> Prompt.Input:
    return Prompt.Input("positive", tooltip="What the picture should show.")


def negative() -> Prompt.Input:
    return Prompt.Input(
        "negative",
        optional=True,
        tooltip="What the picture should not show. If empty or not connected, guidance steers away "
        "from the model's own negative prompt or, if it has none, from what it draws without a "
        "prompt.",
    )


def pixels(
    name: str,
    default: int = 128,
    minimum: int = 16,
    tooltip: str = "Choose a size that the model was trained at: others need any_size of "
    "Token-Shuffle Options, if the model card lists its sizes.",
) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=default,
        min=minimum,
        max=8192,
        step=16,
        optional=True,
        tooltip=f"In pixels. {tooltip}",
    )


def seed() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        optional=True,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The same seed and settings give the same picture on the same device.",
    )


def cfg() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=3.0,
        optional=True,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="Guidance scale: how closely to follow the prompt. 1 turns guidance off.",
    )


def schedule() -> io.Combo.Input:
    return io.Combo.Input(
        "schedule",
        options=list(SCHEDULES),
        default="half-linear",
        optional=True,
        tooltip=(
            "How guidance grows over the picture: constant not at all, linear up to the end, "
            "half-linear (the paper's choice) over the first half."
        ),
    )


def window() -> io.Int.Input:
    return io.Int.Input(
        "window",
        default=0,
        min=0,
        max=16,
        optional=True,
        tooltip="Side of the window of codes that one step generates: larger is faster and "
        "coarser. Use a size that the model supports; 0 is the model's default.",
    )


def options() -> list[io.Input]:
    return [
        schedule(),
        io.Float.Input(
            "temperature",
            default=0.85,
            optional=True,
            min=0.0,
            max=10.0,
            step=0.05,
            round=0.01,
            tooltip="Lower is smoother and safer, higher more varied. 0 always takes the most "
            "likely code.",
        ),
        io.Int.Input(
            "top_k",
            default=0,
            optional=True,
            min=0,
            max=65536,
            tooltip="Sample only from this many of the most likely codes. 0 is off.",
        ),
        io.Float.Input(
            "top_p",
            default=1.0,
            optional=True,
            min=0.01,
            max=1.0,
            step=0.01,
            round=0.001,
            tooltip="Sample only from the most likely codes whose probabilities add up to this. "
            "1 is off.",
        ),
    ]
