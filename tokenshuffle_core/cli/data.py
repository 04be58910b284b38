"""The command `tokenshuffle data`: training data sets, built or encoded."""

import sys
from pathlib import Path

from ..config import parse_sizes
from .options import command, device_of, own_device, process

UNIT = 4  # codes; sides of buckets are multiples of it, for windows of 1, 2 and 4
SIDE = 256  # pixels
MAX_RATIO = 2.0


def add(commands) -> None:
    """Add the command `data`."""
    parser = commands.add_parser("data", help="Build a training data set.")
    parts = parser.add_subparsers(required=True, metavar="PART")
    _add_emoji(parts)
    _add_codes(parts)


def _add_emoji(parts) -> None:
    parser = command(parts, "emoji", _emoji, "Build the emoji data set.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--subjects", default="popular", help='"popular", "all" or a text file')
    parser.add_argument("--styles", default="3d,flat,noto", help="of 3d, modern, flat, noto")
    parser.add_argument(
        "--languages", help="languages of the captions, such as en,zh (default: ten)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.05, help="share of the pictures to hold out"
    )
    parser.add_argument(
        "--compositions",
        type=int,
        metavar="N",
        help="also compose N pictures, in the image folder DIR/composed",
    )
    parser.add_argument(
        "--sizes",
        metavar="WxH,WxH,...",
        help="sizes of the compositions (default: that of the pictures)",
    )
    parser.add_argument(
        "--white-repeats", type=int, default=8, metavar="N",
        help="how often an epoch visits a single subject on white (default: 8)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)


def _emoji(options) -> None:
    from ..data.emoji import compose
    from ..data.emoji.build import LANGUAGES, build

    sizes = list(dict.fromkeys(parse_sizes(options.sizes or "")))
    if sizes and options.compositions is None:
        raise ValueError("--sizes is for compositions: add --compositions")
    manifest = build(
        options.directory,
        size=options.size,
        subjects=options.subjects,
        styles=tuple(options.styles.split(",")),
        languages=tuple(options.languages.split(",")) if options.languages else LANGUAGES,
        held_out=options.held_out,
        seed=options.seed,
    )
    print(manifest)
    if options.compositions is not None:
        path = compose.build(
            options.directory, options.compositions, sizes=sizes,
            white_repeats=options.white_repeats, seed=options.seed,
        )  # fmt: skip
        print(path)


def _add_codes(parts) -> None:
    text = "Encode your own pictures; under torchrun, the processes share the work."
    parser = command(parts, "codes", _codes, text)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of pictures with .txt captions, folder with a metadata.jsonl, or .tar shards",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--image-tokenizer", type=Path, metavar="FILE", help="(default: the bundled model's)"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--sizes", metavar="WxH,WxH,...", help="sizes to crop to, each picture to the nearest"
    )
    sizes.add_argument(
        "--side",
        type=int,
        metavar="PX",
        help=f"crop to sizes of about PX x PX pixels (default: {SIDE})",
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        help=f"largest ratio of the sides of such a size (default: {MAX_RATIO:g})",
    )
    parser.add_argument("--background", default="white", help="colour behind transparent pictures")
    parser.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE",
        help="share to hold out for validation (default: only pictures marked as held out)",
    )  # fmt: skip
    parser.add_argument(
        "--shard-size", type=int, default=1024, help="pictures per shard (default: 1024)"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")


def _codes(options) -> None:
    from .. import checkpoints
    from ..data.buckets import buckets
    from ..data.shards import extract

    if options.sizes and options.max_ratio is not None:
        raise ValueError("--max-ratio goes with --side, not with --sizes: leave one of them out")
    device = device_of(own_device(options.device))
    image_tokenizer = checkpoints.load_image_tokenizer(
        options.image_tokenizer or checkpoints.BUNDLED, device
    )
    if options.sizes:
        sizes = parse_sizes(options.sizes)
    else:
        ratio = MAX_RATIO if options.max_ratio is None else options.max_ratio
        side = SIDE if options.side is None else options.side
        sizes = buckets(side, UNIT * image_tokenizer.config.stride, ratio)
    rank, world = process()
    summary = extract(
        options.source,
        options.output,
        image_tokenizer,
        sizes,
        background=options.background,
        shard_size=options.shard_size,
        batch=options.batch,
        held_out=options.held_out,
        device=device,
        rank=rank,
        world=world,
    )
    print(
        f"{summary.pictures} pictures in {summary.written} new shards and {summary.kept} that were "
        f"already complete; {summary.broken} broken ones left out",
        file=sys.stderr,
    )
    if summary.index:
        print(summary.index)
    else:
        print(
            "shards of other processes are still missing: the last process writes the index; run "
            "the command again if one was interrupted",
            file=sys.stderr,
        )
