"""A training in stages, from a recipe file in TOML: each stage continues from the one before.

    preset = "small"                  # with the tables [model] and [generation] to change it, or
    # init = "model.safetensors"      # to start from a trained checkpoint
    image_tokenizer = "vq.safetensors"
    batch = 16                        # these keys apply to every stage

    [[stage]]
    name = "256"
    codes = "codes-256"
    windows = [1]
    steps = 15000
    learning_rate = 1e-3

    [[stage]]
    name = "1024"
    codes = "codes-1024"
    windows = [2]                     # the model grows from window 1
    steps = 5000
    learning_rate = 3e-4
    z_loss = 1e-4

Paths are relative to where the command runs. A stage has the fields of `Stage`, `LoopConfig` and
`Recipe`, with the defaults of `train model`; `codes` and `steps` (or `minutes`) are required. With
`lora` it trains a LoRA of that rank alone, and the next stage starts with it merged.
"""

import dataclasses
import json
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from .. import checkpoints
from ..config import Config
from ..data.shards import CodeShards
from ..engine.quantize import check_whole
from ..files import write_text
from ..lock import lock
from ..pipeline import Pipeline
from ..presets import PRESETS
from . import state
from .distributed import barrier, rank
from .loop import FINAL, check_loop
from .model import CPU, check_codes, frozen_names, train_model
from .settings import PRESET, LoopConfig, Recipe, Stage, check_table, settings_of
from .start import Changes, new_pipeline, open_codes, trained_pipeline

LARGEST, DEEPEST = 2**18, 1000  # bytes of a recipe, dots in a line
PLAN = "stage.json"  # in a stage's folder: the recipe up to this stage
# Fields of LoopConfig that do not change the result: they may differ when a stage is resumed.
FREE = ("validate_every", "save_minutes", "accumulation", "compile", "checkpointing", "shard")


