"""A checkpoint in pieces that are small enough to be sent, and together again.

    python -m benchmarks.pieces FOLDER CHECKPOINT.safetensors

`pieces.json` names the pieces, in order, with their checksums. It is written last, so that pieces
of two checkpoints are never taken for one.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from tokenshuffle_core import load
from tokenshuffle_core.files import atomic_path, sha256, write_text

SIZE = 15 * 2**20  # bytes of a piece
LIST = "pieces.json"


def split(checkpoint: Path, folder: Path, size: int = SIZE) -> None:
    """Write the checkpoint, in float16, as pieces into `folder`, in place of earlier ones."""
    with tempfile.TemporaryDirectory() as temporary:
        half = Path(temporary, "half.safetensors")
        load(checkpoint, "cpu").save(half, torch.float16)
        content = half.read_bytes()
    pieces = {
        f"model-{number}.part": content[start : start + size]
        for number, start in enumerate(range(0, len(content), size))
    }
    for name, piece in pieces.items():
        with atomic_path(folder / name) as path:
            path.write_bytes(piece)
    checksums = {name: sha256([piece]) for name, piece in pieces.items()}
    write_text(folder / LIST, json.dumps({"pieces": checksums}, indent=2) + "\n")
    for path in folder.glob("model-*.part"):
        if path.name not in pieces:
            path.unlink()


def join(folder: Path, checkpoint: Path) -> None:
    """Raises FileNotFoundError for a piece that is missing, ValueError for one that is damaged or
    from another checkpoint."""
    if not (folder / LIST).is_file():
        raise FileNotFoundError(f"{folder / LIST} is missing: nothing says what the pieces are")
    checksums = json.loads((folder / LIST).read_text(encoding="utf-8"))["pieces"]
    content = b""
    for number, (name, expected) in enumerate(checksums.items(), 1):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"piece {number} of {len(checksums)}, {path}, is missing")
        piece = path.read_bytes()
        if sha256([piece]) != expected:
            raise ValueError(
                f"piece {number} of {len(checksums)}, {path}, is damaged or from another checkpoint"
            )
        content += piece
    with atomic_path(checkpoint) as path:
        path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT.safetensors")
    options = parser.parse_args()
    try:
        join(options.folder, options.checkpoint)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(options.checkpoint)


if __name__ == "__main__":
    main()
