"""What is done to files from which others make hostile ones: each changes a file in place."""

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tokenshuffle_core.checkpoints import native
from tokenshuffle_core.files import open_safetensors

HEADER = 4096  # bytes at either end, where most mutations fall
# In the place of a value in JSON; what is between RAW is written as it stands.
RAW = "\x01"
VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 1.5, 1e-300, 3e38, 2**31, 2**63, 10**30, "", "a", "\ud800",
    "x" * 100_000, "\0", [], {}, [[]], {"": 0}, [1] * 5000,
    *(f"{RAW}{text}{RAW}" for text in ("1e999", "NaN", "-Infinity", "9" * 5000, "[" * 200_000)),
    f"{RAW}{'[' * 900}{']' * 900}{RAW}",
)  # fmt: skip
# Pieces of text tokenizers that take for ever, multiply text or panic.
PIECES = (
    *(
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in (
            "(x+x+)+y",
            "(a|a)*b",
            "",
            "(?:a?){40}a{40}",
            r"(\s*)*$",
            "((a{999}){999}){999}",
        )
    ),
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaaaaaa"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "a"},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"},
    {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA=AA"},
    {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AYQA="},
    {"type": "FixedLength", "length": 0},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Prepend", "prepend": "a" * 10_000},
    {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": True},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": []},
)
HARMLESS = (
    *(
        {"type": kind}
        for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "Fuse", "Whitespace")
    ),
    {"type": "Digits", "individual_digits": True},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Split", "pattern": {"Regex": r"\s+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": True},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAAAAAAAYQA="},
)
# In a pickle: run `touch ran`, by several instructions.
CODE = (
    b"cposix\nsystem\n(X\x09\x00\x00\x00touch rantR0",
    b"\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R0",
    b"(X\x09\x00\x00\x00touch raniposix\nsystem\n0",
    b"cbuiltins\neval\n(X\x01\x00\x00\x001tR0",
    b"ctorch.serialization\nload\n(X\x01\x00\x00\x00xtR0",
)

Chance = random.Random


def of_bytes(file: Path, chance: Chance) -> None:
    """Bytes changed, cut out, doubled and cut off, mostly at the ends."""
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not data:
            break
        near = min(HEADER, len(data))
        place = chance.choice((
            chance.randrange(near), len(data) - 1 - chance.randrange(near),
            chance.randrange(len(data)),
        ))  # fmt: skip
        kind = chance.randrange(6)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord(".")))
        elif kind == 2:
            del data[place : place + chance.choice((1, 4, 100, 10_000))]
        elif kind == 3:
            data[place:place] = data[place : place + chance.choice((1, 8, 64))]
        elif kind == 4:
            del data[place:]
        else:
            other = chance.randrange(len(data))
            data[place : place + 8] = data[other : other + 8]
    file.write_bytes(data)


