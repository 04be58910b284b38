"""The command that describes a checkpoint or a preset."""

from pathlib import Path

from ..presets import PRESETS
from ..vocabulary import UNPRINTABLE
from .options import command

# Of a card, in this order; the rest follows in alphabetical order.
FIRST = ("title", "description", "usage_hint", "sizes", "weights", "scores", "limits", "license")
LONGEST = 2000  # characters of a line
LEFT_OUT = ("sai_model_spec", "architecture", "resolution")  # constants, or said by another line


def add(commands) -> None:
    parser = command(commands, "info", _info, "Describe a checkpoint or a preset.")
    parser.add_argument(
        "model", nargs="?", metavar="CHECKPOINT-or-PRESET",
        help=f"a file, or one of {', '.join(PRESETS)} (default: the bundled model)",
    )  # fmt: skip
    parser.add_argument(
        "--subjects", action="store_true",
        help="list only the subjects that a model with a closed vocabulary knows, one a line",
    )  # fmt: skip
    parser.add_argument(
        "--language", metavar="LANGUAGE", help="of the subjects and phrases (default: en)"
    )


def _info(options) -> None:
    from ..checkpoints import BUNDLED, image_tokenizers, read

    card, vocabulary, config = {}, None, PRESETS.get(options.model)
    if config is None:
        try:
            if image_tokenizers.is_alone(options.model or BUNDLED):
                return _image_tokenizer(options.model)
            checkpoint = read(options.model or BUNDLED)
        except FileNotFoundError:
            if options.model and Path(options.model).exists():
                raise  # it says what to give in its place
            presets = ", ".join(PRESETS)
            raise FileNotFoundError(
                f"{options.model} is neither an existing file nor a preset ({presets})"
            ) from None
        config, card, vocabulary = checkpoint.config, checkpoint.card, checkpoint.vocabulary
        if checkpoint.kind:
            card = {"tokenshuffle.weights": checkpoint.kind} | card
    for name in ("subjects", "language"):
        if getattr(options, name) and not vocabulary:
            raise ValueError(f"--{name}: {options.model} stores no list of subjects")
    if options.subjects:
        print("\n".join(vocabulary.names(options.language)))
        return
    lines = {key.partition(".")[2]: value for key, value in card.items()}
    order = [*FIRST, *sorted(lines)]
    for key in dict.fromkeys(key for key in order if key in lines and key not in LEFT_OUT):
        print(_line(key, lines[key]))
    for key, value in (_known(vocabulary, options.language) if vocabulary else {}).items():
        print(f"{key}: {value}")
    for name, part in ("model", config.model), ("image tokenizer", config.image_tokenizer):
        print(_part(name, part))
    print(f"generation: {_fields(config.generation)}")
    _print_unit(config.pixels_per_window)


def _print_unit(pixels: int) -> None:
    print(f"size: width and height in multiples of {pixels} pixels")


def _image_tokenizer(path: str) -> None:
    """Describes one that is alone."""
    from ..checkpoints import cosmos, image_tokenizers

    config, _ = image_tokenizers.read(path)
    print(_part("image tokenizer", config))
    _print_unit(config.stride)
    if config.video:
        version = cosmos.version_of(path)
        print(f"version: {version or 'nothing says which'}")
        if version != cosmos.OF_SIMPLEAR:
            wanted = f"Cosmos-{cosmos.OF_SIMPLEAR}-Tokenizer-DV8x16x16"
            print(f"note: SimpleAR needs {wanted}, which has the same shapes and other weights")


def _part(name: str, part) -> str:
    from ..checkpoints import skeleton

    parameters = sum(parameter.numel() for parameter in skeleton(part).parameters())
    return f"{name}: {parameters / 1e6:.1f} M parameters; {_fields(part)}"


def _line(key: str, value: str) -> str:
    """Of a card from a stranger, whose text may be long or move the terminal's cursor."""
    text = UNPRINTABLE.sub(" ", f"{key}: {value}")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _fields(part) -> str:
    return ", ".join(f"{field}: {value}" for field, value in vars(part).items())


def _known(vocabulary, language: str | None) -> dict[str, str]:
    """What a vocabulary has in a language, as lines of a card."""
    language = language or vocabulary.languages[0]
    subjects, recoloured = (len(vocabulary.names(language, recoloured=r)) for r in (False, True))
    lines = {
        "subjects": [f"{subjects}, {recoloured} of them in other colours (--subjects lists them)"],
        "languages": vocabulary.languages,
    }
    for name in ("styles", "colours", "backgrounds"):
        phrases = getattr(vocabulary, name).items()
        lines[name] = [by_language.get(language, key) for key, by_language in phrases]
    lines |= {"counts": map(str, vocabulary.counts), "compositions": vocabulary.kinds}
    return {name: text for name, values in lines.items() if (text := ", ".join(values))}
