"""The commands that turn one checkpoint into another: `tokenshuffle convert`, `merge`, `quantize`,
`grow`."""

from pathlib import Path

from ..checks import check_whole
from ..config import FAMILIES, MAX_PIXELS, WEIGHT_KINDS
from .options import add_model, check_output, command, load, model_path


def add(commands) -> None:
    """Add the commands `convert`, `merge`, `quantize` and `grow`."""
    parser = command(
        commands, "convert", _convert, "Convert a published model into one checkpoint file."
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE",
        help="a .pt file of LlamaGen, the file of Wallaroo, or the folder of a Janus, SimpleAR, "
        "Emu3.5 or LLaMA with config.json and its text tokenizer",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")
    parser.add_argument("--family", choices=FAMILIES, help="default: detected")
    parser.add_argument(
        "--image-tokenizer", type=Path, metavar="FILE",
        help="if it is not in the source (default for LlamaGen: vq_ds16_c2i.pt beside it)",
    )  # fmt: skip
    parser.add_argument("--side", type=int, help="size of the training pictures in pixels")
    parser.add_argument(
        "--windows", metavar="N,N,...", help="for a model that starts from a LLaMA (default: 2)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: as stored"
    )
    parser.add_argument(
        "--weights", choices=WEIGHT_KINDS,
        help="quantise the model on the way: the same as quantize afterwards, without the whole "
        "file in between",
    )  # fmt: skip
    parser = command(
        commands, "merge", _merge, "Write a checkpoint with LoRA files merged into it."
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")
    add_model(parser)
    parser = command(
        commands, "quantize", _quantize, "Write a checkpoint with 8-bit or 4-bit weights."
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")
    add_model(parser)
    parser = command(commands, "grow", _grow, "Give a checkpoint other windows, for more training.")
    parser.add_argument("source", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument(
        "--windows", "--window", required=True, metavar="N,N,...",
        help="the first is the default",
    )  # fmt: skip
    parser.add_argument(
        "--window-head", type=int, default=0, metavar="SIZE",
        help="hidden size of a head that predicts codes autoregressively within the window",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")
    add_model(parser)


def _convert(options) -> None:
    import torch

    from ..checkpoints import convert

    output = check_output(options.output, ".safetensors")
    if options.side is not None:
        check_whole("--side", options.side, 1, MAX_PIXELS)
    convert(
        options.source,
        output,
        options.family,
        image_tokenizer=options.image_tokenizer,
        side=options.side,
        windows=options.windows and _windows(options.windows),
        dtype=options.dtype and getattr(torch, options.dtype),
        weights=options.weights,
    )
    print(output)


def _windows(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--windows {text} must be like 2 or 1,2,4") from None


def _merge(options) -> None:
    if not options.lora:
        raise ValueError("merge needs at least one --lora FILE")
    _rewrite(options)


def _quantize(options) -> None:
    if not options.weights:
        raise ValueError(f"quantize needs --weights with one of {', '.join(WEIGHT_KINDS)}")
    from ..checkpoints import convert, read

    if options.lora:  # which is merged into a model in memory
        checkpoint = read(model_path(options))
        parts = checkpoint.model_weights, checkpoint.image_tokenizer_weights
        dtypes = {weight().dtype for part in parts for weight in part.values()}
        return _rewrite(options, dtypes.pop() if len(dtypes) == 1 else None)
    output = check_output(options.output, ".safetensors")
    convert(model_path(options), output, weights=options.weights)
    print(output)


def _rewrite(options, dtype=None) -> None:
    output = check_output(options.output, ".safetensors")
    _merged(options).save(output, dtype)
    print(output)


def _merged(options):
    """The model with its LoRAs, which its card names."""
    from ..adapt.card import MERGED, changed_card

    pipeline = load(options)
    for _ in options.lora:
        pipeline.card = changed_card(pipeline.card, MERGED)
    return pipeline


def _grow(options) -> None:
    from ..adapt.grow import grow, kept_share

    output = check_output(options.output, ".safetensors")
    windows = _windows(options.windows)
    options.model = options.source or options.model
    parent = _merged(options)
    grow(parent, windows, options.window_head).save(output)
    for window in windows:
        if window > 1 and window not in parent.config.model.windows:
            share = kept_share(parent, window)
            print(f"window {window}: keeps {share:.1%} of the code embeddings' energy")
    print(output)
