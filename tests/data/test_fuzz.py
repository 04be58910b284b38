"""Damaged pictures, sources and codes: each is read or refused in a sentence."""

import json
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.pairs import encoded, noise, write_folder, write_metadata, write_tar
from tokenshuffle_core.data import CodeShards, extract
from tokenshuffle_core.data.sources import read_items
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.images import read_image
from tokenshuffle_core.presets import PRESETS

COUNT = 300  # copies of each file
KINDS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """With some bytes changed, mostly near its start, or cut, or with a part twice."""
    data = bytearray(content)
    kind = rng.integers(0, 6)
    if kind == 0:
        return bytes(data[: rng.integers(0, len(data) + 1)])
    if kind == 1:
        start, stop = sorted(rng.integers(0, len(data) + 1, 2))
        return bytes(data[:stop] + data[start:])
    reach = len(data) if kind == 2 else min(len(data), 600)
    for place in rng.integers(0, reach, rng.integers(1, 8)):
        data[place] = rng.choice([rng.integers(0, 256), 0, 255, 0x2D, 0x39])
    return bytes(data)


def write_all(folder: Path) -> None:
    """A file of each kind to damage."""
    for kind in KINDS:
        (folder / f"picture.{kind.lower()}").write_bytes(encoded(noise(24, 16), kind))
    deep = noise(8, 8).convert("RGBA")
    (folder / "alpha.png").write_bytes(encoded(deep))
    members = {"a.png": encoded(noise(4, 4)), "a.txt": b"a", "x/b.v1.jpg": encoded(noise(4, 4))}
    write_tar(folder / "set.tar", members | {"x/b.v1.json": b'{"text": "b", "repeats": 2}'})
    with tarfile.open(folder / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("猫" * 40 + ".png", "猫" * 40 + ".txt"):
            member = tarfile.TarInfo(name)
            tar.addfile(member)
    pairs = {f"{i}.png": (encoded(noise(16, 16, i)), [f"a {i}"]) for i in range(4)}
    write_metadata(folder / "listed", pairs)
    write_folder(folder / "table", pairs)
    rows = "".join(f'{i}.png,"a ""{i}""\n b",{i + 1},train\n' for i in range(4))
    (folder / "table" / "metadata.csv").write_text("file_name,text,repeats,split\n" + rows)
    torch.manual_seed(0)
    images = ImageTokenizer(PRESETS["tiny"].image_tokenizer)
    extract(folder / "listed", folder / "codes", images, [(16, 16)], shard_size=2)


def use(path: Path) -> None:
    """Read everything that a user would."""
    if path.parent.name == "codes":
        reader = CodeShards(path.parent, verify=False)
        for i in range(len(reader)):
            reader.codes(i)
            reader.record(i)
    elif path.parent.name in ("listed", "table") or path.suffix == ".tar":
        for item in read_items(path.parent if path.suffix != ".tar" else path):
            item.picture()
    else:
        read_image(path, "white")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_damaged_is_read_or_refused(tmp_path, capsys):
    whole = tmp_path / "whole"
    whole.mkdir()
    write_all(whole)
    targets = [path for path in whole.iterdir() if path.is_file()]
    targets += [whole / "listed" / "metadata.jsonl", whole / "table" / "metadata.csv"]
    targets += [whole / "codes" / "index.json", whole / "codes" / "codes-00000.safetensors"]
    sentences = set()
    rng, counts, slowest = np.random.default_rng(22), Counter(), 0.0
    work = shutil.copytree(whole, tmp_path / "work")
    if hasattr(signal, "alarm"):
        signal.alarm(600)
    for target in targets:
        path = work / target.relative_to(whole)
        content = target.read_bytes()
        for _ in range(COUNT):
            path.write_bytes(mutated(content, rng))
            started = time.monotonic()
            try:
                use(path)
                counts["read"] += 1
            except (ValueError, FileNotFoundError) as error:
                sentences.add(str(error).replace(str(tmp_path), ""))
                counts["refused"] += 1
            slowest = max(slowest, time.monotonic() - started)
        path.write_bytes(content)
    if hasattr(signal, "alarm"):
        signal.alarm(0)
    with capsys.disabled():
        print(json.dumps(counts | {"slowest": round(slowest, 2)}))
    assert all(0 < len(sentence) < 1000 for sentence in sentences)
    assert slowest < 5
    assert min(counts.values()) > COUNT
