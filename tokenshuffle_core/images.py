"""Reading and writing pictures and codes."""

import json
import warnings
from collections.abc import Sequence
from io import SEEK_END
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import (
    ExifTags,
    Image,
    ImageColor,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor

from .files import atomic_path

# Not all of Pillow's: to open PostScript, for one, starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
HUGE, RATIO = 2**26, 64  # more pixels, and more of them per byte of the file, are a bomb

Colour = tuple[int, int, int]
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # written, by suffix
SIDES = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}  # pixels, the most of the format
QUALITY = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
MAX_EXIF = 65_000  # bytes in a JPEG
ASCII = b"ASCII\0\0\0"  # how EXIF says the encoding of a comment


def read_image(path: str | Path, background: str | None = None) -> Tensor:
    """The picture in a file as float32 (1, H, W, 3) in 0..1.

    A transparent picture is composited onto the colour `background`. Raises FileNotFoundError, and
    ValueError as `open_picture`, for a transparent picture without a `background` and for one that
    is not a colour.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    colour = None if background is None else colour_of(background)
    with open(path, "rb") as file:
        image = to_rgb(open_picture(file, str(path)), str(path), colour)
    return to_tensor([image]).movedim(1, -1)


def open_picture(file: BinaryIO, what: str) -> Image.Image:
    """The picture in a file, or the first one, upright and in its own mode.

    Every picture of a user is opened here. Raises ValueError, which calls it `what`, where it is
    not in one of FORMATS with 8 bits per channel, is damaged, or is a decompression bomb.
    """
    try:
        size = file.seek(0, SEEK_END)
        file.seek(0)
        image = Image.open(file, formats=FORMATS)
        pixels = image.width * image.height
        if pixels > max(HUGE, RATIO * size):
            raise ValueError(f"{pixels} pixels in {size} bytes are a decompression bomb")
        image.load()
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:  # its message contains a memory address
        raise ValueError(f"{what} is not a picture in {' or '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's parsers raise anything, such as struct.error
        raise ValueError(f"{what} cannot be read: {error}") from None
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{what} has more than 8 bits per channel: convert it to 8 bits first")
    return image


def to_rgb(image: Image.Image, what: str, background: Colour | None) -> Image.Image:
    """A picture in RGB, a transparent one on `background`. One with an alpha channel that is opaque
    everywhere is not transparent. Raises ValueError, which calls it `what`."""
    transparent = False
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            transparent = image.getchannel("A").getextrema() != (255, 255)
        if not transparent:
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    if background is None:
        raise ValueError(
            f"{what} is transparent: choose a background colour, such as --background white"
        )
    behind = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(behind, image).convert("RGB")


def colour_of(name: str) -> Colour:
    """Red, green and blue of a colour such as "white" or "#ff8000". Raises ValueError."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise ValueError(f"background {name!r} is not a colour") from None


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
    with atomic_path(path) as temporary:
        _to_pil(image).save(temporary, "PNG", pnginfo=chunks)


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).clamp(0, 255).byte().numpy())


def write_picture(path: str | Path, image: Tensor, **about: object) -> None:
    """As `write_png`, in the format of the name. A .jpg has quality 95, a .webp is lossless; both
    say in EXIF what a PNG says in its text chunks, the JSON in the user comment."""
    kind = PICTURES[Path(path).suffix.lower()]
    if kind == "PNG":
        write_png(path, image, **about)
        return
    with atomic_path(path) as temporary:
        _to_pil(image).save(temporary, kind, exif=_exif(about), **QUALITY[kind])


def _exif(about: dict) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "ComfyUI-TokenShuffle"
    if "prompt" in about:
        exif[ExifTags.Base.ImageDescription] = str(about["prompt"]).encode()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = ASCII + json.dumps(about).encode()
    return exif


def check_fits(path: str | Path, about: dict) -> None:
    """Raises ValueError where the format of `path` cannot hold the picture, of `width` and `height`
    in `about`, or what it is to say."""
    kind, side = PICTURES[Path(path).suffix.lower()], max(about["width"], about["height"])
    if side > SIDES[kind]:
        raise ValueError(
            f"a side of {side} pixels does not fit into a {kind}, which has at most {SIDES[kind]}: "
            "choose .png"
        )
    if kind == "JPEG" and len(_exif(about).tobytes()) > MAX_EXIF:
        raise ValueError("the prompt is too long to be saved in a JPEG: choose .png or .webp")


def read_about(path: str | Path) -> dict | None:
    """What `write_picture` wrote into a picture, {} where it was not this that wrote it, and None
    where there is no whole picture."""
    try:
        with Image.open(path, formats=[*SIDES]) as image:
            image.load()
    except Image.DecompressionBombError:
        return {}
    except Exception:  # Pillow's parsers raise anything, such as struct.error
        return None
    try:
        text = image.info.get("tokenshuffle")
        if image.format != "PNG":
            ifd = image.getexif().get_ifd(ExifTags.IFD.Exif)
            text = ifd[ExifTags.Base.UserComment].removeprefix(ASCII)
        about = json.loads(text)
    except Exception:
        return {}
    return about if isinstance(about, dict) else {}


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
