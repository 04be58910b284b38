"""The commands around training: `tokenshuffle data`, `train` and `eval`."""

from pathlib import Path

from .cli_options import (
    add_model,
    add_sampling,
    check_output,
    command,
    device_of,
    load,
    settings_of,
)
from .config import PRESETS, parse_sizes


def add(commands) -> None:
    """Add the commands `data`, `train` and `eval`."""
    _add_data(commands)
    _add_train(commands)
    _add_eval(commands)


def _add_data(commands) -> None:
    parser = command(commands, "data", _data, "Build a training data set.")
    parser.add_argument("name", choices=["emoji"])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--subjects", default="popular", help='"popular", "all" or a text file')
    parser.add_argument("--styles", default="3d,flat,noto", help="of 3d, modern, flat, noto")
    parser.add_argument("--languages", default="en,zh", help="of emojibase's (default: en,zh)")
    parser.add_argument(
        "--held-out", type=float, default=0.05, help="share of pairs not trained on"
    )
    parser.add_argument("--seed", type=int, default=0)


def _data(options) -> None:
    from .training.emoji import build

    manifest = build(
        options.directory,
        size=options.size,
        subjects=options.subjects,
        styles=tuple(options.styles.split(",")),
        languages=tuple(options.languages.split(",")),
        held_out=options.held_out,
        seed=options.seed,
    )
    print(manifest)


def _add_train(commands) -> None:
    parser = commands.add_parser("train", help="Train an image tokenizer or a model.")
    parts = parser.add_subparsers(required=True, metavar="PART")
    tokenizer = command(parts, "tokenizer", _train_tokenizer, "Train an image tokenizer.")
    tokenizer.add_argument("--crop", type=int, default=64, help="pixels of the training crops")
    model = command(parts, "model", _train_model, "Train a model on an image tokenizer's codes.")
    start = model.add_mutually_exclusive_group(required=True)
    start.add_argument("--image-tokenizer", type=Path, metavar="FILE", help="for a new model")
    start.add_argument("--init", type=Path, metavar="FILE", help="train this checkpoint on")
    model.add_argument(
        "--sizes",
        metavar="WxH,WxH,...",
        help="canvases to place the pictures on, each as often (default: the pictures' own size)",
    )
    model.add_argument("--text-tokenizer", type=Path, metavar="tokenizer.json")
    model.add_argument("--card", type=Path, metavar="FILE.json", help="model card to store")
    model.add_argument(
        "--context-noise",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="windows of other pictures mixed into the context, for small data sets (default: 0.8)",
    )
    model.add_argument("--z-loss", type=float, default=0.0, help="weight (paper: at 2048 px)")
    model.add_argument("--text-loss", type=float, default=0.0, help="weight of the text tokens")
    defaults = {tokenizer: (3200, 12, 2e-3), model: (15000, 16, 1.2e-3)}
    for part, (steps, batch, learning_rate) in defaults.items():
        part.add_argument("data", type=Path, metavar="DATA", help="folder of `data emoji`")
        part.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
        part.add_argument("--preset", choices=PRESETS, default="emoji")
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


def _loop(options):
    from .training.loop import LoopConfig

    names = (
        "steps", "batch", "learning_rate", "warmup", "ema", "seed", "validate_every",
        "save_minutes",
    )  # fmt: skip
    return LoopConfig(**{name: getattr(options, name) for name in names})


def _train_tokenizer(options) -> None:
    from .training.train_tokenizer import train_tokenizer

    path = train_tokenizer(
        options.data,
        options.output,
        PRESETS[options.preset].image_tokenizer,
        _loop(options),
        crop=options.crop,
        resume=options.resume,
        device=device_of(options.device),
    )
    print(path)


def _train_model(options) -> None:
    import json

    from .training.train_model import train_model

    card = json.loads(options.card.read_text(encoding="utf-8")) if options.card else {}
    path = train_model(
        options.data,
        options.image_tokenizer,
        options.output,
        PRESETS[options.preset],
        _loop(options),
        init=options.init,
        sizes=parse_sizes(options.sizes) if options.sizes else None,
        card=card,
        text_tokenizer=options.text_tokenizer,
        context_noise=options.context_noise,
        z_loss=options.z_loss,
        text_loss=options.text_loss,
        resume=options.resume,
        device=device_of(options.device),
    )
    print(path)


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="Score a model.")
    scores = parser.add_subparsers(required=True, metavar="SCORE")
    text = "Is the nearest reference of a generated picture the prompted subject?"
    retrieval = command(scores, "retrieval", _retrieval, text)
    retrieval.add_argument("data", type=Path, metavar="DATA", help="folder of `data emoji`")
    retrieval.add_argument("--count", type=int, default=200, help="trained pairs to generate")
    retrieval.add_argument("--batch", type=int, default=16)
    retrieval.add_argument("--seed", type=int, default=0)
    retrieval.add_argument("--language", default="en", help="of the prompts")
    retrieval.add_argument("--sheet", metavar="FILE.png", help="save the generated pictures")
    add_sampling(retrieval)
    add_model(retrieval)


def _retrieval(options) -> None:
    from .evaluation.retrieval import choose, reconstruction_psnr, retrieval
    from .files import atomic_path
    from .training.emoji import read_manifest
    from .training.pictures import sheet_of

    if options.sheet:
        check_output(options.sheet, ".png")
    records = read_manifest(options.data)
    pipeline = load(options)
    settings = settings_of(options, pipeline.config.generation)
    images = []
    for split, count in (("train", options.count), ("held-out", None)):
        chosen = choose(records, split, count, options.seed)
        scores, generated = retrieval(
            pipeline, options.data, chosen, settings,
            seed=options.seed, batch=options.batch, language=options.language,
        )  # fmt: skip
        name = "trained" if split == "train" else split
        for score, value in scores.items():
            print(f"{name} {score} {value:.3f} (n={len(chosen)})", flush=True)
        psnr = reconstruction_psnr(pipeline, options.data, chosen)
        print(f"{name} reconstruction PSNR {psnr:.2f} dB (n={len(chosen)})", flush=True)
        images.append(generated)
    if options.sheet:
        with atomic_path(options.sheet) as temporary:
            sheet_of(images[0], columns=20).save(temporary, "PNG")
