"""The command line: all commands, their errors and exit codes.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 2 bad
input or a file that cannot be read or written, standard output included, 128 + N stopped by signal
N (130: Ctrl-C). A reader of standard output that goes away is no error.
"""

import argparse
import signal
import sys

from .. import __version__
from ..stopping import interruptible
from . import data, evaluate, generate, info, train, weights
from .streams import standard_streams


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with standard_streams() as output:
        code = _run(_parser().parse_args(arguments))
        output.flush()
        if output.error and not output.reader_is_gone:
            print(f"tokenshuffle: standard output: {output.error.strerror}", file=sys.stderr)
            return code or 2
        return code


def _run(options) -> int:
    try:
        with interruptible():
            options.run(options)
    except KeyboardInterrupt as stopped:
        print("interrupted", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    except ModuleNotFoundError as error:
        message = f"this command needs {error.name}: pip install 'comfyui-tokenshuffle[train]'"
    except MemoryError:
        message = "there is not enough memory"
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
    info.add(commands)
    data.add(commands)
    train.add(commands)
    evaluate.add(commands)
    weights.add(commands)
    return parser
