"""Values with their 95 % confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A value measured on `n` items; the interval is nan if n is too small for one."""

    value: float
    low: float
    high: float
    n: int


def proportion(hits: int, n: int) -> Estimate:
    """hits / n with Wilson's score interval (J. Am. Stat. Assoc. 22, 1927)."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p = hits / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == n else centre + half
    return Estimate(p, low, high, n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values, such as those of several seeds, with Student's t-interval."""
    n = len(values)
    value = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Estimate(value, math.nan, math.nan, n)
    variance = math.fsum((v - value) ** 2 for v in values) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return Estimate(value, value - half, value + half, n)


@lru_cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with `freedom` degrees, to at least five digits."""
    if freedom > 1000:  # the series below becomes long; Abramowitz and Stegun, 26.7.5
        return Z + (Z**3 + Z) / (4 * freedom)
    low, high = Z, 13.0  # 12.7 for one degree
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return high


def _t_within(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
