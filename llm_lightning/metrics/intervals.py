"""95% intervals: of a mean over records, and of a proportion. Standard library only."""

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
