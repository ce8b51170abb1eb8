"""95% intervals: of a mean over records, and of a proportion. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

NORMAL_QUANTILE = 1.959964


def mean_interval(
    values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float, float]:
    """Compute the mean and its 95% interval (Student's t), cut to the scale of the values.

    Not a bootstrap, which needs a seed and is too narrow for ten records. Equal values have an interval without width,
    however few they are.

    Args:
        lowest, highest: ends of the scale.

    Returns:
        mean, low, high. One value says nothing about the spread, so its interval is the whole scale; without values
        the mean is nan.
    """
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return mean, lowest, highest
    half = _t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return mean, max(lowest, mean - half), min(highest, mean + half)


def wilson_interval(right: int, total: int, z: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), which also holds near 0 and 1, unlike p +- z s.e."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def _t_quantile(df: int) -> float:
    """The t with P(|T| < t) = 95%."""
    if df > 1000:  # the series below gets long, and this is right to six digits (Abramowitz and Stegun 26.7.5)
        return NORMAL_QUANTILE + (NORMAL_QUANTILE**3 + NORMAL_QUANTILE) / (4 * df)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_within(middle, df) < 0.95 else (low, middle)
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
