"""The checks of values from outside, whatever door they come by: an option, a file, a node, Python.

Each raises ValueError with one sentence that begins with the value's name.
"""

import reprlib
from collections.abc import Collection
from numbers import Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


MAX_TEXT = 10_000  # characters; several times what any model reads, and encoded in 20 ms


def check_number(name: str, value: object, least: float, most: float) -> None:
    """A finite number within the limits."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and least <= value <= most):  # nan is in no order
        raise ValueError(
            f"{name} must be a number from {least:g} to {most:g}, not {reprlib.repr(value)}"
        )


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """A whole number within the limits."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value <= most):
        raise ValueError(
            f"{name} must be a whole number from {least} to {most}, not {reprlib.repr(value)}"
        )


def check_choice(name: str, value: object, choices: Collection) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be one of {known}, not {reprlib.repr(value)}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {reprlib.repr(value)}")


def check_text(name: str, value: object) -> None:
    """Text that can be tokenised, written into a file and used in a file's name."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {reprlib.repr(value)}")
    if len(value) > MAX_TEXT:
        raise ValueError(
            f"{name} has {len(value)} characters, at most {MAX_TEXT} are read: shorten it"
        )
    if any("\ud800" <= c <= "\udfff" for c in value):  # half of a pair, as from a broken paste
        raise ValueError(f"{name} contains a lone surrogate, which is not a character")
    if "\0" in value:
        raise ValueError(f"{name} contains the character NUL, which no text has")


def check_sides(width: int, height: int, unit: int) -> None:
    """Sides in pixels that are multiples of `unit`; the sentence has the nearest sizes that fit."""
    for name, side in (("width", width), ("height", height)):
        if side % unit or side < unit:
            lower = [max(unit, value // unit * unit) for value in (width, height)]
            upper = [max(unit, -(-value // unit) * unit) for value in (width, height)]
            sizes = dict.fromkeys(f"{w}x{h}" for w, h in (lower, upper))
            raise ValueError(
                f"{name} {side} does not fit: both sides must be multiples of {unit} pixels, the "
                f"nearest sizes are {' and '.join(sizes)}"
            )


def check_pictures(images: "Tensor") -> None:
    """Pictures (B, H, W, 3)."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            "a picture must be RGB, with shape (batch, height, width, 3), not "
            f"{tuple(images.shape)}: flatten its alpha channel first"
        )


def check_codes(codes: "Tensor") -> None:
    """Codes (B, h, w) of any type of whole numbers."""
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(
            f"codes must be whole numbers of shape (batch, rows, columns), not {codes.dtype} of "
            f"shape {tuple(codes.shape)}"
        )


def check_given(given: "Tensor", shape: tuple[int, int, int], codes: int, window: int) -> None:
    """Codes to keep, int64 of this shape, with -1 in whole windows to sample: the same ones in each
    picture. `codes` is the size of the codebook."""
    if given.shape != shape:
        raise ValueError(
            f"the given codes have the shape {tuple(given.shape)}, the pictures need {shape}"
        )
    if given.max() >= codes:
        raise ValueError(
            f"the given codes go up to {given.max()}, this model's codebook to {codes - 1}: they "
            "are from another image tokenizer"
        )
    kept = given >= 0
    first = kept[:1, ::window, ::window].repeat_interleave(window, 1)
    if not kept.equal(first.repeat_interleave(window, 2).expand_as(kept)):
        raise ValueError(f"the given codes must fill whole windows of {window} x {window}")
