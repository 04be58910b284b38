"""A training in stages, from a recipe file in TOML: each stage trains on what the one before made.

    preset = "emoji"                  # with the tables [model] and [generation] to change it, or
    # init = "model.safetensors"      # to begin with a trained checkpoint
    image_tokenizer = "vq.safetensors"
    batch = 16                        # what stands here holds for every stage

    [[stage]]
    name = "256"
    codes = "codes-256"
    windows = [1]
    steps = 15000
    learning_rate = 1e-3

    [[stage]]
    name = "1024"
    codes = "codes-1024"
    windows = [2]                     # grows from the window before
    steps = 5000
    learning_rate = 3e-4
    z_loss = 1e-4

Paths are relative to where the command runs. A stage takes the fields of `Stage`, `LoopConfig` and
`Recipe`.
"""

import dataclasses
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..config import PRESETS, Config
from ..files import atomic_path
from . import state
from .distributed import barrier, rank
from .loop import LoopConfig
from .start import NEW, fresh_parts, trained_parts
from .train_model import CPU, Recipe, train_model

PLAN = "stage.json"  # in a stage's folder: what it was begun with
# Of LoopConfig, what does not change what is learnt: it may differ when a stage is resumed.
FREE = ("validate_every", "save_minutes", "accumulation", "compile", "checkpointing", "shard")
KINDS = {  # of a field -> of its value in TOML
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    Path: ((str,), "text"),
}
LIST = ((list,), "a list")
DEFAULTS = {"preset": "emoji", "batch": 16, "learning_rate": 1.2e-3, "warmup": 100, "ema": 0.99}


@dataclass(frozen=True)
class Stage:
    """One training: its data, and what it changes in the model before."""

    name: str
    codes: Path
    loop: LoopConfig
    recipe: Recipe
    windows: tuple[int, ...] | None = None
    window_head: int = 0
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stages:
    """A recipe. The first stage starts from the checkpoint `init`, or from fresh weights of the
    shape `preset` for the codes of `image_tokenizer`."""

    preset: Config
    stages: tuple[Stage, ...]
    init: Path | None = None
    image_tokenizer: Path = checkpoint.BUNDLED
    text_tokenizer: str | None = None
    vocabulary: int | None = None
    card: dict[str, str] = field(default_factory=dict)


def read_stages(path: str | Path) -> Stages:
    """Read a recipe file. Raises FileNotFoundError, or ValueError that names file and key."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        return parse_stages(parse_toml(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_toml(path: Path) -> dict:
    """Raises ValueError for what is no TOML."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def parse_stages(recipe: dict[str, Any]) -> Stages:
    """A recipe from the tables and values of its file. Raises ValueError that names the key."""
    given = DEFAULTS | recipe
    tables = given.pop("stage", [])
    if not isinstance(tables, list) or not tables:
        raise ValueError("a recipe needs at least one [[stage]]")
    shape = given.pop("model", {})
    if "vocabulary" in given:
        shape = shape | {"text_vocabulary": given["vocabulary"]}
    preset = _preset(given.pop("preset"), shape, given.pop("generation", {}))
    own = {f.name for f in fields(Stages)} - {"preset", "stages"}
    start = {name: given.pop(name) for name in own & given.keys()}
    for name in ("init", "image_tokenizer"):
        if name in start:
            start[name] = Path(start[name])
    if "init" in start and "image_tokenizer" in start:
        raise ValueError("init brings its own image_tokenizer: give one of them")
    stages = tuple(_stage(given | table, number) for number, table in enumerate(tables, 1))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages need different names, not {', '.join(names)}")
    return Stages(preset, stages, **start)


def _preset(name: str, model: dict, generation: dict) -> Config:
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
    preset = PRESETS[name]
    for table, values, known in (
        ("model", model, preset.model),
        ("generation", generation, preset.generation),
    ):
        _check_keys(f"[{table}]", values, {f.name for f in fields(known)})
    return replace(
        preset,
        model=replace(preset.model, **model),
        generation=replace(preset.generation, **generation),
    )


