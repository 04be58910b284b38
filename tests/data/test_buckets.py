import math

import numpy as np
import pytest
from PIL import Image

from tests.support.pairs import noise
from tokenshuffle_core.data.buckets import buckets, nearest, scale_and_crop


@pytest.mark.parametrize(
    ("side", "unit", "ratio"), [(256, 16, 2.0), (1024, 64, 4.0), (100, 8, 3.0), (512, 64, 1.0)]
)
def test_buckets_are_all_shapes_of_about_one_area(side, unit, ratio):
    found = buckets(side, unit, ratio)
    square = round(side / unit) * unit
    assert found[0] == (square, square)
    assert len(set(found)) == len(found)
    lying = {
        (wide, high)
        for wide in range(square + unit, 8 * square, unit)
        for high in [min(range(unit, wide, unit), key=lambda h: abs(wide * h - square**2))]
        if wide / high <= ratio
    }
    standing = {(high, wide) for wide, high in lying}
    assert set(found[1:]) == lying | standing


def test_sdxl_sizes_are_among_the_buckets():
    published = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768)}
    assert published < set(buckets(1024, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 16), "side must be at least 16 pixels, not 8"),
        ((8, 0), "unit must be at least 1"),
        ((64, 16, 0.5), "max_ratio must be from 1 to 16"),
        ((64, 16, float("nan")), "max_ratio must be from 1 to 16"),
        ((64, 16, float("inf")), "max_ratio must be from 1 to 16"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        buckets(*arguments)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 500), (64, 64)),
        ((499, 500), (64, 64)),
        ((3000, 1000), (96, 48)),
        ((1, 90), (48, 96)),
        ((141, 100), (64, 64)),  # below and above the square root of 2
        ((142, 100), (96, 48)),
    ],
)
def test_the_nearest_shape_is_by_logarithm(size, expected):
    assert nearest(size, [(64, 64), (96, 48), (48, 96)]) == expected


def test_the_same_shape_goes_by_area():
    sizes = [(32, 32), (64, 64), (256, 256), (128, 64), (64, 128)]
    assert nearest((127, 127), sizes) == (64, 64)  # 128 is as far from 64 as from 256
    assert nearest((129, 129), sizes) == (256, 256)
    assert nearest((10, 10), sizes) == (32, 32)
    # A shape between a lying and a standing bucket: the first of them, on every machine.
    assert nearest((50, 50), [(128, 64), (64, 128)]) == (128, 64)
    assert nearest((50, 50), [(64, 128), (128, 64)]) == (64, 128)


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (17, 91), (1, 1), (640, 3)])
def test_scale_and_crop_covers_the_bucket(size):
    image = Image.new("RGB", size, (10, 20, 30))
    fitted = scale_and_crop(image, (32, 24))
    assert fitted.size == (32, 24)
    assert fitted.getextrema() == ((10, 10), (20, 20), (30, 30))


def test_scale_and_crop_scales_and_cuts_the_middle():
    image = noise(96, 64)
    scaled = image.resize((48, 32), Image.Resampling.LANCZOS)
    assert scale_and_crop(image, (32, 32)).tobytes() == scaled.crop((8, 0, 40, 32)).tobytes()
    assert scale_and_crop(image, (96, 64)).tobytes() == image.tobytes()
    assert scale_and_crop(image, (64, 64)).tobytes() == image.crop((16, 0, 80, 64)).tobytes()


def test_scale_and_crop_keeps_proportions():
    """A circle stays a circle, whatever is cut off."""
    y, x = np.mgrid[-100:100, -150:150] + 0.5
    circle = Image.fromarray(np.where(np.hypot(x, y) < 60, 255, 0).astype(np.uint8))
    left, top, right, bottom = (
        scale_and_crop(circle, (64, 96)).point(lambda v: 255 * (v > 127)).getbbox()
    )
    assert math.isclose(right - left, bottom - top, abs_tol=1)
    assert math.isclose(right - left, 120 * 96 / 200, abs_tol=2)
