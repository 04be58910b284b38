"""A training in stages, from a recipe file in TOML: each stage trains on what the one before made.

    preset = "small"                  # with the tables [model] and [generation] to change it, or
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
`Recipe`, with the same defaults as `train model`; `codes` and `steps` have none.
"""

import dataclasses
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints
from ..config import PRESETS, Config
from ..data.shards import CodeShards
from ..files import atomic_path
from ..pipeline import Pipeline
from . import state
from .distributed import barrier, rank
from .loop import FINAL, check_loop
from .model import CPU, check_codes, frozen_names, train_model
from .settings import PRESET, LoopConfig, Recipe, Stage, check_kinds
from .start import fresh_parts, open_codes, trained_parts

PLAN = "stage.json"  # in a stage's folder: what it was begun with
# Of LoopConfig, what does not change what is learnt: it may differ when a stage is resumed.
FREE = ("validate_every", "save_minutes", "accumulation", "compile", "checkpointing", "shard")


@dataclass(frozen=True)
class Stages:
    """A recipe. The first stage starts from the checkpoint `init`, or from fresh weights of the
    shape `preset` for the codes of `image_tokenizer`."""

    preset: Config
    stages: tuple[Stage, ...]
    init: Path | None = None
    image_tokenizer: Path = checkpoints.BUNDLED
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
    given = {"preset": PRESET} | recipe
    tables = given.pop("stage", [])
    if not isinstance(tables, list) or not tables:
        raise ValueError("a recipe needs at least one [[stage]]")
    for name in ("preset", "model", "generation", "image_tokenizer"):
        if "init" in recipe and name in recipe:
            raise ValueError(f"init brings its own {name}: give one of them")
    preset = _preset(given.pop("preset"), given.pop("model", {}), given.pop("generation", {}))
    own = {f.name for f in fields(Stages)} - {"preset", "stages"}
    start = {name: given.pop(name) for name in own & given.keys()}
    check_kinds("the recipe", start, Stages)
    for name in {"init", "image_tokenizer"} & start.keys():
        start[name] = Path(start[name])
    stages = tuple(_stage(given, table, number) for number, table in enumerate(tables, 1))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages need different names, not {', '.join(names)}")
    return Stages(preset, stages, **start)


def _preset(name: str, model: dict, generation: dict) -> Config:
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
    preset = PRESETS[name]
    for table, values, known in (
        ("model", model, preset.model),
        ("generation", generation, preset.generation),
    ):
        _check_keys(f"[{table}]", values, {f.name for f in fields(known)})
        check_kinds(f"[{table}]", values, type(known))
    return replace(
        preset,
        model=replace(preset.model, **model),
        generation=replace(preset.generation, **generation),
    )


def _stage(shared: dict[str, Any], table: dict[str, Any], number: int) -> Stage:
    if not isinstance(table, dict):
        raise ValueError(f"stage {number} must be a table, not {table!r}")
    given = shared | table
    name = str(given.get("name", number))
    loop = {f.name for f in fields(LoopConfig)}
    recipe = {f.name for f in fields(Recipe)}
    own = {f.name for f in fields(Stage)} - {"loop", "recipe"}
    _check_keys(f"stage {name}", given, loop | recipe | own)
    for needed in ("codes", "steps"):
        if needed not in given:
            raise ValueError(f"stage {name} needs {needed}")
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"stage name {name!r} becomes a folder's: choose one without slashes")
    for part in (LoopConfig, Recipe, Stage):
        check_kinds(f"stage {name}", given | {"name": name}, part)
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


def _check_keys(where: str, given: Any, known: set[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a table, not {given!r}")
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{where} has no key {unknown[0]!r}, only {', '.join(sorted(known))}")


def train_stages(recipe: Stages, directory: Path, device: torch.device = CPU) -> Path:
    """Train stage after stage in `directory`/NAME and return the last one's checkpoint.

    What is finished there is kept and what was interrupted is resumed. Raises ValueError where a
    stage was begun with another recipe, and as `train_model`; what the stages train on is checked
    before the first begins.
    """
    opened = _check(recipe, device)
    final, plan = recipe.init, {"start": dataclasses.asdict(replace(recipe, stages=()))}
    for i, stage in enumerate(recipe.stages):
        folder = directory / stage.name
        plan = {"stage": _outcome(stage), "after": plan}
        _claim(folder, json.dumps(plan, indent=2, default=str) + "\n")
        before, final = final, folder / FINAL
        if not final.exists():
            shards = opened[stage.codes]
            train_model(
                shards,
                folder,
                parts_of(recipe, i, before, shards),
                stage.loop,
                stage.recipe,
                freeze=stage.freeze,
                resume=state.latest(folder) is not None,
                device=device,
            )
        barrier()  # process 0 writes what the others read in the next stage
    return final


def _check(recipe: Stages, device: torch.device) -> dict[Path, CodeShards]:
    """Raises as a stage would only when its turn comes, days later perhaps. Returns the codes of
    every folder, each opened once."""
    opened: dict[Path, CodeShards] = {}
    shape = checkpoints.read(recipe.init).config.model if recipe.init else recipe.preset.model
    images = checkpoints.load_image_tokenizer(recipe.init or recipe.image_tokenizer)
    for stage in recipe.stages:
        try:
            windows, head = stage.windows or shape.windows, stage.window_head or shape.window_head
            shape = replace(shape, windows=windows, window_head=head)
            if stage.codes not in opened:
                opened[stage.codes] = open_codes(stage.codes)
            check_codes(opened[stage.codes], images, shape, stage.recipe)
            frozen_names(checkpoints.skeleton(shape), stage.freeze)
            check_loop(stage.loop, device)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from None
    return opened


def parts_of(recipe: Stages, index: int, before: Path | None, shards: CodeShards) -> Pipeline:
    """What stage `index` starts from; `before` is the checkpoint of the one before it, or `init`,
    and `shards` are the stage's codes.

    Raises as `fresh_parts` and `trained_parts`.
    """
    stage = recipe.stages[index]
    about = {
        "windows": stage.windows,
        "window_head": stage.window_head,
        "card": recipe.card,
        "seed": stage.loop.seed,
    }
    if index == 0:
        about |= {"text_tokenizer": recipe.text_tokenizer, "vocabulary": recipe.vocabulary}
    if before is None:
        return fresh_parts(shards, recipe.image_tokenizer, recipe.preset, **about)
    return trained_parts(before, shards, **about)


def _outcome(stage: Stage) -> dict[str, Any]:
    """What the outcome of a stage depends on."""
    about = dataclasses.asdict(stage)
    for name in FREE:
        del about["loop"][name]
    return about


def _claim(folder: Path, plan: str) -> None:
    """Mark `folder` as that of a stage begun with `plan`, which it may already be."""
    path = folder / PLAN
    begun = state.latest(folder) is not None or (folder / FINAL).exists()
    if begun and (not path.exists() or path.read_text(encoding="utf-8") != plan):
        raise ValueError(
            f"{folder} was begun with another recipe, or another one of the stages before it, see "
            f"its {PLAN}: choose another output folder, or delete this one"
        )
    barrier()
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(plan, encoding="utf-8")
