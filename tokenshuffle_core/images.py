"""Reading and writing pictures and codes."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .files import atomic_path


def read_image(path: str | Path, background: str | None = None) -> Tensor:
    """An 8-bit picture as float32 (1, H, W, 3) in 0..1.

    A transparent picture is composited onto the colour `background`. Raises FileNotFoundError, or
    ValueError with one sentence for a file that is not such a picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture: {error}") from None
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{path} has more than 8 bits per channel: convert it to 8 bits first")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        if background is None:
            raise ValueError(
                f"{path} is transparent: choose a background colour, such as --background white"
            )
        try:
            colour = ImageColor.getrgb(background)
        except ValueError:
            raise ValueError(f"background {background!r} is not a colour") from None
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*colour[:3], 255)), image)
    return to_tensor([image.convert("RGB")]).movedim(1, -1)


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """8-bit pictures of one size and mode as float32 (N, channels, H, W) in 0..1."""
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 255


def sheet_of(images: Sequence[Tensor], columns: int) -> Image.Image:
    """Images (3, H, W) in 0..1 as one picture, row by row with a thin white gap, in cells of the
    largest width and height, where smaller images are centred."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    rows = -(-len(images) // columns)
    gap = 4
    canvas = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top = i // columns * (height + gap) + (height - image.shape[1]) // 2
        left = i % columns * (width + gap) + (width - image.shape[2]) // 2
        place = slice(top, top + image.shape[1]), slice(left, left + image.shape[2])
        canvas[(..., *place)] = image.float().cpu().clamp(0, 1)
    return Image.fromarray((canvas.movedim(0, -1) * 255).round().byte().numpy())


def write_png(path: str | Path, image: Tensor, **about: object) -> None:
    """Save (H, W, 3) in 0..1 as PNG; `about` goes into text chunks, as JSON under "tokenshuffle".

    The chunk is not called "prompt" or "parameters": ComfyUI would read those as a workflow.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", "ComfyUI-TokenShuffle")
    if "prompt" in about:
        chunks.add_itxt("Description", str(about["prompt"]))
    if about:
        chunks.add_itxt("tokenshuffle", json.dumps(about, ensure_ascii=False))
    pixels = (image * 255).clamp(0, 255).byte().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", pnginfo=chunks)


def read_codes(path: str | Path) -> Tensor:
    """Codes int64 (B, h, w) from a .npy file of two or three dimensions. Raises ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        # Not np.load, which reads archives too; a mapping cannot be larger than its file.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # a damaged header can make the reader raise anything
        raise ValueError(f"{path} is not a .npy file of codes") from None
    if codes.ndim not in (2, 3) or codes.dtype.kind not in "iu" or not codes.size:
        raise ValueError(
            f"{path} holds {codes.dtype!s:.80} of shape {codes.shape!s:.80}: codes are integers of "
            "shape (rows, columns) or (batch, rows, columns)"
        )
    return torch.from_numpy(codes.astype(np.int64)).reshape(-1, *codes.shape[-2:])


def write_codes(path: str | Path, codes: Tensor) -> None:
    """Save codes (B, h, w) as .npy."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, codes.cpu().numpy())