@dataclass(frozen=True)
class Stages:
    """A recipe. The first stage starts from the checkpoint `init`, or from new weights of the shape
    `preset` for the codes of `image_tokenizer`."""

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
    """Raises ValueError where the file is not TOML, or large enough to take long to parse."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes: it is no recipe")
    text = path.read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > DEEPEST:  # a key of n parts takes the parser n * n bytes
            raise ValueError(f"line {number} has a key of too many parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_stages(recipe: dict[str, Any]) -> Stages:
    """A recipe from the content of its file. Raises ValueError that names the key."""
    given = {"preset": PRESET} | recipe
    tables = given.pop("stage", [])
    if not isinstance(tables, list) or not tables:
        raise ValueError("a recipe needs at least one [[stage]]")
    for name in ("preset", "model", "generation", "image_tokenizer"):
        if "init" in recipe and name in recipe:
            raise ValueError(f"init has its own {name}: give only one of the two")
    preset = _preset(given.pop("preset"), given.pop("model", {}), given.pop("generation", {}))
    known = {f.name for f in fields(Stages)} - {"preset", "stages"}
    start = {name: given.pop(name) for name in known & given.keys()}
    check_table("the recipe", start, Stages)
    for name in {"init", "image_tokenizer"} & start.keys():
        start[name] = Path(start[name])
    stages = tuple(_stage(given, table, number) for number, table in enumerate(tables, 1))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages need different names, not {', '.join(names)}")
    if stages[0].lora and ("init" not in start or "text_tokenizer" in start):
        raise ValueError(
            f"stage {names[0]}: lora is for a trained model and leaves the rest of it unchanged: "
            "give the recipe an init and no text_tokenizer, or let another stage come first"
        )
    return Stages(preset, stages, **start)


def _preset(name: str, model: dict, generation: dict) -> Config:
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {short(name)}")
    preset = PRESETS[name]
    check_table("[model]", model, type(preset.model))
    check_table("[generation]", generation, type(preset.generation))
    return replace(
        preset,
        model=replace(preset.model, **model),
        generation=replace(preset.generation, **generation),
    )


def _stage(shared: dict[str, Any], table: dict[str, Any], number: int) -> Stage:
    if not isinstance(table, dict):
        raise ValueError(f"stage {number} must be a table, not {short(table)}")
    given = shared | table
    name = str(given.get("name", number))
    given["name"] = name
    check_table(f"stage {name}", given, LoopConfig, Recipe, Stage)
    if "codes" not in given:
        raise ValueError(f"stage {name} needs codes")
    if "steps" not in given and not given.get("minutes"):
        raise ValueError(f"stage {name} needs steps or minutes")
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(
            f"stage name {name!r} cannot be the name of a folder: choose one without slashes"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    values["codes"] = Path(given["codes"])
    try:
        loop, recipe, others = (
            {k: v for k, v in values.items() if k in settings_of(part)}
            for part in (LoopConfig, Recipe, Stage)
        )
        return Stage(loop=LoopConfig(**loop), recipe=Recipe(**recipe), **others)
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}") from None


def train_stages(recipe: Stages, directory: Path, device: torch.device = CPU) -> Path:
    """Train each stage in `directory`/NAME and return the path of the last one's checkpoint, or of
    its LoRA.

    Finished stages are kept and an interrupted one is resumed. Raises ValueError where a stage was
    started with another recipe, BlockingIOError where another process trains there, and as
    `train_model`; all stages are checked before the first one starts.
    """
    opened = _check(recipe, device)
    directory.mkdir(parents=True, exist_ok=True)
    with lock(directory) if rank() == 0 else nullcontext():
        return _train_stages(recipe, opened, directory, device)


def _train_stages(
    recipe: Stages, opened: dict[Path, CodeShards], directory: Path, device: torch.device
) -> Path:
    plan = {"start": dataclasses.asdict(replace(recipe, stages=()))}
    before, loras = recipe.init, ()  # what the next stage starts from
    for i, stage in enumerate(recipe.stages):
        folder = directory / stage.name
        plan = {"stage": _outcome(stage), "after": plan}
        _claim(folder, json.dumps(plan, indent=2, default=str) + "\n")
        final = folder / FINAL
        if not final.exists():
            shards = opened[stage.codes]
            train_model(
                shards,
                folder,
                stage_pipeline(recipe, i, before, shards, loras),
                stage.loop,
                stage.recipe,
                lora=stage.lora,
                freeze=stage.freeze,
                resume=state.latest(folder) is not None,
                device=device,
            )
        before, loras = (before, (*loras, final)) if stage.lora else (final, ())
        barrier()  # process 0 writes what the others read in the next stage
    return final


def _check(recipe: Stages, device: torch.device) -> dict[Path, CodeShards]:
    """Raises now what a stage would raise only when its turn comes, perhaps days later. Returns the
    codes of every folder, each opened once."""
    opened: dict[Path, CodeShards] = {}
    shape = recipe.preset.model
    if recipe.init:
        start = checkpoints.read(recipe.init)
        shape = start.config.model
        check_whole(start.skeleton())
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


def stage_pipeline(
    recipe: Stages,
    index: int,
    before: Path | None,
    shards: CodeShards,
    loras: tuple[Path, ...] = (),
) -> Pipeline:
    """What stage `index` starts from; `before` is the last checkpoint of the stages before it, or
    `init`, `loras` are those of the stages since then, and `shards` are the stage's codes.

    Raises as `new_pipeline` and `trained_pipeline`.
    """
    stage = recipe.stages[index]
    seed = stage.loop.seed
    changes = Changes(stage.windows, stage.window_head, card=recipe.card, seed=seed, loras=loras)
    if index == 0:
        text_tokenizer, vocabulary = recipe.text_tokenizer, recipe.vocabulary
        changes = replace(changes, text_tokenizer=text_tokenizer, vocabulary=vocabulary)
    if before is None:
        return new_pipeline(shards, recipe.image_tokenizer, recipe.preset, changes)
    return trained_pipeline(before, shards, changes)


def _outcome(stage: Stage) -> dict[str, Any]:
    """The settings that the result of a stage depends on."""
    settings = dataclasses.asdict(stage)
    for name in FREE:
        del settings["loop"][name]
    return settings


def _claim(folder: Path, plan: str) -> None:
    """Record in `folder` that its stage is trained by `plan`. Raises ValueError if it was started
    with another one."""
    path = folder / PLAN
    started = state.latest(folder) is not None or (folder / FINAL).exists()
    if started and (not path.exists() or path.read_text(encoding="utf-8") != plan):
        raise ValueError(
            f"{folder} was started with another recipe, or the stages before it were, see its "
            f"{PLAN}: choose another output folder, or delete this one"
        )
    barrier()
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, plan)
