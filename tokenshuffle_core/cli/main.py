"""The command line: `tokenshuffle generate`, `encode`, `decode`, `info` and those of cli_*.py.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 2 bad
input or a file that cannot be read or written, 130 interrupted.
"""

import argparse
import signal
import sys
from pathlib import Path

from .. import __version__
from ..config import PRESETS, Config
from . import data as cli_data
from . import evaluate as cli_eval
from . import train as cli_training
from . import weights as cli_weights
from .options import (
    add_model,
    add_sampling,
    check_output,
    command,
    device_of,
    load,
    run_of,
    settings_of,
)


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
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_codes(commands)
    _add_info(commands)
    cli_data.add(commands)
    cli_training.add(commands)
    cli_eval.add(commands)
    cli_weights.add(commands)
    return parser


# generate


def _add_generate(commands) -> None:
    text = "Turn a prompt into PNG pictures, or a file of prompts; under torchrun, each a share."
    parser = command(commands, "generate", _generate, text)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "prompt", nargs="?", help='such as "a red apple, 3d style"; "" asks for any picture'
    )
    what.add_argument(
        "--class", dest="class_name", metavar="CLASS",
        help='the number or the name of a class, such as 207 or "golden retriever", for a model '
        "of classes",
    )  # fmt: skip
    what.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl",
        help='lines such as {"prompt": "a red apple", "seed": 3, "width": 192, "file": "a.png"}',
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE.png", help="a folder with --prompts"
    )
    parser.add_argument("--negative", default="", help="what guidance leads away from")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="pictures, of seed, seed + 1, ...")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once, with --prompts")
    parser.add_argument("--tiled", action="store_true", help="decode in strips, with less memory")
    parser.add_argument(
        "--greedy", action="store_const", dest="temperature", const=0.0,
        help="always take the likeliest code: --temperature 0",
    )  # fmt: skip
    parser.add_argument("--save-codes", metavar="FILE.npy", help="the pictures' codes as well")
    add_sampling(parser)
    add_model(parser)


def _generate(options) -> None:
    if options.class_name is not None:
        options.prompt = options.class_name
    if options.prompts:
        _generate_all(options)
    else:
        _generate_one(options)


def _generate_one(options) -> None:
    from tqdm import tqdm

    from ..checkpoints.native import SIZES
    from ..images import write_codes, write_png

    output = check_output(options.output, ".png")
    codes = options.save_codes and check_output(options.save_codes, ".npy")
    pipeline = load(options)
    settings = settings_of(options, pipeline.config.generation)
    rows, columns = pipeline.grid(settings)
    size = f"{settings.width}x{settings.height}"
    trained = pipeline.card.get(SIZES) or pipeline.card.get("modelspec.resolution", size)
    if size not in trained.split(", "):
        print(f"note: this model was trained at {trained}, not at {size}", file=sys.stderr)
    last = None

    def advance(step) -> None:
        nonlocal last
        last = step
        bar.update()

    with tqdm(total=rows * columns, desc="sampling", unit="position", disable=None) as bar:
        images = pipeline.generate(
            options.prompt,
            options.negative,
            settings,
            seed=options.seed,
            count=options.count,
            tiled=options.tiled,
            progress=advance,
        )
    for i, image in enumerate(images):
        name = output if options.count == 1 else output.with_stem(f"{output.stem}-{i + 1}")
        about = {"prompt": options.prompt, "negative": options.negative, "seed": options.seed + i}
        title = pipeline.card.get("modelspec.title", "")
        write_png(name, image, **about, **vars(settings), model=title)
        print(name)
    if codes:
        write_codes(codes, last.codes.cpu())
        print(codes)


def _generate_all(options) -> None:
    from ..bulk import claim, draw, read_prompts, share

    if options.count != 1 or options.negative or options.tiled or options.save_codes:
        raise ValueError(
            "--count, --negative, --tiled and --save-codes go with one prompt, not with --prompts"
        )
    output = Path(options.output)
    pipeline, run = run_of(options)
    jobs = read_prompts(pipeline, options.prompts, output, run.settings, run.seed)
    claim(output, run, options.prompts.read_text(encoding="utf-8").split("\n"))
    summary = draw(pipeline, share(jobs, run.rank, run.world), run.batch)
    print(f"{summary.drawn} pictures drawn, {summary.kept} kept", file=sys.stderr)
    print(output)


# encode, decode


def _add_codes(commands) -> None:
    parser = command(commands, "encode", _encode, "Turn a picture into image codes.")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.npy")
    parser.add_argument("--background", help="what lies behind a transparent picture")
    add_model(parser, lora=False)
    parser = command(commands, "decode", _decode, "Turn image codes into a picture.")
    parser.add_argument("codes", metavar="CODES.npy")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png")
    parser.add_argument("--tiled", action="store_true", help="decode in strips, with less memory")
    add_model(parser, lora=False)


def _image_tokenizer(options):
    from ..checkpoints import families
    from ..checkpoints import native as checkpoint

    path = options.model or checkpoint.BUNDLED
    return families.load_image_tokenizer(path, device_of(options.device))


def _encode(options) -> None:
    from ..images import read_image, write_codes
    from ..pipeline import encode_images

    output = check_output(options.output, ".npy")
    image = read_image(options.image, options.background)
    try:
        codes = encode_images(_image_tokenizer(options), image)
    except ValueError as error:
        raise ValueError(f"{options.image}: {error}") from None
    write_codes(output, codes)
    print(output)


def _decode(options) -> None:
    from ..images import read_codes, write_png
    from ..pipeline import decode_codes

    output = check_output(options.output, ".png")
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
    parser = command(commands, "info", _info, "Describe a checkpoint or a preset.")
    parser.add_argument(
        "model", nargs="?", metavar="CHECKPOINT-or-PRESET",
        help=f"a file, or one of {', '.join(PRESETS)} (default: the bundled model)",
    )  # fmt: skip


def _info(options) -> None:
    import torch

    from ..checkpoints import families
    from ..checkpoints import native as checkpoint
    from ..image_tokenizer import ImageTokenizer
    from ..model import TokenShuffleModel

    card = {}
    if options.model in PRESETS:
        config = PRESETS[options.model]
    elif options.model and families.is_published(options.model):
        published = families.read(options.model)
        config, card = published.config, published.card
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
