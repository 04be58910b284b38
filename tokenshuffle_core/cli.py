"""The command line: `tokenshuffle generate`, `encode`, `decode`, `info`, `data`, `train`, `eval`.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 2 bad
input or a file that cannot be read or written, 130 interrupted.
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

from .config import PRESETS, SCHEDULES, Config, GenerationConfig


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except ModuleNotFoundError as error:
        message = (
            f"{error.name} is needed for this command: pip install 'comfyui-tokenshuffle[train]'"
        )
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        message = _sentence(error)
    else:
        return 0
    print(f"tokenshuffle: {message}", file=sys.stderr)
    return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenshuffle", description="Text to image with a plain LLaMA and shuffled tokens."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_codes(commands)
    _add_info(commands)
    _add_data(commands)
    _add_train(commands)
    _add_eval(commands)
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser) -> None:
    parser.add_argument("--model", metavar="FILE", help="checkpoint (default: the bundled model)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")


def _add_sampling(parser) -> None:
    parser.add_argument("--cfg", type=float, help="guidance scale; 1 is off")
    parser.add_argument("--schedule", choices=SCHEDULES, help="how guidance grows over the picture")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="keep the K most likely codes; 0 is off")
    parser.add_argument(
        "--top-p", type=float, help="keep the most likely codes of mass P; 1 is off"
    )


def _settings(options, defaults: GenerationConfig) -> GenerationConfig:
    names = ("width", "height", "cfg", "schedule", "temperature", "top_k", "top_p")
    given = {name: getattr(options, name, None) for name in names}
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _device(name: str):
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} does not exist on this machine") from None
    return device


def _load(options):
    from . import checkpoint, pipeline

    return pipeline.load(options.model or checkpoint.BUNDLED, _device(options.device))


def _check_output(path: str, suffix: str) -> Path:
    output = Path(path)
    if output.suffix.lower() != suffix:
        raise ValueError(f"output {path} must end in {suffix}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output folder {output.parent} does not exist: make it first")
    return output


# generate


def _add_generate(commands) -> None:
    parser = _command(commands, "generate", _generate, "Turn a prompt into PNG pictures.")
    parser.add_argument("prompt", help='such as "a red apple, 3d style"; "" asks for any picture')
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png")
    parser.add_argument("--negative", default="", help="what guidance leads away from")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="pictures, of seed, seed + 1, ...")
    parser.add_argument("--tiled", action="store_true", help="decode in tiles, with less memory")
    _add_sampling(parser)
    _add_model(parser)


def _generate(options) -> None:
    from tqdm import tqdm

    from .images import write_png

    output = _check_output(options.output, ".png")
    pipeline = _load(options)
    settings = _settings(options, pipeline.config.generation)
    rows, columns = pipeline.grid(settings.width, settings.height)
    size = f"{settings.width}x{settings.height}"
    trained = pipeline.card.get("modelspec.resolution", size)
    if size != trained:
        print(f"note: this model was trained at {trained}, not at {size}", file=sys.stderr)
    with tqdm(total=rows * columns, desc="sampling", unit="position", disable=None) as bar:
        images = pipeline.generate(
            options.prompt,
            options.negative,
            settings,
            seed=options.seed,
            count=options.count,
            tiled=options.tiled,
            progress=lambda step: bar.update(),
        )
    for i, image in enumerate(images):
        name = output if options.count == 1 else output.with_stem(f"{output.stem}-{i + 1}")
        about = {"prompt": options.prompt, "negative": options.negative, "seed": options.seed + i}
        title = pipeline.card.get("modelspec.title", "")
        write_png(name, image, **about, **vars(settings), model=title)
        print(name)


# encode, decode


def _add_codes(commands) -> None:
    parser = _command(commands, "encode", _encode, "Turn a picture into image codes.")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.npy")
    parser.add_argument("--background", help="what lies behind a transparent picture")
    _add_model(parser)
    parser = _command(commands, "decode", _decode, "Turn image codes into a picture.")
    parser.add_argument("codes", metavar="CODES.npy")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png")
    parser.add_argument("--tiled", action="store_true", help="decode in tiles, with less memory")
    _add_model(parser)


def _image_tokenizer(options):
    from . import checkpoint

    path = options.model or checkpoint.BUNDLED
    return checkpoint.load_image_tokenizer(path, _device(options.device))


def _encode(options) -> None:
    from .images import read_image, write_codes
    from .pipeline import encode_images

    output = _check_output(options.output, ".npy")
    image = read_image(options.image, options.background)
    try:
        codes = encode_images(_image_tokenizer(options), image)
    except ValueError as error:
        raise ValueError(f"{options.image}: {error}") from None
    write_codes(output, codes)
    print(output)


def _decode(options) -> None:
    from .images import read_codes, write_png
    from .pipeline import decode_codes

    output = _check_output(options.output, ".png")
    codes = read_codes(options.codes)
    if len(codes) != 1:
        raise ValueError(f"{options.codes} holds {len(codes)} pictures: decode takes one at a time")
    try:
        image = decode_codes(_image_tokenizer(options), codes, options.tiled)
    except ValueError as error:
        raise ValueError(f"{options.codes}: {error}") from None
    write_png(output, image[0])
    print(output)


# info


def _add_info(commands) -> None:
    parser = _command(commands, "info", _info, "Describe a checkpoint or a preset.")
    parser.add_argument(
        "model", nargs="?", metavar="CHECKPOINT-or-PRESET",
        help=f"a file, or one of {', '.join(PRESETS)} (default: the bundled model)",
    )  # fmt: skip


def _info(options) -> None:
    import torch

    from . import checkpoint
    from .image_tokenizer import ImageTokenizer
    from .model import TokenShuffleModel

    card = {}
    if options.model in PRESETS:
        config = PRESETS[options.model]
    else:
        metadata = checkpoint.read_metadata(options.model or checkpoint.BUNDLED)
        if checkpoint.CONFIG not in metadata:
            raise ValueError(
                f"{options.model} is neither a Token-Shuffle checkpoint nor a preset "
                f"({', '.join(PRESETS)})"
            )
        config, card = Config.from_json(metadata[checkpoint.CONFIG]), checkpoint.card(metadata)
    for key, value in card.items():
        print(f"{key.partition('.')[2]}: {value}")
    with torch.device("meta"):
        modules = {
            "model": TokenShuffleModel(config.model),
            "image tokenizer": ImageTokenizer(config.image_tokenizer),
        }
    for name, module in modules.items():
        parameters = sum(parameter.numel() for parameter in module.parameters())
        print(f"{name}: {parameters / 1e6:.1f} M parameters")
        for field, value in vars(module.config).items():
            print(f"  {field}: {value}")
    print("generation:")
    for field, value in vars(config.generation).items():
        print(f"  {field}: {value}")
    print(f"size: width and height in multiples of {config.pixels_per_window} pixels")


# data, train, eval


def _add_data(commands) -> None:
    parser = _command(commands, "data", _data, "Build a training data set.")
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
    tokenizer = _command(parts, "tokenizer", _train_tokenizer, "Train an image tokenizer.")
    tokenizer.add_argument("--crop", type=int, default=64, help="pixels of the training crops")
    model = _command(parts, "model", _train_model, "Train a model on an image tokenizer's codes.")
    model.add_argument("--image-tokenizer", type=Path, required=True, metavar="FILE")
    model.add_argument("--text-tokenizer", type=Path, metavar="tokenizer.json")
    model.add_argument("--card", type=Path, metavar="FILE.json", help="model card to store")
    model.add_argument("--z-loss", type=float, default=0.0, help="weight (paper: at 2048 px)")
    model.add_argument("--text-loss", type=float, default=0.0, help="weight of the text tokens")
    defaults = {tokenizer: (2400, 24, 2e-3), model: (4000, 32, 1.5e-3)}
    for part, (steps, batch, learning_rate) in defaults.items():
        part.add_argument("data", type=Path, metavar="DATA", help="folder of `data emoji`")
        part.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
        part.add_argument("--preset", choices=PRESETS, default="emoji")
        part.add_argument("--steps", type=int, default=steps)
        part.add_argument("--batch", type=int, default=batch)
        part.add_argument("--learning-rate", type=float, default=learning_rate)
        part.add_argument("--warmup", type=int, default=100, help="steps")
        part.add_argument("--ema", type=float, default=0.995, help="decay of the weights' average")
        part.add_argument("--validate-every", type=int, default=500, metavar="STEPS")
        part.add_argument("--save-minutes", type=float, default=5, metavar="N")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--resume", action="store_true")


def _loop(options):
    from .training.loop import LoopConfig

    names = (
        "steps", "batch", "learning_rate", "warmup", "ema", "seed", "validate_every", "save_minutes",
    )  # fmt: skip
    return LoopConfig(**{name: getattr(options, name) for name in names})


def _train_tokenizer(options) -> None:
    from .training.train_tokenizer import train_tokenizer

    config = PRESETS[options.preset].image_tokenizer
    print(
        train_tokenizer(
            options.data, options.output, config, _loop(options),
            crop=options.crop, resume=options.resume,
        )
    )  # fmt: skip


def _train_model(options) -> None:
    import json

    from .training.train_model import train_model

    card = json.loads(options.card.read_text(encoding="utf-8")) if options.card else {}
    print(
        train_model(
            options.data, options.image_tokenizer, options.output, PRESETS[options.preset],
            _loop(options), card=card, text_tokenizer=options.text_tokenizer,
            z_loss=options.z_loss, text_loss=options.text_loss, resume=options.resume,
        )
    )  # fmt: skip


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="Score a model.")
    scores = parser.add_subparsers(required=True, metavar="SCORE")
    text = "Is the nearest reference of a generated picture the prompted subject?"
    retrieval = _command(scores, "retrieval", _retrieval, text)
    retrieval.add_argument("data", type=Path, metavar="DATA", help="folder of `data emoji`")
    retrieval.add_argument("--count", type=int, default=200, help="trained pairs to generate")
    retrieval.add_argument("--batch", type=int, default=16)
    retrieval.add_argument("--seed", type=int, default=0)
    retrieval.add_argument("--language", default="en", help="of the prompts")
    retrieval.add_argument("--sheet", metavar="FILE.png", help="save the generated pictures")
    _add_sampling(retrieval)
    _add_model(retrieval)


def _retrieval(options) -> None:
    from .evaluation.retrieval import choose, reconstruction_psnr, retrieval
    from .images import write_png
    from .training.emoji import read_manifest
    from .training.pictures import sheet_of

    if options.sheet:
        _check_output(options.sheet, ".png")
    records = read_manifest(options.data)
    pipeline = _load(options)
    settings = _settings(options, pipeline.config.generation)
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
        write_png(options.sheet, sheet_of(images[0], columns=20))
