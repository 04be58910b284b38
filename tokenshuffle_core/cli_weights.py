"""The commands that make one checkpoint of another: `tokenshuffle merge`, `quantize`, `grow`."""

from .cli_options import add_model, check_output, command, load


def add(commands) -> None:
    """Add the commands `merge`, `quantize` and `grow`."""
    parser = command(
        commands, "merge", _merge, "Write a checkpoint with LoRA files merged into it."
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")
    add_model(parser)
    parser = command(commands, "quantize", _quantize, "Write a checkpoint with smaller weights.")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")
    add_model(parser)
    parser = command(commands, "grow", _grow, "Give a checkpoint other windows, to train it on.")
    parser.add_argument(
        "--windows", required=True, metavar="N,N,...", help="the first is the default one"
    )
    parser.add_argument(
        "--window-head", type=int, default=0, metavar="WIDTH",
        help="predict the codes of a window one after another, with so wide a head",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors")
    add_model(parser)


def _merge(options) -> None:
    from . import checkpoint

    output = check_output(options.output, ".safetensors")
    if not options.lora:
        raise ValueError("merge needs at least one --lora FILE")
    checkpoint.save(output, load(options))
    print(output)


def _quantize(options) -> None:
    from . import checkpoint

    output = check_output(options.output, ".safetensors")
    if not options.weights:
        raise ValueError("quantize needs --weights int8 or --weights fp8")
    checkpoint.save(output, load(options))
    print(output)


def _grow(options) -> None:
    from . import checkpoint
    from .grow import grow, kept_share

    output = check_output(options.output, ".safetensors")
    try:
        windows = tuple(int(part) for part in options.windows.split(","))
    except ValueError:
        raise ValueError(f"--windows {options.windows} must be like 2 or 1,2,4") from None
    parent = load(options)
    checkpoint.save(output, grow(parent, windows, options.window_head))
    for window in windows:
        if window > 1 and window not in parent.config.model.windows:
            share = kept_share(parent, window)
            print(f"window {window}: keeps {share:.1%} of the code embeddings' energy")
    print(output)