def of_json(text: str, chance: Chance) -> str:
    """JSON with a value replaced, left out, doubled or moved, somewhere in its tree."""
    whole = {"": json.loads(text)}
    for _ in range(chance.choice((1, 1, 1, 3))):
        place, key = whole, ""
        # All branches are as likely, and not the thousands of entries of one.
        while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.9:
            place = place[key]
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        value, others = place[key], list(place) if isinstance(place, dict) else range(len(place))
        kind = chance.randrange(10)
        if isinstance(value, dict | list) and kind < 6:
            piece = chance.choice(PIECES)
            places = ("type" in value) if isinstance(value, dict) else kind < 3
            place[key] = piece if places else [value] * chance.choice((1, 2, 100))
        elif isinstance(value, int | float) and kind < 6:
            place[key] = chance.choice((value + 1, value * 2, value // 2, -value, value * 1000))
        elif kind == 6:
            del place[key]
        elif kind == 7:
            other = chance.choice(others)
            place[key], place[other] = place[other], place[key]
        elif kind == 8 and isinstance(place, dict) and value is not whole[""]:
            place[chance.choice(("type", "x", key + key, "id"))] = value
        else:
            place[key] = chance.choice(VALUES)
        whole.setdefault("", None)
    raw = json.dumps(RAW)[1:-1]
    return json.dumps(whole[""]).replace(f'"{raw}', "").replace(f'{raw}"', "")


def of_metadata(*keys: str) -> Callable[[Path, Chance], None]:
    """Changes one of these keys of a safetensors file's metadata, or any other one."""

    def mutate(file: Path, chance: Chance) -> None:
        metadata = open_safetensors(file).metadata()
        key = chance.choice(keys or [key for key in metadata if key not in native.FOR_MACHINES])
        kind = chance.randrange(10)
        if kind == 0:
            del metadata[key]
        elif kind == 1 or not metadata[key].startswith("{"):
            metadata[key] = chance.choice(("", "\0", "x" * 2_000_000, "{}", "3x3, 1", "\x1b[2J"))
        else:
            metadata[key] = of_json(metadata[key], chance)
        set_metadata(file, metadata)

    return mutate


def set_metadata(file: Path, metadata: dict[str, str]) -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]) | {"__metadata__": metadata}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def of_pieces(file: Path, chance: Chance) -> None:
    """Pieces put into the text tokenizer, often several and more than once."""
    metadata = open_safetensors(file).metadata()
    parts = json.loads(metadata[native.TEXT_TOKENIZER])
    place, inner = chance.choice((
        ("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders"),
    ))  # fmt: skip
    known = [parts[place]] if chance.random() < 0.5 else []
    pieces = chance.choices((*PIECES, *HARMLESS), k=chance.choice((1, 1, 2, 4)))
    pieces *= chance.choice((1, 1, 40))
    parts[place] = {"type": "Sequence", inner: [*known, *pieces]}
    set_metadata(file, metadata | {native.TEXT_TOKENIZER: json.dumps(parts)})


def of_tensors(file: Path, chance: Chance) -> None:
    """Weights of other values, types, shapes and names."""
    tensors, metadata = load_file(file), open_safetensors(file).metadata()
    for _ in range(chance.choice((1, 2, 30))):
        name = chance.choice(sorted(tensors))
        x = tensors[name]
        kind = chance.randrange(8)
        if kind < 2:
            value = chance.choice((float("nan"), float("inf"), 3e38, -1e30, 1e-40, 0.0))
            if x.is_floating_point():
                x.view(-1)[chance.choice((slice(None), slice(0, 1)))] = value
        elif kind == 2:
            types = (torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e5m2)
            tensors[name] = x.to(chance.choice(types))
        elif kind == 3:
            y = x.view(-1) if chance.random() < 0.3 else x.view(x.shape or 1)
            tensors[name] = chance.choice((y[None], y[:0], y, y[..., :1])).contiguous()
        elif kind == 4:
            del tensors[name]
        elif kind == 5:
            tensors[name + "x"] = x.clone()
        else:
            tensors[name] = (x.float() * chance.choice((1e3, -1e5, 1e20))).to(x.dtype)
    save_file(tensors, file, metadata)


def of_pickle(file: Path, chance: Chance) -> None:
    """Code, or changed bytes, in the pickle of a zip file, whose checksums stay right."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("/data.pkl"))
    pickle = bytearray(entries[name])
    if chance.random() < 0.5:
        place = chance.choice((2, len(pickle) - 1, chance.randrange(len(pickle))))
        pickle[place:place] = chance.choice(CODE)
    for _ in range(chance.choice((0, 1, 2, 8))):
        pickle[chance.randrange(len(pickle))] = chance.choice((*b"(tR.}]uh\x93\x85N", 255, 0))
    entries[name] = bytes(pickle)
    with zipfile.ZipFile(file, "w") as archive:
        for each, content in entries.items():
            archive.writestr(each, content)


def of_json_file(file: Path, chance: Chance) -> None:
    file.write_bytes(of_json(file.read_text(), chance).encode("utf-8", "surrogatepass"))
