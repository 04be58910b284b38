"""The same pictures and captions as a folder, an image folder of `datasets`, and .tar shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture whose every pixel differs from its neighbours'."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# `pairs` below: file name -> (content of the picture, captions)


def write_folder(folder: Path, pairs: dict[str, tuple[bytes, list[str]]]) -> Path:
    for name, (content, captions) in pairs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text("\n".join(captions), encoding="utf-8")
    return folder


def write_metadata(folder: Path, pairs: dict[str, tuple[bytes, list[str]]]) -> Path:
    lines = []
    for name, (content, captions) in pairs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        about = {"text": captions[0]} if len(captions) == 1 else {"captions": captions}
        lines.append(json.dumps({"file_name": name} | about, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_shards(folder: Path, pairs: dict[str, tuple[bytes, list[str]]]) -> Path:
    """Two shards; captions in .txt in the first, in .json in the second."""
    folder.mkdir()
    shards = {}, {}
    for i, (name, (content, captions)) in enumerate(pairs.items()):
        key = name.rpartition(".")[0]
        if i % 2:
            about = {f"{key}.json": json.dumps({"captions": captions}).encode()}
        else:
            about = {f"{key}.txt": "\n".join(captions).encode()}
        shards[i % 2].update({name: content} | about)
    for i, members in enumerate(shards):
        write_tar(folder / f"set-{i}.tar", members)
    return folder
