import math

import pytest

from tokenshuffle_core.evaluation.intervals import mean, proportion, t_quantile


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_those_of_newcombe(hits, n, low, high):
    """Newcombe, Stat. Med. 17 (1998), table I, method 3."""
    found = proportion(hits, n)
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = proportion(n - hits, n)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042),
     (60, 2.000), (120, 1.980), (10_000, 1.960)],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_the_series_and_the_approximation_meet():
    assert t_quantile(1000) == pytest.approx(t_quantile(1001), abs=1e-5)


def test_the_interval_of_three_seeds():
    """Mean 2, standard deviation 1: 2 +- 4.3027 / sqrt(3)."""
    found = mean([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (2, 3)
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)


def test_too_few_values_have_no_interval():
    assert (mean([3.0]).value, mean([3.0]).n) == (3, 1)
    assert math.isnan(mean([3.0]).low)
    assert math.isnan(mean([]).value)
    assert math.isnan(proportion(0, 0).value)
