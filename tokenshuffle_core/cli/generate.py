"""The commands for pictures and codes: `tokenshuffle generate`, `encode`, `decode`."""

import sys
from pathlib import Path

from .options import (
    add_model,
    add_sampling,
    check_output,
    command,
    device_of,
    load,
    model_path,
    run_of,
    settings_of,
)

SAVE_MEMORY = "decode large pictures with less memory, but more slowly"


def add(commands) -> None:
    """Add the commands `generate`, `encode` and `decode`."""
    text = "Turn a prompt, or a file of prompts, into PNG pictures; torchrun splits up a file."
    parser = command(commands, "generate", _generate, text)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "prompt", nargs="?", help='such as "a red apple, 3d style"; "" asks for any picture'
    )
    what.add_argument(
        "--class", dest="class_name", metavar="CLASS",
        help='the number or the name of a class, such as 207 or "golden retriever", for a '
        "class-conditional model",
    )  # fmt: skip
    what.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl",
        help='lines such as {"prompt": "a red apple", "seed": 3, "width": 192, "file": "a.png"}',
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE.png", help="a folder with --prompts"
    )
    parser.add_argument("--negative", default="", help="what guidance steers away from")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", type=int, default=1, help="pictures, with seeds SEED, SEED + 1, ..."
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time, with --prompts")
    parser.add_argument("--save-memory", "--tiled", action="store_true", help=SAVE_MEMORY)
    parser.add_argument(
        "--greedy", action="store_const", dest="temperature", const=0.0,
        help="always take the most likely code: --temperature 0",
    )  # fmt: skip
    parser.add_argument("--save-codes", metavar="FILE.npy", help="also save the pictures' codes")
    add_sampling(parser)
    add_model(parser)
    parser = command(commands, "encode", _encode, "Turn a picture into image codes.")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.npy")
    parser.add_argument("--background", help="background colour for a transparent picture")
    add_model(parser, lora=False)
    parser = command(commands, "decode", _decode, "Turn image codes into a picture.")
    parser.add_argument("codes", metavar="CODES.npy")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png")
    parser.add_argument("--save-memory", "--tiled", action="store_true", help=SAVE_MEMORY)
    add_model(parser, lora=False)


def _generate(options) -> None:
    if options.class_name is not None:
        options.prompt = options.class_name
    if options.prompts:
        _generate_all(options)
    else:
        _generate_one(options)


def _generate_one(options) -> None:
    from tqdm import tqdm

    from ..checkpoints import SIZES
    from ..images import write_codes, write_png

    output = check_output(options.output, ".png")
    codes = options.save_codes and check_output(options.save_codes, ".npy")
    pipeline = load(options)
    if options.class_name is not None:
        pipeline.encode_class(options.class_name)
    settings = settings_of(options, pipeline.config.generation)
    rows, columns = pipeline.grid(settings)
    size = f"{settings.width}x{settings.height}"
    trained = pipeline.card.get(SIZES) or pipeline.card.get("modelspec.resolution", size)
    if size not in trained.split(", "):
        print(f"note: this model was trained on {trained}, not on {size}", file=sys.stderr)
    if unknown := pipeline.read_prompt(options.prompt).unknown_words():
        print(f"note: this model does not know {unknown}", file=sys.stderr)
    steps = pipeline.stream(
        options.prompt, options.negative, settings, seed=options.seed, count=options.count
    )
    *_, last = tqdm(steps, "sampling", rows * columns, unit="position", disable=None)
    images = pipeline.decode(last.codes, options.save_memory)
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

    if options.count != 1 or options.negative or options.save_memory or options.save_codes:
        raise ValueError(
            "--count, --negative, --save-memory and --save-codes work with one prompt, not with "
            "--prompts"
        )
    output = Path(options.output)
    pipeline, run = run_of(options)
    jobs = read_prompts(pipeline, options.prompts, output, run.settings, run.seed)
    claim(output, run, options.prompts.read_text(encoding="utf-8").split("\n"))
    summary = draw(pipeline, share(jobs, run.rank, run.world), run.batch)
    print(f"{summary.drawn} pictures drawn, {summary.kept} kept", file=sys.stderr)
    print(output)


def _image_tokenizer(options):
    from ..checkpoints import load_image_tokenizer

    return load_image_tokenizer(model_path(options), device_of(options.device))


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
        image = decode_codes(_image_tokenizer(options), codes, options.save_memory)
    except ValueError as error:
        raise ValueError(f"{options.codes}: {error}") from None
    write_png(output, image[0])
    print(output)
