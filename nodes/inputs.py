"""Inputs that several nodes share."""

from comfy_api.latest import io

from ..tokenshuffle_core.config import SCHEDULES
from .types import Prompt


def positive() -> Prompt.Input:
    return Prompt.Input("positive", tooltip="What the picture should show.")


def negative() -> Prompt.Input:
    return Prompt.Input(
        "negative",
        optional=True,
        tooltip="What the picture should not show. Not connected, guidance points away from a "
        "picture without any prompt.",
    )


def pixels(
    name: str,
    default: int = 128,
    minimum: int = 16,
    tooltip: str = "Models draw best at the sizes they were trained on.",
) -> io.Int.Input:
    return io.Int.Input(
        name, default=default, min=minimum, max=8192, step=16, tooltip=f"In pixels. {tooltip}"
    )


def seed() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The same seed and settings give the same picture.",
    )


def cfg() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=2.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="How closely to follow the prompt. 1 turns guidance off.",
    )


def schedule() -> io.Combo.Input:
    return io.Combo.Input(
        "schedule",
        options=list(SCHEDULES),
        default="half-linear",
        tooltip=(
            "How guidance grows from the first token to the last. half-linear, the paper's choice: "
            "over the first half of the picture, then it stays."
        ),
    )


def window() -> io.Int.Input:
    return io.Int.Input(
        "window",
        default=0,
        min=0,
        max=16,
        optional=True,
        tooltip="How many tokens along each side are drawn in one step, of those that the model "
        "serves: a larger window is faster and coarser. 0 is the model's own.",
    )


def options() -> list[io.Input]:
    return [
        schedule(),
        io.Float.Input(
            "temperature",
            default=0.3,
            min=0.0,
            max=10.0,
            step=0.05,
            round=0.01,
            tooltip="Lower is smoother and safer, higher more varied. 0 always takes the likeliest "
            "token.",
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
            tooltip="Choose among the likeliest tokens that together have this probability. 1 is "
            "off.",
        ),
    ]
