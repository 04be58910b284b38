"""The command `tokenshuffle train`."""

from pathlib import Path

from ..config import PRESETS
from .options import command, device_of


def add(commands) -> None:
    """Add the command `train`."""
    parser = commands.add_parser("train", help="Train an image tokenizer or a model.")
    parts = parser.add_subparsers(required=True, metavar="PART")
    tokenizer = command(parts, "tokenizer", _train_tokenizer, "Train an image tokenizer.")
    tokenizer.add_argument("--crop", type=int, default=64, help="pixels of the training crops")
    tokenizer.add_argument(
        "--side", type=int, default=128, help="pixels that pictures are scaled to"
    )
    tokenizer.add_argument("--init", type=Path, metavar="FILE", help="train this one on")
    model = command(parts, "model", _train_model, "Train a model on codes, or a LoRA for one.")
    start = model.add_mutually_exclusive_group()
    start.add_argument(
        "--image-tokenizer", type=Path, metavar="FILE",
        help="for a new model: the one that made the codes (default: the bundled model's)",
    )  # fmt: skip
    start.add_argument("--init", type=Path, metavar="FILE", help="train this checkpoint on")
    model.add_argument(
        "--windows", metavar="N,N,...",
        help="that the model serves, the default one first; --init grows to them",
    )  # fmt: skip
    model.add_argument(
        "--window-mix", metavar="SHARE,...", help="how often each is trained (default: alike)"
    )
    model.add_argument(
        "--window-head", type=int, default=0, metavar="WIDTH",
        help="predict the codes of a window one after another, with so wide a head",
    )  # fmt: skip
    model.add_argument("--lora", type=int, default=0, metavar="RANK", help="train a LoRA alone")
    model.add_argument("--freeze", metavar="PART,...", help="such as transformer,text_embedding")
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
    model.add_argument("--drop-prompt", type=float, default=0.1, metavar="SHARE")
    model.add_argument(
        "--context-noise",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="windows of other pictures mixed into the context, for small data sets (default: 0.8)",
    )
    model.add_argument("--z-loss", type=float, default=0.0, help="weight (paper: at 2048 px)")
    model.add_argument("--text-loss", type=float, default=0.0, help="weight of the text tokens")
    tokenizer.add_argument("data", type=Path, metavar="SOURCE", help="as `data codes` takes it")
    model.add_argument("data", type=Path, metavar="CODES", help="folder of `data codes`")
    stages = command(
        parts, "stages", _train_stages,
        "Train a model in stages by a recipe; run it again to go on where it stopped.",
    )  # fmt: skip
    stages.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    stages.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    stages.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    defaults = {tokenizer: (3200, 12, 2e-3), model: (15000, 16, 1.2e-3)}
    for part, (steps, batch, learning_rate) in defaults.items():
        part.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
        part.add_argument("--preset", choices=PRESETS, default="small")
        part.add_argument("--steps", type=int, default=steps)
        part.add_argument("--batch", type=int, default=batch)
        part.add_argument("--learning-rate", type=float, default=learning_rate)
        part.add_argument("--warmup", type=int, default=100, help="steps")
        part.add_argument("--ema", type=float, default=0.99, help="decay of the weights' average")
        part.add_argument("--validate-every", type=int, default=500, metavar="STEPS")
        part.add_argument("--save-minutes", type=float, default=5, metavar="N")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--resume", action="store_true")
        part.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
        part.add_argument(
            "--accumulation", type=int, default=1, metavar="N",
            help="pieces of the batch that a process computes one after another",
        )  # fmt: skip
        part.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
        part.add_argument("--compile", action="store_true", help="with torch.compile")
        part.add_argument(
            "--checkpointing", action="store_true",
            help="compute each block's activations again in the backward pass: less memory",
        )  # fmt: skip
        part.add_argument(
            "--shard", action="store_true",
            help="share the weights out to the processes of torchrun (FSDP)",
        )  # fmt: skip


def _loop(options):
    from ..training.loop import LoopConfig

    names = (
        "steps", "batch", "learning_rate", "warmup", "ema", "seed", "validate_every",
        "save_minutes", "accumulation", "precision", "compile", "checkpointing", "shard",
    )  # fmt: skip
    return LoopConfig(**{name: getattr(options, name) for name in names})


def _train_tokenizer(options) -> None:
    from ..training.distributed import process_group, rank
    from ..training.tokenizer import train_tokenizer

    with process_group(device_of(options.device)) as device:
        path = train_tokenizer(
            options.data,
            options.output,
            PRESETS[options.preset].image_tokenizer,
            _loop(options),
            init=options.init,
            crop=options.crop,
            side=options.side,
            resume=options.resume,
            device=device,
        )
        if rank() == 0:
            print(path)


def _train_model(options) -> None:
    from ..training.distributed import process_group, rank
    from ..training.model import Recipe, train_model

    names = ("drop_prompt", "context_noise", "z_loss", "text_loss")
    recipe = Recipe(
        **{name: getattr(options, name) for name in names},
        window_mix=_numbers("--window-mix", options.window_mix, float),
    )
    with process_group(device_of(options.device)) as device:
        path = train_model(
            options.data,
            options.output,
            _parts(options),
            _loop(options),
            recipe,
            lora=options.lora,
            freeze=tuple(options.freeze.split(",")) if options.freeze else (),
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


def _parts(options):
    """The checkpoint that a training starts from."""
    import json

    from ..checkpoints import native as checkpoint
    from ..training.start import NEW, fresh_parts, trained_parts

    changes = options.windows or options.window_head or options.text_tokenizer
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
    about = {
        "windows": _numbers("--windows", options.windows, int),
        "window_head": options.window_head,
        "text_tokenizer": options.text_tokenizer,
        "vocabulary": options.vocabulary,
        "card": card,
        "seed": options.seed,
    }
    if options.init:
        return trained_parts(options.init, options.data, **about)
    images = options.image_tokenizer or checkpoint.BUNDLED
    return fresh_parts(options.data, images, PRESETS[options.preset], **about)


def _numbers(name: str, text: str | None, kind: type) -> tuple | None:
    try:
        return tuple(kind(part) for part in text.split(",")) if text else None
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas, such as 1,2, not {text}") from None
