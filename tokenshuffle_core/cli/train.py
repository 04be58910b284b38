"""The command `tokenshuffle train`."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from ..presets import PRESETS
from ..training.settings import (
    PRESET,
    TOKENIZER,
    LoopConfig,
    Recipe,
    Stage,
    check_rank,
    item_kind,
)
from .options import command, device_of


def add(commands) -> None:
    """Add the command `train`."""
    parser = commands.add_parser("train", help="Train an image tokenizer or a model.")
    parts = parser.add_subparsers(required=True, metavar="PART")
    tokenizer = command(parts, "tokenizer", _train_tokenizer, "Train an image tokenizer.")
    option = tokenizer.add_argument
    option("data", type=Path, metavar="SOURCE", help="pictures, as for `data codes`")
    option("--crop", type=int, default=64, help="pixels of the training crops")
    option("--side", type=int, default=128, help="pixels that pictures are scaled to")
    option("--init", type=Path, metavar="FILE", help="image tokenizer to continue from")
    model = command(parts, "model", _train_model, "Train a model on codes, or a LoRA for one.")
    option, start_option = model.add_argument, model.add_mutually_exclusive_group().add_argument
    option("data", type=Path, metavar="CODES", help="folder of `data codes`")
    text = "for a new model: the one that the codes are from (default: the bundled model's)"
    start_option("--image-tokenizer", type=Path, metavar="FILE", help=text)
    start_option("--init", type=Path, metavar="FILE", help="checkpoint to continue from")
    text = (
        'a tokenizer.json, or "new" to train one on the captions (default: new, or that of --init)'
    )
    option("--text-tokenizer", metavar="FILE", help=text)
    text = "size of a new text tokenizer; it always has the special tokens and the bytes"
    option("--vocabulary", type=int, metavar="N", help=text)
    option("--card", type=Path, metavar="FILE.json", help="model card to store")
    _add_settings(model, Stage)
    _add_settings(model, Recipe)
    text = "Train a model in stages by a recipe; run it again to resume."
    stages = command(parts, "stages", _train_stages, text)
    stages.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    for part, defaults in ((tokenizer, TOKENIZER), (model, LoopConfig)):
        _add_settings(part, defaults)
        text = f"shape of a new one (default: {PRESET})"
        part.add_argument("--preset", choices=PRESETS, default=PRESET, help=text)
        part.add_argument("--resume", action="store_true", help="continue an interrupted training")
    for part in (tokenizer, model, stages):
        part.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
        part.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")


def _add_settings(parser, defaults: LoopConfig | type) -> None:
    """Add an option for each setting of a dataclass; its value in `defaults` is the default."""
    for setting in fields(defaults):
        if not setting.metadata:
            continue
        option = "--" + setting.name.replace("_", "-")
        value, more = getattr(defaults, setting.name), dict(setting.metadata)
        if setting.type is bool:
            parser.add_argument(option, action="store_true", **more)
            continue
        if type(value) in (int, float, str) and "default" not in more["help"]:
            more["help"] += f" (default: {value})"
        kind = str if item_kind(setting.type) else setting.type
        parser.add_argument(option, type=kind, default=value, **more)


def _settings(options, part: type) -> dict:
    """The values of the options that `_add_settings` added for a dataclass."""
    values = {
        setting.name: getattr(options, setting.name) for setting in fields(part) if setting.metadata
    }
    for setting in fields(part):
        kind, text = item_kind(setting.type), values.get(setting.name)
        if kind and isinstance(text, str):
            items = text.split(",")
            try:
                if "" in items:
                    raise ValueError
                values[setting.name] = tuple(map(kind, items))
            except ValueError:
                option = "--" + setting.name.replace("_", "-")
                what = "names separated by commas, such as a,b"
                if kind is not str:
                    what = "numbers separated by commas, such as 1,2"
                raise ValueError(f"{option} must be {what}, not {text}") from None
    return values


def _in_group(options, train: Callable) -> None:
    """Call train(device) in every process of the group; the first prints the path it returns."""
    from ..training.distributed import process_group, rank

    with process_group(device_of(options.device)) as device:
        path = train(device)
        if rank() == 0:
            print(path)


def _train_tokenizer(options) -> None:
    from ..training.tokenizer import train_tokenizer

    config = PRESETS[options.preset].image_tokenizer
    loop = LoopConfig(**_settings(options, LoopConfig))
    more = {name: getattr(options, name) for name in ("init", "crop", "side", "resume")}
    _in_group(
        options,
        lambda device: train_tokenizer(
            options.data, options.output, config, loop, device=device, **more
        ),
    )


def _train_model(options) -> None:
    from .. import checkpoints
    from ..training.model import train_model
    from ..training.start import new_pipeline, open_codes, trained_pipeline

    stage = _settings(options, Stage)
    loop = LoopConfig(**_settings(options, LoopConfig))
    recipe = Recipe(**_settings(options, Recipe))
    changes = _changes(options, stage)

    def train(device) -> Path:
        shards = open_codes(options.data)
        if options.init:
            pipeline = trained_pipeline(options.init, shards, changes)
        else:
            images = options.image_tokenizer or checkpoints.BUNDLED
            pipeline = new_pipeline(shards, images, PRESETS[options.preset], changes)
        return train_model(
            shards, options.output, pipeline, loop, recipe, lora=stage["lora"],
            freeze=stage["freeze"], resume=options.resume, device=device,
        )  # fmt: skip

    _in_group(options, train)


def _train_stages(options) -> None:
    from ..training.stages import read_stages, train_stages

    recipe = read_stages(options.recipe)
    _in_group(options, lambda device: train_stages(recipe, options.output, device))


def _changes(options, stage: dict):
    """How the model changes before it is trained. Raises ValueError for options that exclude one
    another, and for a card that is not one."""
    import json

    from ..training.start import NEW, Changes

    windows, head, text_tokenizer = stage["windows"], stage["window_head"], options.text_tokenizer
    check_rank(stage["lora"])
    changed = windows or head or text_tokenizer or stage["freeze"]
    if stage["lora"] and (changed or not options.init):
        raise ValueError(
            "--lora leaves the rest of a checkpoint unchanged: give it with --init, and without "
            "--windows, --window-head, --text-tokenizer and --freeze"
        )
    if options.vocabulary and text_tokenizer != NEW and (options.init or text_tokenizer):
        raise ValueError("--vocabulary is for a new text tokenizer: add --text-tokenizer new")
    card = {}
    if options.card:
        if not options.card.is_file():
            raise FileNotFoundError(f"{options.card} does not exist or is not a file")
        try:
            card = json.loads(options.card.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{options.card} is not JSON: {error}") from None
    if not isinstance(card, dict) or not all(isinstance(text, str) for text in card.values()):
        raise ValueError(f"{options.card} must be a JSON object whose values are texts")
    return Changes(windows, head, text_tokenizer, options.vocabulary, card, options.seed)
