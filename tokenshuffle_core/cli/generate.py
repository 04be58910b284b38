"""The commands for pictures and codes: `tokenshuffle generate`, `encode`, `decode`."""

import secrets
import sys
from pathlib import Path

from .options import (
    add_model,
    add_sampling,
    check_batch,
    check_output,
    command,
    device_of,
    file_and_strength,
    load,
    model_path,
    process,
    run_of,
    settings_of,
)

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MOST = 100_000  # pictures of one command
SAVE_MEMORY = "decode large pictures with less memory, but more slowly"


def add(commands) -> None:
    """Add the commands `generate`, `encode` and `decode`."""
    text = "Turn a prompt, or a file of prompts, into pictures; torchrun splits up a file."
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
        "--prompts", type=Path, metavar="FILE",
        help="a .txt file with a prompt a line, or a .jsonl file with lines such as "
        '{"prompt": "a red apple", "seed": 3, "width": 192, "file": "a.png"}',
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE.png",
        help="or .jpg, or .webp without loss; with --count, FILE-1.png, FILE-2.png, ...; with "
        "--prompts, a folder",
    )  # fmt: skip
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace existing files")
    existing.add_argument(
        "--skip-existing", action="store_true",
        help="go on where the same command stopped: keep its pictures, as --prompts always does",
    )  # fmt: skip
    parser.add_argument(
        "--negative", default="", help="what guidance steers away from (default: the model's own, "
        "if it has one)",
    )  # fmt: skip
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument(
        "--seed", type=int, default=0, help="-1 takes a random one and prints it (default: 0)"
    )
    parser.add_argument(
        "--count", type=int, default=1, help="pictures, with seeds SEED, SEED + 1, ..."
    )
    parser.add_argument(
        "--batch", type=int, metavar="N",
        help="pictures at a time, saved together (default: as many as fit into memory, at most 32)",
    )  # fmt: skip
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
    if options.seed == -1:
        if process()[1] > 1:
            raise ValueError("--seed -1 works in one process: give torchrun's a seed")
        options.seed = secrets.randbelow(2**32)
        print(f"seed {options.seed}", file=sys.stderr)
    if options.prompts:
        _generate_all(options)
    else:
        _generate_some(options)


def _generate_some(options) -> None:
    """The pictures of one prompt."""
    import torch
    from tqdm import tqdm

    from ..bulk import Job, draw_all, undrawn
    from ..checkpoints import SIZES
    from ..images import check_fits, write_codes
    from ..pipeline import seeds_from

    output, names, codes_file = _outputs(options)
    check_batch(options)
    pipeline = load(options)
    if options.class_name is not None:
        pipeline.encode_class(options.class_name)
    settings = settings_of(options, pipeline.config.generation)
    model = {"model": pipeline.card.get("modelspec.title", "")} | _changes(options)
    seeds = seeds_from(options.seed, options.count)
    jobs = [
        Job(options.prompt, seed, name, settings, options.negative, model)
        for seed, name in zip(seeds, names, strict=True)
    ]
    check_fits(output, jobs[0].about)
    pipeline.grid(settings)
    todo = undrawn(jobs, options.overwrite, ours=False)
    size = f"{settings.width}x{settings.height}"
    trained = pipeline.card.get(SIZES) or pipeline.card.get("modelspec.resolution", size)
    if size not in trained.split(", "):
        print(f"note: this model was trained on {trained}, not on {size}", file=sys.stderr)
    if unknown := pipeline.read_prompt(options.prompt).unknown_words():
        print(f"note: this model does not know {unknown}", file=sys.stderr)
    drawn = []
    try:
        for job, codes in draw_all(pipeline, todo, options.batch, save_memory=options.save_memory):
            drawn.append(codes if codes_file else None)
            tqdm.write(str(job.path), sys.stdout)
            sys.stdout.flush()
    finally:
        if drawn and codes_file:
            write_codes(codes_file, torch.stack(drawn))
        there = len(jobs) - len(todo) + len(drawn)
        if 0 < there < len(jobs):
            print(
                f"{there} of {len(jobs)} pictures are there: --skip-existing draws the others",
                file=sys.stderr,
            )
    if codes_file:
        print(codes_file)
    if len(todo) < len(jobs):
        print(f"{len(todo)} pictures drawn, {len(jobs) - len(todo)} kept", file=sys.stderr)


def _outputs(options) -> tuple[Path, list[Path], Path | None]:
    """--output, the files of the pictures, and that of the codes. Raises ValueError, also where one
    of them exists already."""
    if not 1 <= options.count <= MOST:
        raise ValueError(
            f"the number of pictures, --count, must be from 1 to {MOST}, not {options.count}"
        )
    output = check_output(options.output, *PICTURES)
    names = [output]
    if options.count > 1:
        names = [output.with_stem(f"{output.stem}-{i + 1}") for i in range(options.count)]
        check_output(names[-1], *PICTURES)  # the longest
    codes = check_output(options.save_codes, ".npy") if options.save_codes else None
    if codes and options.skip_existing:
        raise ValueError("--save-codes saves the codes of all pictures: leave out --skip-existing")
    if not options.overwrite and not options.skip_existing:
        for path in [*names, *([codes] if codes else [])]:
            if path.exists():
                more = ", --skip-existing keeps it and draws what is missing" if not codes else ""
                raise ValueError(f"{path} exists: --overwrite replaces it{more}")
    return output, names, codes


def _changes(options) -> dict:
    """What changed the model of a picture."""
    loras = [file_and_strength(text) for text in options.lora]
    changes = {
        "lora": [[Path(path).name, strength] for path, strength in loras],
        "weights": options.weights,
    }
    return {name: change for name, change in changes.items() if change}


def _generate_all(options) -> None:
    from ..bulk import RUN, claim, draw_all, share, undrawn
    from ..lock import lock
    from ..prompts import read_prompts

    if options.count != 1 or options.negative or options.save_memory or options.save_codes:
        raise ValueError(
            "--count, --negative, --save-memory and --save-codes work with one prompt, not with "
            "--prompts"
        )
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file: --prompts needs a folder")
    pipeline, run = run_of(options)
    jobs = read_prompts(pipeline, options.prompts, output, run.settings, run.seed)
    lines = options.prompts.read_text(encoding="utf-8").split("\n")
    jobs = share(jobs, run.rank, run.world)
    output.mkdir(parents=True, exist_ok=True)
    with lock(output, run.rank):
        # The folder of another run is refused, whatever its files are.
        if ours := (output / RUN).exists():
            claim(output, run, lines)
        todo = undrawn(jobs, options.overwrite, ours)
        claim(output, run, lines)
        drawn = 0
        try:
            for _ in draw_all(pipeline, todo, run.batch):
                drawn += 1
        finally:
            kept = len(jobs) - len(todo)
            left = f", {len(todo) - drawn} left" if drawn < len(todo) else ""
            print(f"{drawn} pictures drawn, {kept} kept{left}", file=sys.stderr)
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
    from ..images import read_codes, write_picture
    from ..pipeline import decode_codes

    output = check_output(options.output, *PICTURES)
    codes = read_codes(options.codes)
    if len(codes) != 1:
        raise ValueError(f"{options.codes} holds {len(codes)} pictures: decode takes one at a time")
    try:
        image = decode_codes(_image_tokenizer(options), codes, options.save_memory)
    except ValueError as error:
        raise ValueError(f"{options.codes}: {error}") from None
    write_picture(output, image[0])
    print(output)
