"""Seconds between two places of a workflow, to compare models."""

import time

from comfy_api.latest import io

from . import host
from .types import CATEGORY


class TokenShuffleStopwatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleStopwatch",
            display_name="Token-Shuffle Stopwatch",
            category=CATEGORY,
            description=(
                "Passes a value through and records the time. Put one before and one after what "
                "you want to time, and connect the time of the first to the since of the second."
            ),
            inputs=[
                io.AnyType.Input("value", tooltip="Any value. It passes through unchanged."),
                io.Float.Input(
                    "since",
                    optional=True,
                    force_input=True,
                    tooltip="The time of an earlier stopwatch. This one then runs after it and "
                    "shows the seconds in between.",
                ),
            ],
            outputs=[
                io.AnyType.Output(display_name="value", tooltip="The same value."),
                io.Float.Output(display_name="time", tooltip="For the since of another stopwatch."),
            ],
            is_deprecated=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return float("nan")  # never the same as before: what is timed runs each time

    @classmethod
    def execute(cls, value, since: float | None = None) -> io.NodeOutput:
        now = time.perf_counter()
        if since is not None:
            host.say(f"{now - since:.2f} s")
        return io.NodeOutput(value, now)
