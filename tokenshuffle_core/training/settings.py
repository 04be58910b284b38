"""The settings of a training. Each field with a line of help is an option of `tokenshuffle train`
and a key of a recipe file; its default is defined only here. Does not import torch, because the
command line imports this file for `--help`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from reprlib import repr as short
from types import UnionType
from typing import Any, get_args, get_origin

PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "muon")
MOST = 2**53  # of a number; beyond it, a float skips whole numbers
MAX_RANK = 1024  # of a LoRA
PRESET = "small"  # of `config.PRESETS`
KINDS: dict[Any, tuple[tuple, str]] = {  # of a field -> types of its value in TOML, their name
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    Path: ((str,), "text"),
}


def _check_numbers(settings) -> None:
    """Raises ValueError for a number that is not finite, or too large to count or to seed with."""
    for name, value in vars(settings).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not abs(number) < MOST:
                raise ValueError(f"{name} must be a number below {MOST:.0e}, not {short(number)}")


def setting(default, help: str, **more):
    """A field with a line of help; `more` goes to argparse's `add_argument`."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class LoopConfig:
    """How long and how a module is trained; the defaults are for the model.

    For `compile`, `checkpointing` and `shard` see `distributed.spread`. They, the precision and the
    accumulation change speed and memory, not what is learnt. For `minutes` see `schedule.Schedule`.
    """

    steps: int = setting(15000, "how many steps to train for")
    batch: int = setting(16, "samples per step, in all processes together")
    learning_rate: float = setting(1.2e-3, "peak learning rate", metavar="RATE")
    warmup: int = setting(100, "steps until the learning rate reaches its peak", metavar="STEPS")
    final_learning_rate: float = setting(
        0.02, "final learning rate, as a share of the peak", metavar="SHARE"
    )
    weight_decay: float = setting(0.01, "weight decay of matrices", metavar="RATE")
    clip: float = setting(1.0, "largest norm of the gradient", metavar="NORM")
    ema: float = setting(
        0.99, "decay of the moving average of the weights, less in the first steps", metavar="DECAY"
    )
    minutes: float = setting(
        0.0,
        "minutes to train for, instead of --steps: the learning rate falls by the clock (default: "
        "none)",
        metavar="N",
    )
    optimizer: str = setting(
        "adamw", "for the matrices of transformer and fuse blocks; the rest uses adamw",
        choices=OPTIMIZERS,
    )  # fmt: skip
    seed: int = setting(0, "random seed")
    validate_every: int = setting(500, "steps between validations", metavar="STEPS")
    save_minutes: float = setting(5.0, "minutes between saved states and checkpoints", metavar="N")
    accumulation: int = setting(
        1, "pieces that a process splits its part of the batch into", metavar="N"
    )
    precision: str = setting(
        "fp32", "arithmetic precision; weights are stored as fp32", choices=PRECISIONS
    )
    compile: bool = setting(False, "compile the model with torch.compile")
    checkpointing: bool = setting(
        False, "recompute the activations of each block in the backward pass: less memory"
    )
    shard: bool = setting(False, "divide the weights among the processes of torchrun (FSDP)")

    def __post_init__(self):
        _check_numbers(self)
        for name in ("steps", "batch", "validate_every", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("minutes", "warmup", "weight_decay", "save_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(
                f"final_learning_rate must be a share from 0 to 1, not {self.final_learning_rate}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, not {self.ema}")
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )
        if self.optimizer == "muon" and self.shard:
            raise ValueError(
                "muon needs whole matrices, and shard divides them: leave out shard, or choose "
                "optimizer adamw"
            )

    def learning_rate_at(self, step: int, progress: float = 0.0) -> float:
        """Of step `step`; with `minutes`, after the share `progress` of them. The warm-up is in
        steps in any case, because the first ones, in which shapes are compiled, are slow."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if not self.minutes:
            progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        final = self.final_learning_rate
        return self.learning_rate * warm * (final + (1 - final) * cosine)

    def ema_at(self, step: int) -> float:
        """The decay after step `step`: smaller at first, so that the average of a short training,
        or of one that has just begun, is not mostly of the initial weights."""
        return min(self.ema, (1 + step) / (10 + step))


TOKENIZER = LoopConfig(steps=3200, batch=12, learning_rate=2e-3)  # defaults for the image tokenizer


@dataclass(frozen=True)
class Recipe:
    """How a training step uses its pictures, and its losses.

    Dropped captions train the unconditional branch of classifier-free guidance. `context_noise`
    keeps a model from memorising a small data set (see `feed.with_foreign`); set it to 0
    for a large one.
    """

    drop_prompt: float = setting(0.1, "share of captions that are dropped", metavar="SHARE")
    context_noise: float = setting(
        0.8,
        "largest share of a picture's context that is replaced by windows of another, so that a "
        "small data set is not memorised; 0 for a large one",
        metavar="SHARE",
    )
    z_loss: float = setting(0.0, "weight of the z-loss (paper: at 2048 px)", metavar="WEIGHT")
    text_loss: float = setting(0.0, "weight of the loss on text tokens", metavar="WEIGHT")
    window_mix: tuple[float, ...] | None = setting(
        None, "how often each of --windows is trained (default: equally often)", metavar="SHARE,..."
    )

    def __post_init__(self):
        _check_numbers(self)
        for name in ("drop_prompt", "context_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, not {getattr(self, name)}")
        if self.window_mix and not (min(self.window_mix) >= 0 < sum(self.window_mix)):
            raise ValueError(
                f"window_mix must be shares of at least 0, not all 0, but it is {self.window_mix}"
            )
        for name in ("z_loss", "text_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class Stage:
    """One training: its codes, its settings, and how it changes the model before it."""

    name: str
    codes: Path
    loop: LoopConfig
    recipe: Recipe
    windows: tuple[int, ...] | None = setting(
        None, "windows that the model supports, the default one first; --init grows to them",
        metavar="N,N,...",
    )  # fmt: skip
    window_head: int = setting(
        0, "width of a head that predicts the codes of a window autoregressively (default: none)",
        metavar="WIDTH",
    )  # fmt: skip
    lora: int = setting(
        0, "rank of a LoRA, to train that alone (default: none)", metavar="RANK",
    )  # fmt: skip
    freeze: tuple[str, ...] = setting(
        (), "parts that are not trained, such as transformer,text_embedding", metavar="PART,..."
    )

    def __post_init__(self):
        check_rank(self.lora)
        if self.lora and (self.windows or self.window_head or self.freeze):
            raise ValueError(
                "lora leaves the rest of the model unchanged: give it without windows, window_head "
                "and freeze, in a stage of its own"
            )


def check_rank(lora: int) -> None:
    """Raises ValueError for what is no rank of a LoRA, nor 0 for none."""
    if not 0 <= lora <= MAX_RANK:
        raise ValueError(
            f"lora must be a rank from 1 to {MAX_RANK}, or 0 for none, not {short(lora)}"
        )


def settings_of(part: type) -> dict[str, Any]:
    """Name -> type of the fields of a dataclass, without the parts of a stage."""
    return {f.name: f.type for f in fields(part) if f.type not in (LoopConfig, Recipe)}


def check_table(where: str, given: Any, *parts: type) -> None:
    """Raises ValueError unless `given`, from TOML, is a table of fields of the dataclasses `parts`
    with values of their types."""
    known = {name: kind for part in parts for name, kind in settings_of(part).items()}
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a table, not {short(given)}")
    if unknown := sorted(given.keys() - known):
        name = short(unknown[0])
        raise ValueError(f"{where} has no key {name}, only {', '.join(sorted(known))}")
    for name, value in given.items():
        kind, fits = _kind(known[name])
        if not fits(value):
            raise ValueError(f"{where}: {name} must be {kind}, not {short(value)}")


def item_kind(annotation) -> type | None:
    """The type of the items of a list; None if `annotation` is not for a list."""
    if isinstance(annotation, UnionType):
        annotation = get_args(annotation)[0]
    return get_args(annotation)[0] if get_origin(annotation) is tuple else None


def _kind(annotation) -> tuple[str, Callable[[Any], bool]]:
    """What a value from TOML must be for a field with this annotation, in words and as a test."""
    if isinstance(annotation, UnionType):  # `... | None`: TOML has no null
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        name, fits = _kind(get_args(annotation)[0])
        return f"a list, each {name}", lambda value: type(value) is list and all(map(fits, value))
    if get_origin(annotation) is dict:
        return (
            "a table of texts",
            lambda value: type(value) is dict and all(type(text) is str for text in value.values()),
        )
    kinds, name = KINDS[annotation]
    return name, lambda value: type(value) in kinds
