"""The settings of a training. Each field with a line of help is an option of `tokenshuffle train`
and a key of a recipe file; its default stands here alone. Imports no torch, as the command line
reads it for `--help`.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

PRECISIONS = ("fp32", "bf16")
PRESET = "small"  # of `config.PRESETS`
KINDS: dict[Any, tuple[tuple, str]] = {  # of a field -> of its value in TOML
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    Path: ((str,), "text"),
}


def setting(default, help: str, **more):
    """A field with a line of help; `more` goes to argparse's `add_argument`."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class LoopConfig:
    """How long and how a module is trained; the defaults are those of a model.

    What `compile`, `checkpointing` and `shard` do is described at `distributed.spread`. They, the
    precision and the accumulation change speed and memory, not what is learnt.
    """

    steps: int = setting(15000, "how many steps to train for")
    batch: int = setting(16, "samples of a step, in all processes together")
    learning_rate: float = setting(1.2e-3, "learning rate at its peak", metavar="RATE")
    warmup: int = setting(100, "steps until the learning rate is at its peak", metavar="STEPS")
    final_learning_rate: float = setting(
        0.02, "where the learning rate ends, as a share of its peak", metavar="SHARE"
    )
    weight_decay: float = setting(0.01, "weight decay of matrices, by AdamW", metavar="RATE")
    clip: float = setting(1.0, "largest norm of the gradient", metavar="NORM")
    ema: float = setting(0.99, "decay of the weights' moving average", metavar="DECAY")
    seed: int = setting(0, "seed of all that is random")
    validate_every: int = setting(500, "steps between two validations", metavar="STEPS")
    save_minutes: float = setting(5.0, "minutes between two saved states", metavar="N")
    accumulation: int = setting(
        1, "pieces of the batch that a process computes one after another", metavar="N"
    )
    precision: str = setting(
        "fp32", "precision of the arithmetic; weights are fp32", choices=PRECISIONS
    )
    compile: bool = setting(False, "compile the model with torch.compile")
    checkpointing: bool = setting(
        False, "compute each block's activations again in the backward pass: less memory"
    )
    shard: bool = setting(False, "divide the weights among the processes of torchrun (FSDP)")

    def __post_init__(self):
        for name in ("steps", "batch", "validate_every", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}"
            )

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (
            self.final_learning_rate + (1 - self.final_learning_rate) * cosine
        )


TOKENIZER = LoopConfig(steps=3200, batch=12, learning_rate=2e-3)  # the image tokenizer's defaults


@dataclass(frozen=True)
class Recipe:
    """What a step does with its pictures.

    Dropped captions teach the unconditional branch. For `context_noise` see
    `ModelTask.foreign_windows`: it keeps a model from memorising a small data set; turn it down to
    0 for a large one, which is not memorised.
    """

    drop_prompt: float = setting(0.1, "share of the captions that are dropped", metavar="SHARE")
    context_noise: float = setting(
        0.8,
        "windows of other pictures mixed into the context, so that few pictures are not memorised; "
        "0 for large data sets",
        metavar="SHARE",
    )
    z_loss: float = setting(0.0, "weight of the z-loss (paper: at 2048 px)", metavar="WEIGHT")
    text_loss: float = setting(0.0, "weight of the loss of text tokens", metavar="WEIGHT")
    window_mix: tuple[float, ...] | None = setting(
        None, "how often each of --windows is trained (default: alike)", metavar="SHARE,..."
    )

    def __post_init__(self):
        for name in ("drop_prompt", "context_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, not {getattr(self, name)}")
        if self.window_mix and not (min(self.window_mix) >= 0 < sum(self.window_mix)):
            raise ValueError(f"window_mix must be shares from 0 on, not all 0: {self.window_mix}")
        for name in ("z_loss", "text_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class Stage:
    """One training: its data, and what it changes in the model before."""

    name: str
    codes: Path
    loop: LoopConfig
    recipe: Recipe
    windows: tuple[int, ...] | None = setting(
        None, "windows that the model serves, the default one first; --init grows to them",
        metavar="N,N,...",
    )  # fmt: skip
    window_head: int = setting(
        0, "width of a head that predicts the codes of a window one after another (default: none)",
        metavar="WIDTH",
    )  # fmt: skip
    freeze: tuple[str, ...] = setting(
        (), "parts that are not trained, such as transformer,text_embedding", metavar="PART,..."
    )


def check_kinds(where: str, given: dict[str, Any], part: type) -> None:
    """Raises ValueError for a value from TOML of another kind than the field of `part` has."""
    for known in fields(part):
        if known.name in given and not _fits(given[known.name], known.type):
            raise ValueError(
                f"{where}: {known.name} must be {_kind(known.type)}, not {given[known.name]!r}"
            )


def item_kind(annotation) -> type | None:
    """The kind of a list's items; None where `annotation` is not a list's."""
    if isinstance(annotation, UnionType):
        annotation = get_args(annotation)[0]
    return get_args(annotation)[0] if get_origin(annotation) is tuple else None


def _fits(value, annotation) -> bool:
    """Whether a value from TOML is one for a field annotated so."""
    if kind := item_kind(annotation):
        return type(value) is list and all(_fits(each, kind) for each in value)
    if isinstance(annotation, UnionType):
        return any(_fits(value, option) for option in get_args(annotation))
    if get_origin(annotation) is dict:
        return type(value) is dict and all(type(v) is str for v in value.values())
    return type(value) in KINDS.get(annotation, ((), ""))[0]


def _kind(annotation) -> str:
    if kind := item_kind(annotation):
        return f"a list, each {_kind(kind)}"
    if isinstance(annotation, UnionType):
        return _kind(get_args(annotation)[0])
    return "a table of texts" if get_origin(annotation) is dict else KINDS[annotation][1]
