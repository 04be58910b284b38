"""The command line: all commands, their errors and exit codes, and `tokenshuffle info`.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 2 bad
input or a file that cannot be read or written, 130 interrupted.
"""

import argparse
import signal
import sys

from .. import __version__
from ..config import PRESETS
from . import data, evaluate, generate, train, weights
from .options import command


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
        message = f"this command needs {error.name}: pip install 'comfyui-tokenshuffle[train]'"
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
        prog="tokenshuffle",
        description="Text to image with a plain LLaMA and Token-Shuffle.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate.add(commands)
    info = command(commands, "info", _info, "Describe a checkpoint or a preset.")
    info.add_argument(
        "model", nargs="?", metavar="CHECKPOINT-or-PRESET",
        help=f"a file, or one of {', '.join(PRESETS)} (default: the bundled model)",
    )  # fmt: skip
    info.add_argument(
        "--language", metavar="LANGUAGE",
        help="of the subjects that a model with a closed vocabulary knows (default: en)",
    )  # fmt: skip
    data.add(commands)
    train.add(commands)
    evaluate.add(commands)
    weights.add(commands)
    return parser


def _info(options) -> None:
    from ..checkpoints import BUNDLED, read, skeleton

    card, vocabulary, config = {}, None, PRESETS.get(options.model)
    if config is None:
        try:
            checkpoint = read(options.model or BUNDLED)
        except FileNotFoundError:
            presets = ", ".join(PRESETS)
            raise FileNotFoundError(
                f"{options.model} is neither an existing file nor a preset ({presets})"
            ) from None
        config, card, vocabulary = checkpoint.config, checkpoint.card, checkpoint.vocabulary
        if checkpoint.kind:
            card = {"tokenshuffle.weights": checkpoint.kind} | card
    if options.language and not vocabulary:
        raise ValueError(f"--language {options.language}: no list of subjects is stored there")
    lines = {key.partition(".")[2]: value for key, value in card.items()}
    lines |= _known(vocabulary, options.language) if vocabulary else {}
    for key, value in lines.items():
        print(f"{key}: {value}")
    titles = {}
    for name, part in ("model", config.model), ("image tokenizer", config.image_tokenizer):
        parameters = sum(parameter.numel() for parameter in skeleton(part).parameters())
        titles[f"{name}: {parameters / 1e6:.1f} M parameters"] = part
    for title, part in (titles | {"generation:": config.generation}).items():
        print(title)
        for field, value in vars(part).items():
            print(f"  {field}: {value}")
    print(f"size: width and height in multiples of {config.pixels_per_window} pixels")


def _known(vocabulary, language: str | None) -> dict[str, str]:
    """What a vocabulary has in a language, as lines of a card."""
    language = language or vocabulary.languages[0]
    lines = {"subjects": vocabulary.names(language)}
    for name in ("styles", "backgrounds", "colours"):
        phrases = getattr(vocabulary, name).items()
        lines[name] = [by_language.get(language, key) for key, by_language in phrases]
    lines["subjects in these colours"] = vocabulary.names(language, recoloured=True)
    lines |= {"counts": map(str, vocabulary.counts), "compositions": vocabulary.kinds}
    return {name: text for name, values in lines.items() if (text := ", ".join(values))}
