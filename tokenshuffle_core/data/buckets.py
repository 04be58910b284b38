"""Aspect-ratio buckets: the few sizes that pictures of all shapes are scaled and cropped to."""

import math
from collections.abc import Iterable

from PIL import Image, ImageOps

Size = tuple[int, int]  # width, height in pixels
LARGEST = 2**14  # pixels of a side


def buckets(side: int, unit: int, max_ratio: float = 2.0) -> list[Size]:
    """Sizes of about side * side pixels whose sides are multiples of `unit`.

    The square comes first, then each rectangle in landscape and in portrait, up to `max_ratio` to
    1. Raises ValueError for a unit below 1, a side that is not from the unit to LARGEST, or a ratio
    that is not from 1 to 16.
    """
    if unit < 1:
        raise ValueError(f"unit must be at least 1 pixel, not {unit}")
    if side < unit:
        raise ValueError(f"side must be at least {unit} pixels, not {side}")
    if side > LARGEST:
        raise ValueError(f"side must be at most {LARGEST} pixels, not {side}")
    if not 1 <= max_ratio <= 16:
        raise ValueError(f"max_ratio must be from 1 to 16, not {max_ratio}")
    square = round(side / unit)
    sizes = [(square * unit, square * unit)]
    long = square + 1
    while long <= max_ratio * (short := max(1, round(square * square / long))):
        sizes += [(long * unit, short * unit), (short * unit, long * unit)]
        long += 1
    return sizes


def nearest(size: Size, sizes: Iterable[Size]) -> Size:
    """The one of `sizes` with the nearest aspect ratio, on a logarithmic scale, and among several
    such the one with the nearest area."""

    def distance(other: Size) -> tuple[float, float]:
        ratio = math.log(size[0] * other[1] / (size[1] * other[0]))
        area = math.log(size[0] * size[1] / (other[0] * other[1]))
        # Rounded, so that twice as wide and twice as high are equally far from a square.
        return round(abs(ratio), 9), round(abs(area), 9)

    return min(sizes, key=distance)


def scale_and_crop(image: Image.Image, bucket: Size) -> Image.Image:
    """`image` scaled (Lanczos) to cover `bucket`, and cropped to its centre."""
    return ImageOps.fit(image, bucket, Image.Resampling.LANCZOS)
