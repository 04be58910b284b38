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
    option = command(parts, "emoji", _emoji, "Build the emoji data set.").add_argument
    option("directory", type=Path, metavar="DIR")
    option("--size", type=int, default=128, help="pixels (default: 128)")
    option("--subjects", default="popular", help='"popular", "all" or a text file')
    option("--styles", default="3d,flat,noto", help="of 3d, modern, flat, noto")
    option("--languages", help="languages of the captions, such as en,zh (default: ten)")
    option("--held-out", type=float, default=0.05, help="share of the pictures to hold out")
    text = "also compose N pictures, in the image folder DIR/composed"
    option("--compositions", type=int, metavar="N", help=text)
    text = "sizes of the compositions (default: that of the pictures)"
    option("--sizes", metavar="WxH,WxH,...", help=text)
    text = "how often an epoch visits a single subject on white (default: 8)"
    option("--white-repeats", type=int, default=8, metavar="N", help=text)
    option("--seed", type=int, default=0)


def _emoji(options) -> None:
    from ..data.emoji import folder
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
        path = folder.build(
            options.directory, options.compositions, sizes=sizes,
            white_repeats=options.white_repeats, seed=options.seed,
        )  # fmt: skip
        print(path)


def _add_codes(parts) -> None:
    text = (
        "Encode your own pictures, or compositions of the emoji data set; under torchrun, the "
        "processes share the work."
    )
    parser = command(parts, "codes", _codes, text)
    option, size_option = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    text = "folder of pictures with .txt captions or a metadata.jsonl or .csv, or .tar shards"
    option("source", type=Path, metavar="SOURCE", help=text)
    option("-o", "--output", type=Path, required=True, metavar="DIR")
    option("--image-tokenizer", type=Path, metavar="FILE", help="(default: the bundled model's)")
    text = "sizes to crop to, each picture to the nearest; of compositions, their sizes"
    size_option("--sizes", metavar="WxH,WxH,...", help=text)
    text = f"crop to sizes of about PX x PX pixels (default: {SIDE})"
    size_option("--side", type=int, metavar="PX", help=text)
    text = f"largest ratio of the sides of such a size (default: {MAX_RATIO:g})"
    option("--max-ratio", type=float, help=text)
    text = "colour behind transparent pictures (default: white)"
    option("--background", metavar="COLOUR", help=text)
    text = "share to hold out for validation (default: only pictures marked as held out)"
    option("--held-out", type=float, default=0.0, metavar="SHARE", help=text)
    text = "pictures per shard (default: 1024; of compositions 8192)"
    option("--shard-size", type=int, metavar="N", help=text)
    text = "pictures encoded at once (default: 16; of compositions on CUDA, what 2 GB hold)"
    option("--batch", type=int, metavar="N", help=text)
    option("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    text = (
        "SOURCE is a folder of `data emoji`: compose N pictures of it, as `data emoji "
        "--compositions` does, and encode them without saving them"
    )
    option = parser.add_argument_group("compositions of the emoji data set").add_argument
    option("--compositions", type=int, metavar="N", help=text)
    text = (
        "share of them in the first of --sizes, but for half of those of several subjects, which "
        "have the size that suits them (default: each in one that suits its subjects)"
    )
    option("--first-share", type=float, metavar="SHARE", help=text)
    text = "how often an epoch visits a single subject on white in the first size (default: 8)"
    option("--white-repeats", type=int, metavar="N", help=text)
    text = (
        "share of them whose subjects are up to a quarter smaller, elsewhere in their places, or "
        "mirrored; then single subjects come more than once (default: 0)"
    )
    option("--jitter", type=float, metavar="SHARE", help=text)
    option("--seed", type=int, help="which compositions, and their captions (default: 0)")


OF_PICTURES = ("side", "max_ratio", "background")
OF_COMPOSITIONS = ("first_share", "white_repeats", "jitter", "seed")


def _codes(options) -> None:
    from .. import checkpoints
    from ..data.buckets import buckets
    from ..data.emoji.codes import extract_compositions
    from ..data.extraction import extract

    composed = options.compositions is not None
    for name in OF_PICTURES if composed else OF_COMPOSITIONS:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is not for compositions: leave it out"
                if composed
                else f"{option} is for compositions: add --compositions"
            )
    if options.sizes and options.max_ratio is not None:
        raise ValueError("--max-ratio goes with --side, not with --sizes: leave one of them out")
    device = device_of(own_device(options.device))
    image_tokenizer = checkpoints.load_image_tokenizer(
        options.image_tokenizer or checkpoints.BUNDLED
    )
    sizes = list(dict.fromkeys(parse_sizes(options.sizes or "")))
    names = ("shard_size", "batch", *(OF_COMPOSITIONS if composed else ("background",)))
    given = {name: getattr(options, name) for name in names}
    more = {name: value for name, value in given.items() if value is not None}
    more |= {"held_out": options.held_out, "device": device}
    more["rank"], more["world"] = process()
    if composed:
        summary = extract_compositions(
            options.source, options.compositions, options.output, image_tokenizer, sizes, **more
        )
    else:
        side = SIDE if options.side is None else options.side
        ratio = MAX_RATIO if options.max_ratio is None else options.max_ratio
        sizes = sizes or buckets(side, UNIT * image_tokenizer.config.stride, ratio)
        summary = extract(options.source, options.output, image_tokenizer, sizes, **more)
    left_out = f", {summary.broken} left out: {summary.broken} cannot be read (see broken-*.txt)"
    print(
        f"{summary.pictures} pictures in {summary.written} new shards and {summary.kept} that were "
        "already complete" + left_out * (summary.broken > 0),
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
