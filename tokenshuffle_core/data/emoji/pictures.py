"""The pictures of the data set in memory: RGBA cut-outs, and the colours of backgrounds."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...images import open_picture

WHITE = (255, 255, 255)
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": WHITE,
    "black": (24, 24, 28),
    "grey": (176, 180, 186),
    "red": (232, 96, 88),
    "orange": (250, 176, 96),
    "yellow": (252, 224, 120),
    "green": (136, 204, 136),
    "blue": (120, 180, 240),
    "purple": (180, 148, 228),
    "pink": (250, 176, 204),
}


def load_rgba(directory: Path, records: list[dict]) -> Tensor:
    """The records' pictures as uint8 (N, 4, H, W), straight alpha."""
    return stacked(map(partial(read, directory), records))


def read(directory: Path, record: dict) -> Image.Image:
    """The picture of a record, RGBA. Raises as `read_rgba`."""
    return read_rgba(directory / record["image"])


def read_rgba(path: Path) -> Image.Image:
    """Raises OSError, and ValueError as `images.open_picture`."""
    with open(path, "rb") as file:
        return open_picture(file, str(path)).convert("RGBA")


def stacked(pictures: Iterable[Image.Image]) -> Tensor:
    """RGBA pictures of one size as uint8 (N, 4, H, W)."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(arrays).movedim(-1, 1).contiguous()


def sent(numbers: list, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting for it: from pinned memory a copy is only queued."""
    tensor = torch.tensor(numbers)
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def resize(cut_out: Image.Image, side: int) -> Image.Image:
    """A square RGBA picture resized without a fringe in the colour of its transparent pixels."""
    if cut_out.size == (side, side):
        return cut_out
    resized = cut_out.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    return resized.convert("RGBA")


def composite(rgba: Tensor, backgrounds: Tensor) -> Tensor:
    """uint8 (N, 4, H, W) over uint8 colours (N, 3) -> float32 (N, 3, H, W) in 0..1."""
    rgba = rgba.float() / 255
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    return colour * alpha + (backgrounds.float() / 255)[:, :, None, None] * (1 - alpha)


def on_white(directory: Path, records: list[dict], batch: int = 16) -> Iterator[Tensor]:
    """The records' pictures on white, float32 (up to `batch`, 3, H, W) in 0..1."""
    for start in range(0, len(records), batch):
        rgba = load_rgba(directory, records[start : start + batch])
        yield composite(rgba, torch.tensor([WHITE], dtype=torch.uint8).expand(len(rgba), 3))
