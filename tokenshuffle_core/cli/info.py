"""The command that describes a checkpoint or a preset."""

from pathlib import Path

from ..config import PRESETS
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
    from ..checkpoints import BUNDLED, image_tokenizer_alone, read, skeleton

    card, vocabulary, config, alone = {}, None, PRESETS.get(options.model), None
    if config is None:
        try:
            path = options.model or BUNDLED
            alone = image_tokenizer_alone(path)
            checkpoint = None if alone else read(path)
        except FileNotFoundError:
            if options.model and Path(options.model).exists():
                raise  # it says what to give in its place
            presets = ", ".join(PRESETS)
            raise FileNotFoundError(
                f"{options.model} is neither an existing file nor a preset ({presets})"
            ) from None
        if checkpoint:
            config, card, vocabulary = checkpoint.config, checkpoint.card, checkpoint.vocabulary
        if checkpoint and checkpoint.kind:
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
    shapes = {"model": config.model} if config else {}
    shapes["image tokenizer"] = alone or config.image_tokenizer
    for name, part in shapes.items():
        parameters = sum(parameter.numel() for parameter in skeleton(part).parameters())
        print(f"{name}: {parameters / 1e6:.1f} M parameters; {_fields(part)}")
    if config:
        print(f"generation: {_fields(config.generation)}")
    unit = config.pixels_per_window if config else alone.stride
    print(f"size: width and height in multiples of {unit} pixels")


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
