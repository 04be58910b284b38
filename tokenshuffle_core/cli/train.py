"""The command `tokenshuffle train`."""

from dataclasses import fields
from pathlib import Path

from ..config import PRESETS
from ..training.settings import PRESET, TOKENIZER, LoopConfig, Recipe, Stage, item_kind
from .options import command, device_of


def add(commands) -> None:
    """Add the command `train`."""
    parser = commands.add_parser("train", help="Train an image tokenizer or a model.")
    parts = parser.add_subparsers(required=True, metavar="PART")
    tokenizer = command(parts, "tokenizer", _train_tokenizer, "Train an image tokenizer.")
    tokenizer.add_argument("data", type=Path, metavar="SOURCE", help="as `data codes` takes it")
    tokenizer.add_argument("--crop", type=int, default=64, help="pixels of the training crops")
    tokenizer.add_argument(
        "--side", type=int, default=128, help="pixels that pictures are scaled to"
    )
    tokenizer.add_argument("--init", type=Path, metavar="FILE", help="train this one on")
    model = command(parts, "model", _train_model, "Train a model on codes, or a LoRA for one.")
    model.add_argument("data", type=Path, metavar="CODES", help="folder of `data codes`")
    start = model.add_mutually_exclusive_group()
    start.add_argument(
        "--image-tokenizer", type=Path, metavar="FILE",
        help="for a new model: the one that made the codes (default: the bundled model's)",
    )  # fmt: skip
    start.add_argument("--init", type=Path, metavar="FILE", help="train this checkpoint on")
    model.add_argument("--lora", type=int, default=0, metavar="RANK", help="train a LoRA alone")
    model.add_argument(
        "--text-tokenizer", metavar="FILE",
        help='a tokenizer.json, or "new" for one trained on the captions (default: new for a new '
        "model, what it has with --init)",
    )  # fmt: skip
    model.add_argument(
        "--vocabulary",
        type=int,
        metavar="N",
        help="tokens of a new text tokenizer; the special ones and the bytes are always among them",
    )
    model.add_argument("--card", type=Path, metavar="FILE.json", help="model card to store")
    _add_settings(model, Stage)
    _add_settings(model, Recipe)
    stages = command(
        parts, "stages", _train_stages,
        "Train a model in stages by a recipe; run it again to go on where it stopped.",
    )  # fmt: skip
    stages.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    for part, defaults in ((tokenizer, TOKENIZER), (model, LoopConfig)):
        _add_settings(part, defaults)
        part.add_argument(
            "--preset",
            choices=PRESETS,
            default=PRESET,
            help=f"the shape of a new one (default: {PRESET})",
        )
        part.add_argument("--resume", action="store_true", help="go on where a training stopped")
    for part in (tokenizer, model, stages):
        part.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
        part.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")


def _add_settings(parser, defaults: LoopConfig | type) -> None:
    """An option for every setting of a dataclass, with the value that it has in `defaults`."""
    for known in fields(defaults):
        if not known.metadata:
            continue
        option = "--" + known.name.replace("_", "-")
        value, about = getattr(defaults, known.name), dict(known.metadata)
        if known.type is bool:
            parser.add_argument(option, action="store_true", **about)
            continue
        if type(value) in (int, float, str) and "default" not in about["help"]:
            about["help"] += f" (default: {value})"
        kind = str if item_kind(known.type) else known.type
        parser.add_argument(option, type=kind, default=value, **about)


def _settings(options, part: type) -> dict:
    """The values of the options that `_add_settings` added for a dataclass."""
    values = {known.name: getattr(options, known.name) for known in fields(part) if known.metadata}
    for known in fields(part):
        kind, text = item_kind(known.type), values.get(known.name)
        if kind and isinstance(text, str):
            values[known.name] = _list("--" + known.name.replace("_", "-"), text, kind)
    return values


def _list(option: str, text: str, kind: type) -> tuple:
    items = text.split(",")
    try:
        if "" in items:
            raise ValueError
        return tuple(map(kind, items))
    except ValueError:
        what = (
            "names with commas, such as a,b" if kind is str else "numbers with commas, such as 1,2"
        )
        raise ValueError(f"{option} must be {what}, not {text}") from None


def _train_tokenizer(options) -> None:
    from ..training.distributed import process_group, rank
    from ..training.tokenizer import train_tokenizer

    with process_group(device_of(options.device)) as device:
        path = train_tokenizer(
            options.data,
            options.output,
            PRESETS[options.preset].image_tokenizer,
            LoopConfig(**_settings(options, LoopConfig)),
            init=options.init,
            crop=options.crop,
            side=options.side,
            resume=options.resume,
            device=device,
        )
        if rank() == 0:
            print(path)


def _train_model(options) -> None:
    from .. import checkpoints
    from ..training.distributed import process_group, rank
    from ..training.model import train_model
    from ..training.start import fresh_parts, open_codes, trained_parts

    stage = _settings(options, Stage)
    loop = LoopConfig(**_settings(options, LoopConfig))
    recipe = Recipe(**_settings(options, Recipe))
    changes = _changes(options, stage)
    with process_group(device_of(options.device)) as device:
        shards = open_codes(options.data)
        if options.init:
            parts = trained_parts(options.init, shards, **changes)
        else:
            images = options.image_tokenizer or checkpoints.BUNDLED
            parts = fresh_parts(shards, images, PRESETS[options.preset], **changes)
        path = train_model(
            shards,
            options.output,
            parts,
            loop,
            recipe,
            lora=options.lora,
            freeze=stage["freeze"],
            resume=options.resume,
            device=device,
        )
        if rank() == 0:
            print(path)


def _train_stages(options) -> None:
    from ..training.distributed import process_group, rank
    from ..training.stages import read_stages, train_stages

    recipe = read_stages(options.recipe)
    with process_group(device_of(options.device)) as device:
        path = train_stages(recipe, options.output, device)
        if rank() == 0:
            print(path)


def _changes(options, stage: dict) -> dict:
    """What `fresh_parts` and `trained_parts` are to change."""
    import json

    from ..training.start import NEW

    changes = stage["windows"] or stage["window_head"] or options.text_tokenizer
    if options.lora and (changes or not options.init):
        raise ValueError(
            "--lora changes a checkpoint as it is: give it with --init, and without --windows, "
            "--window-head and --text-tokenizer"
        )
    made_new = options.text_tokenizer == NEW or not (options.init or options.text_tokenizer)
    if options.vocabulary and not made_new:
        raise ValueError("--vocabulary is that of a new text tokenizer: add --text-tokenizer new")
    card = json.loads(options.card.read_text(encoding="utf-8")) if options.card else {}
    if not isinstance(card, dict) or not all(isinstance(text, str) for text in card.values()):
        raise ValueError(f"{options.card} must map names to texts")
    return {
        "windows": stage["windows"],
        "window_head": stage["window_head"],
        "text_tokenizer": options.text_tokenizer,
        "vocabulary": options.vocabulary,
        "card": card,
        "seed": options.seed,
    }