def _stage(given: dict[str, Any], number: int) -> Stage:
    name = str(given.get("name", number))
    loop = {f.name for f in fields(LoopConfig)}
    recipe = {f.name for f in fields(Recipe)}
    own = {f.name for f in fields(Stage)} - {"loop", "recipe"}
    _check_keys(f"stage {name}", given, loop | recipe | own)
    for needed in ("codes", "steps"):
        if needed not in given:
            raise ValueError(f"stage {name} needs {needed}")
    if Path(name).name != name:
        raise ValueError(f"stage name {name!r} becomes a folder's: choose one without slashes")
    for part in (LoopConfig, Recipe, Stage):
        _check_kinds(f"stage {name}", given | {"name": name}, part)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    values |= {"name": name, "codes": Path(given["codes"])}
    try:
        return Stage(
            loop=LoopConfig(**{k: v for k, v in values.items() if k in loop}),
            recipe=Recipe(**{k: v for k, v in values.items() if k in recipe}),
            **{k: v for k, v in values.items() if k in own},
        )
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}") from None


def _check_kinds(where: str, given: dict[str, Any], part: type) -> None:
    """Raises ValueError for a value of another kind than the field of `part` has."""
    for known in fields(part):
        types, kind = KINDS.get(known.type, LIST)
        if known.name in given and type(given[known.name]) not in types:
            raise ValueError(f"{where}: {known.name} must be {kind}, not {given[known.name]!r}")


def _check_keys(where: str, given: dict, known: set[str]) -> None:
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{where} has no key {unknown[0]!r}, only {', '.join(sorted(known))}")


def train_stages(recipe: Stages, directory: Path, device: torch.device = CPU) -> Path:
    """Train stage after stage in `directory`/NAME and return the last one's checkpoint.

    What is finished there is kept and what was interrupted is resumed. Raises ValueError where a
    stage was begun with another recipe, and as `train_model`.
    """
    final = recipe.init
    for i, stage in enumerate(recipe.stages):
        folder = directory / stage.name
        _claim(folder, _as_json(stage, None if i else recipe))
        before, final = final, folder / "final.safetensors"
        if not final.exists():
            train_model(
                stage.codes,
                folder,
                parts_of(recipe, i, before),
                stage.loop,
                stage.recipe,
                freeze=stage.freeze,
                resume=state.latest(folder) is not None,
                device=device,
            )
        barrier()  # process 0 writes what the others read in the next stage
    return final


def parts_of(recipe: Stages, index: int, before: Path | None) -> checkpoint.Checkpoint:
    """What stage `index` starts from; `before` is the checkpoint of the one before it, or `init`.

    Raises as `fresh_parts` and `trained_parts`.
    """
    stage = recipe.stages[index]
    shape = {"windows": stage.windows, "window_head": stage.window_head}
    about = {"card": recipe.card, "seed": stage.loop.seed}
    if before is None:
        text = recipe.text_tokenizer or NEW
        start = stage.codes, recipe.image_tokenizer, recipe.preset
        return fresh_parts(*start, text_tokenizer=text, **shape, **about)
    text = {}
    if index == 0:
        text = {"text_tokenizer": recipe.text_tokenizer, "vocabulary": recipe.vocabulary}
    return trained_parts(before, stage.codes, **shape, **text, **about)


def _as_json(stage: Stage, recipe: Stages | None) -> str:
    """What a stage's outcome depends on; `recipe` for the first one."""
    about: dict[str, Any] = {"stage": dataclasses.asdict(stage)}
    for name in FREE:
        del about["stage"]["loop"][name]
    if recipe:
        about["start"] = dataclasses.asdict(replace(recipe, stages=()))
    return json.dumps(about, indent=2, default=str) + "\n"


def _claim(folder: Path, plan: str) -> None:
    """Mark `folder` as that of a stage begun with `plan`, which it may already be."""
    path = folder / PLAN
    if path.exists():
        if path.read_text(encoding="utf-8") != plan:
            raise ValueError(
                f"{folder} was begun with another recipe, see its {PLAN}: choose another output "
                "folder, or delete this one"
            )
    elif rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(plan, encoding="utf-8")
    barrier()
