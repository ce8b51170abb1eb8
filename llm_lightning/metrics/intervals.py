"""95% intervals: of a mean over records, of a proportion, and of a difference. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

from llm_lightning.metrics.student_t import quantile

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
    half = quantile(n - 1) * stdev(values) / math.sqrt(n)
    return mean, max(lowest, mean - half), min(highest, mean + half)


def wilson_interval(right: int, total: int, z: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), which also holds near 0 and 1, unlike p +- z s.e."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_share_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """The 95% interval of share B - share A, both measured on the same records.

    Method 10 of Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17: Wilson's intervals of both shares, joined by their correlation. Unlike a t
    interval of the differences, it has a width where no record tells the two apart.

    Args:
        both, only_a, only_b, neither: records that both have right, only one of them, or none.
    """
    n = both + only_a + only_b + neither
    if n == 0:
        return -1.0, 1.0
    right_a, right_b = both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = wilson_interval(right_a, n), wilson_interval(right_b, n)
    share_a, share_b = right_a / n, right_b / n
    phi = _correlation(both, only_a, only_b, neither)
    low = _joined(share_b - low_b, high_a - share_a, phi)
    high = _joined(high_b - share_b, share_a - low_a, phi)
    return max(-1.0, share_b - share_a - low), min(1.0, share_b - share_a + high)


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """The correlation of the two outcomes, with Newcombe's correction for continuity if it is positive."""
    n = both + only_a + only_b + neither
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    surplus: float = both * neither - only_a * only_b
    if surplus > 0:
        surplus = max(surplus - n / 2, 0)
    return surplus / math.sqrt(margins) if margins else 0.0


def _joined(one: float, other: float, phi: float) -> float:
    """The half width of the difference, from those of its two terms."""
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))
