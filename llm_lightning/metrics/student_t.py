"""Student's t distribution: probabilities and quantiles. Standard library only."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist


def probability_within(t: float, df: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom."""
    return _probability_within(math.atan(t / math.sqrt(df)), df)


@cache
def quantile(df: int, probability: float = 0.95) -> float:
    """The t with P(|T| < t) = `probability`."""
    if df > 1000:  # the series below gets long, and this is right to six digits (Abramowitz and Stegun 26.7.5)
        z = NormalDist().inv_cdf((1 + probability) / 2)
        return z + (z**3 + z) / (4 * df)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_within(middle, df) < probability else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _probability_within(angle: float, df: int) -> float:
    """P(|t| < sqrt(df) tan(angle)), Abramowitz and Stegun 26.7.3 (odd df) and 26.7.4 (even df)."""
    cosine, is_odd = math.cos(angle), df % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for k in range(1, (df - is_odd) // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * k / (2 * k + 1) if is_odd else (2 * k - 1) / (2 * k))
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
