"""Reads mutated copies of one kind of checkpoint and tells how that went, as a line of JSON.

python -m tests.support.fuzz FOLDER KIND COUNT SEED
"""

import json
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from tests.support.models import random_checkpoint
from tokenshuffle_core import checkpoints
from tokenshuffle_core.pipeline import load

MEMORY = 6 * 2**30  # of the whole process: a header must not make it allocate more
HEADER = 4096  # bytes at either end, where most mutations fall


def main(folder: Path, kind: str, count: int, seed: int) -> dict:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chance = random.Random(f"{kind} {seed}")
    found = {"tried": 0, "refused": 0, "read": 0, "other errors": [], "code executed": 0}
    executed = []
    sys.addaudithook(
        lambda event, _: executed.append(event) if event in ("os.system", "subprocess.Popen") else 0
    )
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(count):
            copy = _copy(folder, kind, Path(temporary) / str(number))
            files = [copy] if copy.is_file() else sorted(f for f in copy.iterdir() if f.is_file())
            _mutate(chance.choice(files), chance)
            found["tried"] += 1
            try:
                _read(copy, kind, folder)
            except (ValueError, OSError) as error:
                found["refused"] += 1
                if len(str(error)) > 1000 or "\n" in str(error):
                    found["other errors"].append(f"{number}: not a sentence: {error!r:.300}")
            except Exception as error:
                found["other errors"].append(f"{number}: {error!r:.300}")
            else:
                found["read"] += 1
            shutil.rmtree(Path(temporary) / str(number))
    found["code executed"] = len(executed)
    return found


def _copy(folder: Path, kind: str, to: Path) -> Path:
    to.mkdir()
    if kind == "native":
        random_checkpoint().save(to / "native.safetensors")
        return to / "native.safetensors"
    if kind == "vq":
        return Path(shutil.copy(folder / "vq.pt", to))
    if kind == "llamagen":
        shutil.copy(folder / "llamagen" / "vq_ds16_c2i.pt", to)
        return Path(shutil.copy(folder / "llamagen" / "c2i_B_256.pt", to))
    return Path(shutil.copytree(folder / kind, to / kind))


def _read(path: Path, kind: str, folder: Path) -> None:
    if kind == "vq":
        checkpoints.load_image_tokenizer(path)
    elif kind == "llama":
        converted = path.parent / "converted.safetensors"
        checkpoints.convert(path, converted, image_tokenizer=folder / "vq.pt")
    else:
        load(path)


def _mutate(file: Path, chance: random.Random) -> None:
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


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
